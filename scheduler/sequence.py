"""Requests, sequences and sequence groups: who wants what, and how far each is.

A request becomes one sequence group with `n` sequences that share the prompt. The group is what is admitted,
preempted and resumed, all of it or nothing; the sequence is what has tokens, a row on the worker and a block table.
A beam search has `beam_width` sequences: while it runs each holds a live beam, and from its end on the first n hold the
answers.
All times are nanoseconds of a monotonic clock that the caller passes in.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from scheduler.block_table import BlockTable
from scheduler.hypotheses import BeamSearch
from scheduler.step_plan import TokenLogprobs

if TYPE_CHECKING:
    from hashlib import _Hash

PATIENCE_NS = 60_000_000_000
"""How far a group with an earlier deadline may pass one that came before it."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a gateway submitted, as far as scheduling needs to know it. The prompt is never changed."""

    request_id: str  # unique among live requests
    prompt: array[int]  # token ids, at least one; of type "I", which the garbage collector does not walk like a list
    n: int = 1  # sequences that the client gets: sampled from the one prompt, or the best of a beam search
    beam_width: int = 1  # above 1: a beam search with so many beams, at least n
    length_penalty: float = 1.0  # of the beam search
    max_tokens: int = 16  # output tokens at most, at least 1; prompt + max_tokens is within the model's context
    min_tokens: int = 0  # stop_ids do not end a sequence before it has that many output tokens
    stop_ids: frozenset[int] = frozenset()  # tokens that end a sequence; the model's own are merged in by the edge
    priority: int = 0  # higher runs first
    tenant: str = ""  # salt of the prefix cache
    deadline: int | None = None  # time after which nobody wants the answer
    detached: bool = False  # lives on without a listener; read by the edge
    hold_ns: int = 0  # how long its KV is kept after a finish by STOP or LENGTH; needs n = 1
    logprobs: int | None = None  # top-N asked for per output token; None: none
    prompt_logprobs: int | None = None  # top-N asked for per prompt token; None: none
    payload: object = None  # the edge's own (the Submit message); the core never looks into it

    @property
    def is_beam_search(self) -> bool:
        return self.beam_width > 1

    @property
    def num_sequences(self) -> int:
        """Sequences that run: those that the client gets, or all beams."""
        return self.beam_width if self.is_beam_search else self.n

    def start_beam_search(self) -> BeamSearch:
        """A beam search at its beginning."""
        return BeamSearch(
            width=self.beam_width,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop_ids=self.stop_ids,
            length_penalty=self.length_penalty,
            top_logprobs=self.logprobs,
        )


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    PARKED = "parked"  # until it is continued


@dataclass(frozen=True, slots=True)
class Usage:
    """What a sequence cost. Everything but completion_tokens is the request's, whichever sequence it is read from."""

    prompt_tokens: int = 0  # with input appended since
    completion_tokens: int = 0  # of all turns
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first admitted
    preemptions: int = 0
    swapped_bytes: int = 0  # copied to and from the host arena
    recomputed_tokens: int = 0  # tokens whose KV was computed again
    queue_ns: int = 0  # submit to the first plan that ran it
    first_token_ns: int = 0  # submit to the first output token
    total_ns: int = 0  # submit to the end


@dataclass(frozen=True, slots=True)
class Finish:
    """How a sequence ended."""

    reason: FinishReason
    matched_stop: str = ""  # the stop string, when a gateway found one
    matched_token_id: int | None = None  # the stop token, when one ended it
    usage: Usage = field(default_factory=Usage)
    cumulative_logprob: float = 0.0  # sum over the output; 0 unless known: log-probabilities asked for, or beam search


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of a sequence's output that ended before the request was continued behind it."""

    num_tokens: int  # output tokens at its end, those of turns before it included
    finish: Finish


