"""Errors as gRPC statuses with rich details: built on the server, read on the client.

A status carries `ErrorInfo` (reason, domain, metadata), `BadRequest` (the paths of wrong fields) and `RetryInfo` (when
a retry helps). The message never holds a Python exception's text, a prompt or an internal name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "pagewire"
NS_PER_S = 1_000_000_000


def status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str,
    domain: str = DOMAIN,
    violations: Sequence[tuple[str, str]] = (),
    retry_after_ns: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> status_pb2.Status:
    """Builds a status with details.

    Args:
        code: the status code; not OK.
        message: one clear line for a person.
        reason: UPPER_SNAKE_CASE name for a program, from the documented list.
        domain: who defines the reason.
        violations: (path of the field, what is wrong with it) for each wrong field.
        retry_after_ns: nanoseconds after which a retry may help; 0: it does not.
        metadata: further facts, such as limits; keys in lowerCamel or snake case, at most 64 characters.
    """
    result = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=dict(metadata or {}))
    result.details.add().Pack(info)
    if violations:
        bad = error_details_pb2.BadRequest()
        for path, description in violations:
            bad.field_violations.add(field=path, description=description)
        result.details.add().Pack(bad)
    if retry_after_ns:
        seconds, nanos = divmod(retry_after_ns, NS_PER_S)
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds, nanos=nanos))
        result.details.add().Pack(retry)
    return result


def to_grpc(value: status_pb2.Status) -> grpc.Status:
    """The form that `context.abort_with_status` takes."""
    result: grpc.Status = rpc_status.to_status(value)
    return result


@dataclass(frozen=True)
class StatusDetails:
    """What a client can know about a failed call."""

    code: grpc.StatusCode
    """The status code."""
    message: str
    """One line for a person."""
    reason: str = ""
    """Name for a program; empty if the server sent no details (a broken connection, for example)."""
    domain: str = ""
    """Who defines the reason."""
    violations: tuple[tuple[str, str], ...] = ()
    """(path of the field, what is wrong with it)."""
    retry_after_ns: int = 0
    """Nanoseconds after which a retry may help; 0: unknown or it does not."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Further facts."""


def decode(error: Any) -> StatusDetails:
    """Reads the status of a failed call: a `grpc.RpcError` of a synchronous or an asyncio call.

    Details that are missing or malformed are left out; this never raises for them.
    """
    code = error.code()
    message = error.details() or ""
    trailing = error.trailing_metadata() or ()
    packed = next((value for key, value in trailing if key == "grpc-status-details-bin"), None)
    if packed is None:
        return StatusDetails(code, message)
    try:
        rich = status_pb2.Status.FromString(packed)
    except Exception:  # whatever a foreign server has put there
        return StatusDetails(code, message)
    reason, domain = "", ""
    violations: list[tuple[str, str]] = []
    retry_after_ns = 0
    facts: dict[str, str] = {}
    for detail in rich.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, domain, facts = info.reason, info.domain, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [(violation.field, violation.description) for violation in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_ns = retry.retry_delay.seconds * NS_PER_S + retry.retry_delay.nanos
    return StatusDetails(code, message, reason, domain, tuple(violations), retry_after_ns, facts)
