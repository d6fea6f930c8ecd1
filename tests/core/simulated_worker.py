"""A worker without a model that executes step plans against a simulated memory and notices every mistake in them.

Every KV slot of every block holds the hash of the token history that ends there. Before a row computes anything, all
its earlier positions are compared with its own history, through its block table; so a block that is stale, shared by
mistake, freed too early, not copied, or copied from the wrong place is found in the step that would have read it.
Reads come before all writes of the same plan: what a plan computes may be read by later plans only.

Sampled tokens are a function of the history that was read from memory, of the request's seed and of the sequence's
index. `undisturbed_output` is the same function without any memory, so every run has one right answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from scheduler.dispatcher import WorkerCapacity
from scheduler.hypotheses import FinishedHypothesis
from scheduler.sequence import FinishReason, Request
from scheduler.step_plan import (
    BlockMoves,
    PromptLogprobs,
    StepPlan,
    StepResult,
    StepTimings,
    TokenLogprobs,
)

VOCABULARY = 64
MASK = (1 << 61) - 1
START = 0x1234567
GARBAGE = -1
"""In a KV slot: a row that ran out of memory should have written here. Reading it is no mistake of the plan, which was
made before anybody knew; but the row that reads it is garbage too, and its token must never be accepted."""


@dataclass(frozen=True)
class Behaviour:
    """What the simulated model does with a request; travels as `Request.payload`."""

    seed: int = 0
    nonfinite_at: int | None = None  # the number of output tokens at which its logits become NaN
    out_of_memory_at: int | None = None  # the number of known tokens at which its row cannot be computed
    deadly_at: int | None = None  # the number of known tokens from which on computing its row kills the worker


def extend_history(history: int, token: int) -> int:
    return (history * 1_000_003 + token + 1) * 0x9E3779B1 % MASK


def choose_token(request: Request, index: int, history: int, num_output: int) -> int:
    """The token after a history; like a real worker it does not sample stop tokens before min_tokens."""
    behaviour = request.payload
    assert isinstance(behaviour, Behaviour)
    value = (history ^ (behaviour.seed * 7919 + index * 104729 + 11)) * 0x5851F42D % MASK
    token = (value >> 20) % VOCABULARY
    if num_output < request.min_tokens:
        while token in request.stop_ids:
            token = (token + 1) % VOCABULARY
    return token


def undisturbed_output(request: Request, index: int) -> tuple[list[int], FinishReason]:
    """What a sequence gives when nothing interferes, and why it ends."""
    history = START
    for token in request.prompt:
        history = extend_history(history, token)
    output: list[int] = []
    while True:
        token = choose_token(request, index, history, len(output))
        output.append(token)
        if token in request.stop_ids and len(output) > request.min_tokens:
            return output, FinishReason.STOP
        if len(output) == request.max_tokens:
            return output, FinishReason.LENGTH
        history = extend_history(history, token)


def offer(history: int, count: int) -> TokenLogprobs:
    """The `count` likeliest tokens after a history, for a beam."""
    ids = [(history + 7 * place) % VOCABULARY for place in range(count)]
    logprobs = [-0.1 - place / 4 - (history >> (place + 6)) % 100 / 401 for place in range(count)]
    return TokenLogprobs(0.0, 1, ids, logprobs)


def undisturbed_beams(request: Request, block_size: int = 1) -> tuple[list[FinishedHypothesis], int]:
    """The answers of a beam search when nothing interferes, and the most blocks that it needs at a time."""
    search, most = request.start_beam_search(), 0
    while not search.is_done:
        offers = []
        beginnings = set()
        for beam in search.beams:
            history = START
            for position, token in enumerate([*request.prompt, *beam.tokens], 1):
                history = extend_history(history, token)
                if position % block_size == 0 and position < len(request.prompt) + len(beam.tokens):
                    beginnings.add((position, history))
            offers.append(offer(history, search.num_candidates))
        most = max(most, len(beginnings) + len(search.beams))
        search.advance(offers)
    return search.finished, most


def logprob_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, token, [token], [-0.5])


@dataclass
class Row:
    """One row of the persistent batch."""

    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    computed: int
    blocks: list[int]
    prompt_logprobs: int | None
    logprobs: int | None
    histories: list[int] = field(default_factory=list)  # of every known token; what its KV slot must hold

    def __post_init__(self) -> None:
        history = self.histories[-1] if self.histories else START
        for token in self.tokens[len(self.histories) :]:
            history = extend_history(history, token)
            self.histories.append(history)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.histories.append(extend_history(self.histories[-1], token))


class WorkerDiedError(Exception):
    """The worker has gone down with a plan; nothing of it can be used any more."""


class SimulatedWorker:
    """Executes the plans of one epoch, in order, each once; AssertionError for a plan that is wrong."""

    def __init__(self, capacity: WorkerCapacity, epoch: int, step_ns: int = 0) -> None:
        """`step_ns`: what a step takes beside 1,000 ns a token."""
        size = capacity.block_size
        self.step_ns = step_ns
        self.capacity = capacity
        self.epoch = epoch
        self.last_step = 0
        self.kv: list[list[int | None]] = [[None] * size for _ in range(capacity.num_blocks)]
        self.host: list[list[int | None]] = [[None] * size for _ in range(capacity.host_blocks)]
        self.rows: dict[int, Row] = {}
        self.decode_set: list[int] = []
        self.swapped_out = 0
        self.swapped_in = 0
        self.copied = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """The result of a plan, after all its changes have been made."""
        assert plan.epoch == self.epoch, "a plan of another epoch"
        assert plan.step == self.last_step + 1, f"step {plan.step} after step {self.last_step}"
        self.last_step = plan.step
        self._release(plan)
        self._move_blocks(plan)
        self._change_tables(plan)
        self._change_decode_set(plan)
        return self._compute(plan)

    # ---- before the forward pass

    def _release(self, plan: StepPlan) -> None:
        for slot in plan.release_slots:
            assert slot in self.rows, f"slot {slot} is released but empty"
            del self.rows[slot]
        self.decode_set = [slot for slot in self.decode_set if slot in self.rows]

    def _move_blocks(self, plan: StepPlan) -> None:
        assert not set(plan.copies.sources) & set(plan.copies.destinations), "a copy reads what another copy writes"
        self._move(plan.swap_out, self.kv, self.host)
        self._move(plan.swap_in, self.host, self.kv)
        self._move(plan.copies, self.kv, self.kv)
        self.swapped_out += len(plan.swap_out)
        self.swapped_in += len(plan.swap_in)
        self.copied += len(plan.copies)

    def _move(self, moves: BlockMoves, source: list[Any], destination: list[Any]) -> None:
        assert len(moves.sources) == len(moves.destinations)
        assert len(set(moves.destinations)) == len(moves.destinations), "a block is written by two copies"
        for read, written in zip(moves.sources, moves.destinations, strict=True):
            destination[written] = source[read].copy()

    def _change_tables(self, plan: StepPlan) -> None:
        for new in plan.new_sequences:
            assert 0 <= new.slot < self.capacity.max_slots
            assert new.slot not in self.rows, f"slot {new.slot} is filled but taken"
            assert 0 <= new.computed_tokens < len(new.token_ids)
            assert new.token_ids[: new.prompt_tokens] == new.request.prompt
            self.rows[new.slot] = Row(
                new.request,
                new.index,
                list(new.token_ids),
                new.prompt_tokens,
                new.computed_tokens,
                list(new.blocks),
                new.prompt_logprobs,
                new.logprobs,
            )
        self._continue_beams(plan)
        for slot, block in zip(plan.append_slots, plan.append_blocks, strict=True):
            self.rows[slot].blocks.append(block)
        replacements = zip(plan.replace_slots, plan.replace_indices, plan.replace_blocks, strict=True)
        for slot, index, block in replacements:
            self.rows[slot].blocks[index] = block

    def _continue_beams(self, plan: StepPlan) -> None:
        assert len(set(plan.beam_slots)) == len(plan.beam_slots), "a row becomes two beams"
        beams = {}
        for slot, parent_slot, token in zip(plan.beam_slots, plan.beam_parents, plan.beam_tokens, strict=True):
            parent = self.rows[parent_slot]
            assert parent.computed == len(parent.tokens) - 1, f"slot {parent_slot} has not sampled"
            assert parent.request.is_beam_search
            row = beams[slot] = replace(
                parent,
                tokens=parent.tokens[:-1],
                blocks=parent.blocks.copy(),
                prompt_logprobs=None,
                histories=parent.histories[:-1],
            )
            row.add(token)
        for slot, row in beams.items():
            assert slot not in self.rows or self.rows[slot].request is row.request, f"slot {slot} is another request's"
            self.rows[slot] = row

    def _change_decode_set(self, plan: StepPlan) -> None:
        for slot in plan.decode_remove:
            self.decode_set.remove(slot)
        for slot in plan.decode_add:
            assert slot in self.rows, f"slot {slot} decodes but is empty"
            assert slot not in self.decode_set, f"slot {slot} decodes twice"
            self.decode_set.append(slot)

    # ---- forward pass and sampling

    def _compute(self, plan: StepPlan) -> StepResult:
        chunks = list(zip(plan.chunk_slots, plan.chunk_tokens, strict=True))
        work = [(slot, 1) for slot in self.decode_set] + chunks
        assert len({slot for slot, _ in work}) == len(work), "a row has two pieces of work"
        num_tokens = sum(count for _, count in work)
        assert 0 < num_tokens <= self.capacity.max_step_tokens or (not work and len(plan.swap_out))
        for slot in self.decode_set:
            row = self.rows[slot]
            assert row.computed == len(row.tokens) - 1, f"slot {slot} decodes at {row.computed} of {len(row.tokens)}"
        if any(self._is_deadly(self.rows[slot]) for slot, _ in work):
            raise WorkerDiedError
        starved = [slot for slot, _ in work if self._is_starved(self.rows[slot])]
        spoilt = {slot for slot, _ in work if self._check_memory(slot, self.rows[slot])} | set(starved)
        written: set[tuple[int, int]] = set()
        prompt_logprobs = []
        for slot, count in work:
            row = self.rows[slot]
            assert 0 < count <= len(row.tokens) - row.computed
            entry = self._prompt_logprobs(slot, row, count)
            self._write(row, count, written, is_garbage=slot in spoilt)
            if entry is not None:
                prompt_logprobs.append(entry)
        sampling = list(self.decode_set)
        sampling += [slot for slot, _ in chunks if self.rows[slot].computed == len(self.rows[slot].tokens)]
        for fork in plan.forks:
            assert fork.parent_slot in dict(chunks), "a fork's parent has no chunk in this plan"
            assert fork.parent_slot in sampling, "a fork's parent does not sample"
            assert fork.slot not in self.rows, f"slot {fork.slot} is forked into but taken"
            parent = self.rows[fork.parent_slot]
            self.rows[fork.slot] = Row(
                parent.request,
                fork.index,
                parent.tokens.copy(),
                parent.num_prompt,
                parent.computed,
                parent.blocks.copy(),
                None,
                parent.logprobs,
                parent.histories.copy(),
            )
            sampling.append(fork.slot)
            if fork.parent_slot in spoilt:
                spoilt.add(fork.slot)
        tokens, nonfinite = [], []
        for row_number, slot in enumerate(sampling):
            token, finite = self._sample(self.rows[slot])
            if slot in spoilt:
                token, finite = 0, True
            tokens.append(token)
            if not finite:
                nonfinite.append(row_number)
        offers = {
            row_number: self._offer(self.rows[slot], is_spoilt=slot in spoilt)
            for row_number, slot in enumerate(sampling)
            if self.rows[slot].request.is_beam_search
        }
        for slot, token in zip(sampling, tokens, strict=True):
            self.rows[slot].add(token)
        with_logprobs = [row for row, slot in enumerate(sampling) if self.rows[slot].logprobs is not None]
        return StepResult(
            epoch=plan.epoch,
            step=plan.step,
            token_ids=tokens,
            logprob_rows=with_logprobs,
            logprobs=[offers.get(row) or logprob_of(tokens[row]) for row in with_logprobs],
            prompt_logprobs=prompt_logprobs,
            nonfinite_rows=nonfinite,
            timings=StepTimings(
                swap_out_ns=1000 * len(plan.swap_out),
                swap_in_ns=1000 * len(plan.swap_in),
                forward_ns=self.step_ns + 1000 * num_tokens,
                chunk_tokens=sum(plan.chunk_tokens),
                decode_tokens=len(self.decode_set),
            ),
            out_of_memory_slots=starved,
        )

    def _is_starved(self, row: Row) -> bool:
        behaviour = row.request.payload
        assert isinstance(behaviour, Behaviour)
        return behaviour.out_of_memory_at is not None and len(row.tokens) >= behaviour.out_of_memory_at

    def _is_deadly(self, row: Row) -> bool:
        behaviour = row.request.payload
        assert isinstance(behaviour, Behaviour)
        return behaviour.deadly_at is not None and len(row.tokens) >= behaviour.deadly_at

    def _check_memory(self, slot: int, row: Row) -> bool:
        """All positions before the next one must be in the row's blocks. True: some are garbage."""
        size = self.capacity.block_size
        assert len(set(row.blocks)) == len(row.blocks), f"slot {slot} has a block twice: {row.blocks}"
        for first in range(0, row.computed, size):
            last = min(first + size, row.computed)
            found = self.kv[row.blocks[first // size]][: last - first]
            if GARBAGE in found:
                return True
            assert found == row.histories[first:last], (
                f"slot {slot} ({row.request.request_id}/{row.index}) reads a wrong block "
                f"{row.blocks[first // size]} at positions {first}..{last - 1}"
            )
        return False

    def _write(self, row: Row, count: int, written: set[tuple[int, int]], *, is_garbage: bool) -> None:
        size = self.capacity.block_size
        for position in range(row.computed, row.computed + count):
            block = row.blocks[position // size]
            place = (block, position % size)
            assert place not in written, f"two rows write slot {place} in one step"
            written.add(place)
            self.kv[block][position % size] = GARBAGE if is_garbage else row.histories[position]
        row.computed += count

    def _prompt_logprobs(self, slot: int, row: Row, count: int) -> PromptLogprobs | None:
        last = min(row.computed + count, row.num_prompt - 1)
        if row.prompt_logprobs is None or last <= row.computed:
            return None
        first = row.computed + 1
        return PromptLogprobs(slot, first, [logprob_of(token) for token in row.tokens[first : last + 1]])

    def _last_history(self, row: Row) -> int:
        size, position = self.capacity.block_size, row.computed - 1
        history = self.kv[row.blocks[position // size]][position % size]
        assert history is not None
        return history

    def _offer(self, row: Row, *, is_spoilt: bool) -> TokenLogprobs:
        assert row.logprobs is not None
        return offer(0 if is_spoilt else self._last_history(row), row.logprobs)

    def _sample(self, row: Row) -> tuple[int, bool]:
        history = self._last_history(row)
        behaviour = row.request.payload
        assert isinstance(behaviour, Behaviour)
        num_output = len(row.tokens) - row.num_prompt
        token = choose_token(row.request, row.index, history, num_output)
        return token, behaviour.nonfinite_at is None or num_output < behaviour.nonfinite_at