class SequenceStatus(enum.Enum):
    """Where a sequence is. Those of a group that still run are all in a queue or all on the worker."""

    WAITING = "waiting"  # has never run
    PREFILLING = "prefilling"  # has blocks; some known tokens are not computed yet
    RUNNING = "running"  # its next step is a decode step
    ENDING = "ending"  # its last token by length is planned but not known yet
    SWAPPED = "swapped"  # preempted, KV in the host arena
    PREEMPTED = "preempted"  # preempted (or its worker was lost), KV to be recomputed
    FINISHED = "finished"


class Sequence:
    """One sequence: prompt (its group's), output so far, and its place on the worker."""

    __slots__ = (
        "base_step",
        "computed",
        "computed_before",
        "earlier",
        "earlier_logprobs",
        "end_step",
        "finish",
        "follows",
        "group",
        "has_row",
        "index",
        "logprobs",
        "output",
        "slot",
        "starts_at",
        "status",
        "stop_ids",
        "table",
        "turns",
    )

    def __init__(self, group: SequenceGroup, index: int) -> None:
        self.group = group
        self.index = index  # 0..n-1
        self.output: list[int] = []  # accepted tokens; of this turn, if the request has been continued
        # The empty tuple costs nothing, an empty list is one more object for the garbage collector to walk: few
        # requests ask for log-probabilities, few are ever continued.
        self.logprobs: list[TokenLogprobs] | tuple[()] = ()  # one per output token, if asked for; add_logprobs
        self.earlier: tuple[int, ...] = ()  # output of turns before this one; the request's prompt holds it too
        self.earlier_logprobs: tuple[TokenLogprobs, ...] = ()
        self.turns: tuple[Turn, ...] = ()  # those before this one
        self.status = SequenceStatus.WAITING
        self.finish: Finish | None = None
        self.stop_ids = group.request.stop_ids  # here too: read once per sampled token
        self.table = BlockTable()
        self.slot = -1  # the row on the worker; still known after its release, for results that are under way
        self.has_row = False
        self.computed = 0  # tokens whose KV is planned, the prefix cache's included; not kept up in the decode set
        self.computed_before = 0  # tokens whose KV had been computed before it was taken off a worker
        self.starts_at = 0  # while PREFILLING: first step that may compute it; 0: any
        self.follows: Sequence | None = None  # while PREFILLING: who computes the first blocks, which it shares
        self.base_step = 0  # in the decode set: step s writes the KV of position s - base_step
        self.end_step = 0  # in the decode set: the step that samples its last token by length; 0: not in the set

    @property
    def request(self) -> Request:
        return self.group.request

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.group.request.prompt) + len(self.output)

    @property
    def token_ids(self) -> array[int]:
        """All known tokens. The prompt's own array when there is no output: do not change it."""
        prompt = self.group.request.prompt
        return prompt + array("I", self.output) if self.output else prompt

    def forget_computed(self) -> None:
        """Its KV is lost, or about to be: all its tokens have to be computed again."""
        self.computed_before = max(self.computed_before, self.computed)
        self.computed = 0

    @property
    def is_finished(self) -> bool:
        return self.finish is not None

    @property
    def is_answer(self) -> bool:
        """Whether the client gets it: all do but for the further beams of a search."""
        return self.index < self.group.request.n

    def add_logprobs(self, entry: TokenLogprobs) -> None:
        """Notes those of the next output token."""
        if not self.logprobs:
            self.logprobs = []
        self.logprobs.append(entry)

    def keep_output(self, num_tokens: int) -> None:
        """Drops the output behind its first `num_tokens` tokens."""
        del self.output[num_tokens:]
        if self.logprobs:
            del self.logprobs[num_tokens:]

    def end(
        self,
        reason: FinishReason,
        now: int,
        *,
        matched_stop: str = "",
        matched_token_id: int | None = None,
        cumulative_logprob: float | None = None,
    ) -> None:
        """Marks it finished, and its group too if it was the last one. Blocks and rows are the scheduler's to free.

        cumulative_logprob is given for an answer of a beam search. A beam that has become none has no output."""
        if cumulative_logprob is None:
            if self.group.search is not None:
                self.output, self.logprobs = [], ()
            cumulative_logprob = sum(entry.logprob for entry in chain(self.earlier_logprobs, self.logprobs))
        self.finish = Finish(
            reason,
            matched_stop,
            matched_token_id,
            self.group.usage(self, now),
            cumulative_logprob,
        )
        self.status = SequenceStatus.FINISHED
        if all(sequence.finish is not None for sequence in self.group.sequences):
            self.group.finished_at = now

    def begin_turn(self) -> None:
        """What it has put out becomes the past of a sequence that has never run. Its block table stays."""
        assert self.finish is not None
        self.earlier = (*self.earlier, *self.output)
        self.earlier_logprobs = (*self.earlier_logprobs, *self.logprobs)
        self.turns = (*self.turns, Turn(len(self.earlier), self.finish))
        self.output, self.logprobs = [], ()
        self.finish = None
        self.status = SequenceStatus.WAITING

    def go_on(self) -> None:
        """It is live again, as after a preemption, or waits if its turn has not begun to run."""
        self.finish = None
        if self.group.started_at is None:
            self.status = SequenceStatus.WAITING
        else:
            self.status = SequenceStatus.SWAPPED if self.table.blocks else SequenceStatus.PREEMPTED

    def __repr__(self) -> str:
        return f"<Sequence {self.group.request.request_id}/{self.index} {self.status.value} +{len(self.output)}>"


