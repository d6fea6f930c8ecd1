"""What the core tells the edges besides tokens."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.sequence import Sequence, SequenceGroup


class StatusCode(enum.IntEnum):
    """The gRPC status codes that the core answers with."""

    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    INTERNAL = 13
    UNAVAILABLE = 14


class Admitted(NamedTuple):
    """The request's first sequence has begun to run (with prompt_logprobs: its prompt has been computed)."""

    group: SequenceGroup


class Finished(NamedTuple):
    """One sequence has ended; sequence.finish says how."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Failed:
    """The whole request has ended with an error; all its unfinished sequences have finish.reason ERROR."""

    group: SequenceGroup
    code: StatusCode
    reason: str  # ErrorInfo.reason, e.g. NONFINITE_LOGITS
    message: str  # one clear line
    retry_after_ns: int = 0  # 0: a retry does not help


Event = Admitted | Finished | Failed
