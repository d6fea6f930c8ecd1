"""Which tokens of a step go to which session.

The batch of one step is mostly the batch of the step before, so a worker's answer is kept until its batch or the
listeners of its groups change; a steady step then moves its tokens as whole lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from scheduler.codec import encode_logprobs
from scheduler.dispatcher import StepOutput
from scheduler.gateway_link import Session
from scheduler.sequence import Sequence, SequenceGroup


@dataclass(frozen=True, slots=True)
class _Route:
    """What one session gets of a step."""

    session: Session
    streams: list[int]
    """Stream numbers, one per token."""
    rows: list[int]
    """Positions in the step's tokens, one per stream number."""
    pick: Callable[[list[int]], Any] | None
    """Takes the rows out of the step's tokens; None: all of them, in order."""


class Fanout:
    """Hands a step's tokens to the sessions that listen."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[Sequence], list[_Route]]] = {}  # by worker

    def listeners_changed(self, group: SequenceGroup) -> None:
        """Must be called whenever a group that may have had tokens gains or loses a listener. One without a worker gets
        none until it has moved to one."""
        if group.worker_id is not None:
            self._kept.pop(group.worker_id, None)

    def groups_moved(self) -> None:
        """Must be called whenever groups may have come to a worker by another way than that of a new request."""
        self._kept.clear()

    def deliver(self, worker_id: str, output: StepOutput) -> list[Session]:
        """Adds the tokens to the sessions' steps in the making; returns the sessions that got some."""
        routes = self._routes(worker_id, output.sequences)
        for route in routes:
            session = route.session
            if output.logprobs:
                _add_logprobs(route, output)
            session.streams += route.streams
            session.token_ids += output.token_ids if route.pick is None else route.pick(output.token_ids)
        return [route.session for route in routes]

    def _routes(self, worker_id: str, sequences: list[Sequence]) -> list[_Route]:
        kept = self._kept.get(worker_id)
        if kept is not None and kept[0] == sequences:
            return kept[1]
        routes = _make_routes(sequences)
        self._kept[worker_id] = (sequences, routes)
        return routes


def _make_routes(sequences: list[Sequence]) -> list[_Route]:
    by_session: dict[Session, tuple[list[int], list[int]]] = {}
    for row, sequence in enumerate(sequences):
        for listener in sequence.group.listeners:
            found = by_session.get(listener.session)
            if found is None:
                found = by_session[listener.session] = ([], [])
            found[0].append(listener.stream + sequence.index)
            found[1].append(row)
    everything = list(range(len(sequences)))
    return [
        _Route(session, streams, rows, None if rows == everything else _picker(rows))
        for session, (streams, rows) in by_session.items()
    ]


def _picker(rows: list[int]) -> Callable[[list[int]], Any]:
    if len(rows) == 1:  # itemgetter of one gives the item itself
        only = rows[0]
        return lambda tokens: (tokens[only],)
    return itemgetter(*rows)


def _add_logprobs(route: _Route, output: StepOutput) -> None:
    session = route.session
    first = len(session.token_ids)
    for position, row in enumerate(route.rows):
        found = output.logprobs.get(row)
        if found is not None:
            session.logprob_rows.append(first + position)
            session.logprobs.append(encode_logprobs(found))