class SequenceGroup:
    """All sequences of one request, with what the request has cost so far."""

    __slots__ = (
        "accepted_at",
        "acquitted_at",
        "announced",
        "arrival",
        "beams",
        "cache_allowed",
        "cached_tokens",
        "failure",
        "finished_at",
        "first_token_at",
        "given_tokens",
        "keep_until",
        "listeners",
        "lookup_keys",
        "losses",
        "offers",
        "parked_epoch",
        "parked_on",
        "preemptions",
        "prompt_chain",
        "prompt_hashes",
        "prompt_logprobs",
        "rank",
        "recomputed_tokens",
        "request",
        "resumable_after",
        "search",
        "sequences",
        "shares_prefix",
        "started_at",
        "swapped_bytes",
        "worker_id",
    )

    def __init__(self, request: Request, arrival: int, now: int) -> None:
        self.request = request
        self.arrival = arrival  # number of this request among all ever accepted
        self.rank = _rank(request, arrival, now)
        self.given_tokens = len(request.prompt)  # of the prompt, those that are no output of an earlier turn
        self.search: BeamSearch | None = None
        self.beams: tuple[Sequence, ...] = ()  # of the search: who holds its live beams, in its order
        if request.n == request.beam_width == 1:  # most requests
            self.sequences = [Sequence(self, 0)]
        else:
            self.sequences = [Sequence(self, index) for index in range(request.num_sequences)]
            if request.is_beam_search:
                self.search = request.start_beam_search()
                self.beams = (self.sequences[0],)
        self.offers: dict[Sequence, TokenLogprobs] = {}  # of the search: what beams have offered in this round
        self.listeners: tuple[Any, ...] = ()  # the edge's own
        self.worker_id: str | None = None  # who it is assigned to; None: no worker
        self.failure: object = None  # the Failed event, when the request failed
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt positions 1, 2, ..., if asked for
        self.prompt_hashes: list[bytes] | None = None  # prefix-cache keys of the prompt's full blocks, once needed
        self.prompt_chain: _Hash | None = None  # the hash over those blocks, from which the output's keys go on
        self.lookup_keys: list[bytes] | None = None  # prefix-cache keys it will look up when it starts, once needed
        self.cache_allowed = True  # False: do not look its prompt up (again)
        self.shares_prefix = False  # it runs on blocks that the prefix cache gave it
        self.announced = False  # the Admitted event has been made
        self.resumable_after = 0  # the step whose result must be in before it may be resumed
        self.losses = 0  # workers lost while they ran it, since it last made progress
        self.keep_until: int | None = None  # it is parked or held, until then
        self.parked_on: str | None = None  # the worker that keeps its KV while it is parked; None: nobody
        self.parked_epoch = 0  # of the worker that it was on when it was parked
        self.acquitted_at = 0  # output tokens over all sequences at which `losses` is forgotten
        self.accepted_at = now
        self.started_at: int | None = None  # first plan that ran it
        self.first_token_at: int | None = None
        self.finished_at: int | None = None
        self.cached_tokens = 0
        self.preemptions = 0
        self.swapped_bytes = 0
        self.recomputed_tokens = 0

    @property
    def is_parked(self) -> bool:
        """Whether it has not ended but waits to be continued; one that has ended and is held does not count."""
        return any(
            sequence.finish is not None and sequence.finish.reason is FinishReason.PARKED for sequence in self.sequences
        )

    def begin_turn(self, request: Request, num_given: int, arrival: int, now: int) -> None:
        """The one sequence's output so far and `num_given` further tokens have become a prompt, that of `request`. It
        stands in line like a new request, with KV of its own in the arena if that was kept."""
        (sequence,) = self.sequences
        sequence.begin_turn()
        self.request = request
        sequence.stop_ids = request.stop_ids
        self.arrival = arrival
        self.rank = _rank(request, arrival, now)
        self.given_tokens += num_given
        self.keep_until = None
        self.prompt_hashes = self.lookup_keys = None
        self.announced = False
        self.failure = None
        self.preemptions = 0
        self.accepted_at = now
        self.started_at = self.first_token_at = self.finished_at = None

    def go_on(self, request: Request, arrival: int) -> None:
        """The parked sequences are live again, as after a preemption."""
        self.request = request  # only what does not concern its tokens differs
        self.arrival = arrival
        self.keep_until = None
        self.finished_at = None
        for sequence in self.sequences:
            assert sequence.finish is not None
            if sequence.finish.reason is FinishReason.PARKED:
                sequence.go_on()

    def protect(self) -> None:
        """From now on it ranks before every group that has been preempted less often."""
        self.rank = (0, *self.rank[1:])

    @property
    def is_protected(self) -> bool:
        return self.rank[0] == 0

    @property
    def live(self) -> list[Sequence]:
        """Sequences that have not finished, in index order."""
        if len(self.sequences) == 1:  # most groups
            return self.sequences.copy() if self.sequences[0].finish is None else []
        return [sequence for sequence in self.sequences if sequence.finish is None]

    @property
    def last_ones_first(self) -> list[Sequence]:
        """The live ones in the order in which to end them: what the client gets comes last, so that the group has
        finished when the last of that has."""
        live = self.live
        return sorted(live, key=lambda sequence: sequence.is_answer) if self.search is not None else live

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    def usage(self, sequence: Sequence, now: int) -> Usage:
        """What `sequence` has cost, if it ended `now`."""
        accepted = self.accepted_at
        started, first = self.started_at, self.first_token_at
        return Usage(
            prompt_tokens=self.given_tokens,
            completion_tokens=len(sequence.earlier) + len(sequence.output),
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            swapped_bytes=self.swapped_bytes,
            recomputed_tokens=self.recomputed_tokens,
            queue_ns=(now if started is None else started) - accepted,
            first_token_ns=0 if first is None else first - accepted,
            total_ns=now - accepted,
        )

    def __repr__(self) -> str:
        return f"<SequenceGroup {self.request.request_id} {[s.status.value for s in self.sequences]}>"


def _rank(request: Request, arrival: int, now: int) -> tuple[int, int, int, int]:
    """The total order of groups, smaller runs first: those that have been preempted often enough, by priority, by
    deadline, by arrival. PATIENCE_NS stands in for a later deadline or none, so that nobody is passed for ever."""
    due = now + PATIENCE_NS
    if request.deadline is not None and request.deadline < due:
        due = request.deadline
    return (1, -request.priority, due, arrival)
