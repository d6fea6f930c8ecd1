"""API keys: who may call, and as which tenant."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

import grpc

from gateway.errors import Reason, RequestError
from pagewire.runtime.errors import StartError

MAX_KEYS = 10_000
MAX_FILE_BYTES = 1 << 20
SHORTEST_KEY = 8
LONGEST_TENANT = 64


@dataclass(frozen=True)
class ApiKeys:
    """The keys of a file, as digests, so that comparing takes the same time whatever is offered."""

    holders: tuple[tuple[bytes, str], ...]
    """(SHA-256 of the key, tenant)."""

    def tenant_of(self, authorization: str) -> str:
        """The tenant of an `Authorization: Bearer KEY` header. Raises RequestError if it holds no key of ours."""
        scheme, _, key = authorization.partition(" ")
        offered = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        tenant: str | None = None
        for digest, holder in self.holders:  # all of them: the time must not tell which
            if hmac.compare_digest(digest, offered):
                tenant = holder
        if tenant is None or scheme.lower() != "bearer":
            what = "the API key is not valid" if authorization else "an API key is needed: Authorization: Bearer KEY"
            raise RequestError(grpc.StatusCode.UNAUTHENTICATED, Reason.INVALID_API_KEY, what)
        return tenant


def load_api_keys(path: Path | None) -> ApiKeys | None:
    """Reads a file of keys: one per line, with the tenant's name behind it if wanted; empty lines and # are skipped.

    A key without a name gets a tenant of its own, so that keys never share prefix-cache blocks by accident.

    Returns:
        None without a path: no key is asked for.

    Raises:
        StartError: the file cannot be read or has no usable keys; no line of it is repeated.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        lines = data.decode("ascii").splitlines()
    except OSError as error:
        raise StartError(f"--api-keys-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise StartError(f"--api-keys-file {path}: is not ASCII text: write one KEY or KEY TENANT per line") from None
    holders: list[tuple[bytes, str]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        tenant = words[1] if len(words) > 1 else ""
        wrong_size = len(words) > 2 or len(words[0]) < SHORTEST_KEY or len(tenant) > LONGEST_TENANT
        if wrong_size or not all(map(str.isprintable, words)):
            raise StartError(
                f"--api-keys-file {path}: line {number} is not KEY or KEY TENANT, with a key of at least "
                f"{SHORTEST_KEY} characters and a tenant of at most {LONGEST_TENANT}"
            )
        digest = hashlib.sha256(words[0].encode()).digest()
        holders.append((digest, tenant or f"key-{digest.hex()[:12]}"))
    if not holders or len(data) > MAX_FILE_BYTES or len(holders) > MAX_KEYS:
        raise StartError(f"--api-keys-file {path}: must hold 1 to {MAX_KEYS} keys in at most {MAX_FILE_BYTES} bytes")
    return ApiKeys(tuple(holders))
