"""RequestError in OpenAI's shape: {"error": {message, type, param, code}}, our reason and violations beside them."""

from __future__ import annotations

import math
from typing import Any

import grpc
from pydantic_core import to_json

from gateway.errors import NS_PER_S, Reason, RequestError

STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""HTTP status by verdict; any other is 500."""

HTTP_ONLY = {
    Reason.NO_SUCH_PATH: 404,
    Reason.METHOD_NOT_ALLOWED: 405,
    Reason.BODY_TIMEOUT: 408,
    Reason.BODY_TOO_LARGE: 413,
}
"""HTTP status of the reasons that no other protocol has."""

CODES = {
    Reason.PROMPT_TOO_LONG: "context_length_exceeded",
    Reason.MODEL_NOT_FOUND: "model_not_found",
    Reason.INVALID_API_KEY: "invalid_api_key",
    Reason.GATEWAY_FULL: "rate_limit_exceeded",
    "QUEUE_FULL": "rate_limit_exceeded",
}
"""`code` where OpenAI has a word that its clients look for; any other is the reason in small letters."""


def status_of(error: RequestError) -> int:
    """The HTTP status."""
    for reason, status in HTTP_ONLY.items():
        if error.reason == reason:
            return status
    return STATUS.get(error.code, 500)


def body_of(error: RequestError) -> dict[str, Any]:
    """The JSON body."""
    status = status_of(error)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    content: dict[str, Any] = {
        "message": error.message,
        "type": kind,
        "param": error.violations[0].field if error.violations else None,
        "code": CODES.get(error.reason, error.reason.lower()),
        "reason": str(error.reason),
    }
    if error.reason == Reason.MODEL_NOT_FOUND:
        content["param"] = "model"
    if error.violations:
        content["violations"] = [
            {"field": violation.field, "description": violation.description} for violation in error.violations
        ]
    return {"error": content}


def headers_of(error: RequestError) -> dict[str, str]:
    """What tells clients whether and when to try again; OpenAI's own obey x-should-retry and retry-after-ms."""
    headers: dict[str, str] = {}
    status = status_of(error)
    if error.retry_after_ns:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_ns / NS_PER_S)))
        headers["retry-after-ms"] = str(max(1, error.retry_after_ns // 1_000_000))
    elif status < 500 or status == 501:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.reason in (Reason.BODY_TOO_LARGE, Reason.BODY_TIMEOUT):
        headers["connection"] = "close"  # the rest of the body is not read
    return headers


def encoded(error: RequestError) -> bytes:
    """The JSON body as bytes."""
    return to_json(body_of(error))
