"""The scheduler of one worker: the policy.

Every step:

    1. displace         whoever is first in line and finds no room takes it from running groups of a lower priority, or
                        of a tenant that holds more than its share
    2. keep running     all decoding sequences compute one token; if blocks run out, the last group in line yields
    3. continue         prompts that are being prefilled, in chunks, within the token budget
    4. resume           preempted groups
    5. admit            waiting groups, while rows, blocks and budget last

Everything goes by place in line: protected groups, then by priority, then by what the tenant has been served, then by
deadline and arrival (docs/scheduling.md). Steps 4 and 5 are left out in a step in which blocks ran out.

The plan is made one step ahead: results of at most `max_plans_in_flight` plans are unknown while it is made. That
costs nothing, because lengths advance without knowing tokens; a sequence that turns out to have ended runs once more
and that token is dropped.
A steady decode step touches only the sequences that need a block or end in it; the decode calendar knows them.

A beam search needs its result before its next step can be planned: its beams are in the decode set for one step at a
time, all of them or none. Others wait for that result only where it computes more tokens per second in total
(gathering.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from scheduler import beams
from scheduler.beams import BeamMove
from scheduler.block_manager import BlockManager
from scheduler.block_table import BlockTable, blocks_for
from scheduler.census import Census
from scheduler.deadlines import least_ns
from scheduler.decode_calendar import DecodeCalendar
from scheduler.draft import Draft, StepOutput
from scheduler.events import Admitted, Event, Failed, Finished, StatusCode
from scheduler.fairness import TenantTokens
from scheduler.gathering import Gathering, awaited_beams
from scheduler.light_tenants import heavy_budget
from scheduler.line import Line, rank
from scheduler.parked_kv import ParkedKv
from scheduler.plan_ahead import PlanAhead
from scheduler.policy import SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.preemption import CostModel, Place, choose_to_displace, choose_victim
from scheduler.prefix_cache import extend_chain, start_chain
from scheduler.prefix_keys import lookup_keys, output_keys, prompt_keys
from scheduler.result_check import check_result
from scheduler.rows import Rows
from scheduler.sequence import FinishReason, Sequence, SequenceGroup, SequenceStatus
from scheduler.step_plan import NO_MOVES, Fork, NewSequence, StepPlan, StepResult, TokenLogprobs

# Names of their own: looking up an enum's member costs more than comparing it.
WAITING = SequenceStatus.WAITING
PREFILLING = SequenceStatus.PREFILLING
RUNNING = SequenceStatus.RUNNING
ENDING = SequenceStatus.ENDING
SWAPPED = SequenceStatus.SWAPPED
PREEMPTED = SequenceStatus.PREEMPTED

TARGET_SHARE = 0.96
"""Of the target for the time between two tokens, what a step is predicted to take: predictions err by a few percent."""

MOST_LOOKED_AT = 32
"""Waiting groups whose prompts are counted as backlog; more would not be admitted within a few steps."""

NEVER_STARTS = 1 << 62
"""A step number that no epoch reaches."""


class Scheduler:
    """Waiting, running and preempted groups of one worker's epoch; makes its plans and accepts its results."""

    def __init__(
        self,
        worker_id: str,
        config: SchedulerConfig,
        capacity: WorkerCapacity,
        rates: TransferRates,
        epoch: int,
        emit: Callable[[Event], None],
    ) -> None:
        self.worker_id = worker_id
        self.config = config
        self.capacity = capacity
        self.epoch = epoch
        self.blocks = BlockManager(
            num_blocks=capacity.num_blocks,
            host_blocks=capacity.host_blocks,
            block_size=capacity.block_size,
            host_cache=config.prefix_cache and config.host_prefix_cache,
        )
        self.costs = CostModel(rates)
        self.tenants = TenantTokens()
        self.token_budget = min(config.token_budget, capacity.max_step_tokens)
        # Every row may decode in every step, so there are no more rows than tokens in a step.
        self.max_rows = min(config.max_num_seqs, capacity.max_slots, self.token_budget)
        self.watermark_blocks = -int(-config.watermark * capacity.num_blocks // 1)
        self.groups: dict[SequenceGroup, None] = {}  # everybody assigned to this worker and not finished
        self.census = Census(config.max_worker_losses)  # of them
        self.assigned_sequences = 0  # of those groups, for load balancing
        self.waiting = Line()  # has never run; by rank
        self.preempted = Line()  # swapped out or to be recomputed; by rank
        most_parked = int(config.park_arena_share * capacity.host_blocks)
        self.parked = ParkedKv(worker_id, self.blocks, capacity.block_bytes, most_parked)  # not in `groups`
        self.running: dict[SequenceGroup, None] = {}  # has sequences that go on; in order of admission
        self.prefilling: list[Sequence] = []  # in order of admission
        self.decoding: list[Sequence] = []  # the decode set in the worker's order; replaced, never changed in place
        self._emit = emit
        self._decoding_changed = False  # somebody in `decoding` has left
        self.joining: list[Sequence] = []  # join the decode set with the next plan
        self.moved_beams: dict[SequenceGroup, list[BeamMove]] = {}  # searches whose beams decode in the next plan
        self._beams_in_set: list[int] = []  # rows of the beams that the last plan had in the decode set
        self.calendar = DecodeCalendar(capacity.block_size)
        self.ending: dict[Sequence, None] = {}  # wait for their last token; hold blocks, but no row
        self._resumed: set[SequenceGroup] = set()  # since the last preemption
        self.rows = Rows(capacity.max_slots, self.max_rows)
        self.last_step = 0  # last plan made
        self.last_decode_step = 0  # of those, how many the decode set did not sit out: the calendar's step
        self._sits_out = False  # the decode set sits out the last plan
        self.last_applied = 0  # last result applied
        self.in_flight: deque[Draft] = deque()
        self.ahead = PlanAhead()
        self.gathering = Gathering()
        self._result_at: int | None = None  # the newest one came; None: schedule() has been asked since
        self.held_until: int | None = None  # a plan that could be made now is to be made then; nanoseconds
        self._grown = (0, 0.0)  # blocks that the outputs of those who run hold, as of the draft of that step
        self._is_full = False  # somebody who waited is not in the last plan: nor would be who comes now
        self._early: dict[int, StepResult] = {}  # results that overtook another; at most one per plan in flight
        # Figures.
        self.preemptions_total = {"swap": 0, "recompute": 0}
        self.predicted_ns = {"swap": 0, "recompute": 0}
        self.actual_ns = {"swap": 0, "recompute": 0}
        self.swap_out_blocks_total = 0
        self.swap_in_blocks_total = 0
        self.query_tokens_total = 0
        self.hit_tokens_total = 0  # in the KV pool
        self.host_hit_tokens_total = 0  # in the host arena
        self.prompt_tokens_total = 0
        self.generation_tokens_total = 0
        self.groups_started_total = 0  # turns of continued ones included

    @property
    def load(self) -> float:
        """Sequences assigned to this worker over its rows."""
        return self.assigned_sequences / self.max_rows

    # ------------------------------------------------------------------ requests come and go

    def why_never(self, group: SequenceGroup) -> str | None:
        """Why this worker could not run a group even if it were alone; None: it could start."""
        request, size = group.request, self.capacity.block_size
        count = len(group.sequences)
        if count > self.max_rows:
            name = "beam_width" if request.is_beam_search else "n"
            return f"{name} is {count}, but at most {self.max_rows} sequences run at once"
        prompt = len(request.prompt)
        # The first decode step, if there is one: every sequence has a block of its own to write to.
        need = prompt // size + count if request.max_tokens > 1 else blocks_for(prompt, size)
        if need > self.capacity.num_blocks:
            return (
                f"the prompt of {prompt} tokens needs {need} blocks of {size} tokens for {count} sequence(s), "
                f"but the KV pool has {self.capacity.num_blocks}"
            )
        return None

    def least_ns(self, group: SequenceGroup, left: int) -> int:
        """Time that a group that has not started needs at least, from its start. What the prefix cache holds is looked
        up only if it could matter: when more than `left` is needed without it."""
        # Where others wait as well, whoever ends is followed by another: the batch stays as large as it is.
        decodes = len(self.decoding) if len(self.waiting) > 1 and self.decoding else 1
        needed = least_ns(group.request, 0, self.costs.step_time, decodes)
        if needed > left:
            keys = self._findable(group.live[0])
            found = len(self.blocks.find_prefix(keys))
            found += len(self.blocks.tier.find(keys[found:]))
            cached = max(found * self.capacity.block_size, group.live[0].computed)
            needed = least_ns(group.request, cached, self.costs.step_time, decodes)
        return needed

    def add(self, group: SequenceGroup) -> None:
        """Takes a group over: a new one waits, one that has run before is resumed by recompute."""
        group.worker_id = self.worker_id
        group.prompt_hashes = group.lookup_keys = None  # the worker before may have had another block size
        if group.parked_epoch != self.epoch:
            group.resumable_after = 0  # not of this worker's steps
        elif self.in_flight and self.config.prefix_cache:
            prompt_keys(group, self.capacity.block_size)  # what is in flight for it may yet turn out to be garbage
        self.groups[group] = None
        self.tenants.enter(group)
        self.census.enter(group)
        self.ahead.came(group.accepted_at)
        self.assigned_sequences += len(group.live)
        (self.waiting if group.started_at is None else self.preempted).enter(group)

    def pin(self, tenant: str, tokens: list[int]) -> None:
        """Keeps the full blocks of a prefix in the pool, from when a request has computed them on."""
        self.blocks.cache.pin(extend_chain(start_chain(tenant), tokens, self.capacity.block_size))

    def unpin(self, tenant: str, tokens: list[int]) -> None:
        """Treats the blocks of a prefix like all others again."""
        self.blocks.cache.unpin(extend_chain(start_chain(tenant), tokens, self.capacity.block_size))

    def give_up_waiting(self, num_sequences: int) -> list[SequenceGroup]:
        """Gives back groups that have not started, of so many sequences, for another worker: some from all over the
        queue, so that their order changes little. Those whose KV is here stay. Only who goes is looked at."""
        waiting, groups = self.waiting, []
        take = min(num_sequences, len(waiting))
        for index in [(number + 1) * len(waiting) // take - 1 for number in range(take)]:
            group = waiting[index]
            if num_sequences > 0 and not group.live[0].table.blocks:
                groups.append(group)
                num_sequences -= len(group.live)
        for group in reversed(groups):
            waiting.leave(group)
            self._forget_group(group)
        return groups

    def give_up_all(self) -> list[SequenceGroup]:
        """Gives back all groups, because the worker is lost: with the tokens known so far, and without any KV. Those
        that it was computing are suspected of having brought it down."""
        groups = sorted(self.groups, key=rank)
        computing = {s.group for flight in self.in_flight for s in (*flight.rows, *flight.chunks.values())}
        for group in groups:
            group.resumable_after = 0
            group.losses += group in computing
            for sequence in group.live:
                self._leave_decode(sequence)
                sequence.forget_computed()
                sequence.has_row = False
                sequence.table = BlockTable()
                if sequence.status is not WAITING:
                    sequence.status = PREEMPTED
            self._forget_group(group)
        for group in computing - set(groups):
            group.losses += group.keep_until is not None  # parked, but it may be the one
        for group in list(self.parked.groups):
            self.parked.let_go(group)
        return groups

    def stop(self, sequence: Sequence, num_tokens: int, matched_stop: str, now: int) -> None:
        """Ends one sequence at a stop string; it keeps `num_tokens` of its output."""
        self._withdraw(sequence, keep_blocks_findable=True, keep_kv=sequence.request.hold_ns > 0)
        sequence.keep_output(num_tokens)
        self._end(sequence, FinishReason.STOP, now, matched_stop=matched_stop)

    def park(self, group: SequenceGroup, now: int) -> None:
        """Ends what is left of a group for now. Its rows go with the next plan and its blocks are copied out by it, as
        far as results have confirmed what is in them; tokens that are in flight will be dropped."""
        for sequence in group.live:
            self._withdraw(sequence, keep_blocks_findable=True, keep_kv=True)
            sequence.starts_at = 0
            if not sequence.table.blocks:
                sequence.forget_computed()
            self._end(sequence, FinishReason.PARKED, now)

    def end_group(self, group: SequenceGroup, reason: FinishReason, now: int) -> None:
        """Ends what is left of a group, in whatever state it is."""
        for sequence in group.last_ones_first:
            self._withdraw(sequence, keep_blocks_findable=group.search is None)
            self._end(sequence, reason, now)

    def fail(
        self, group: SequenceGroup, code: StatusCode, reason: str, message: str, now: int, retry_after_ns: int = 0
    ) -> None:
        """Ends what is left of a group with an error."""
        for sequence in group.live:
            self._withdraw(sequence, keep_blocks_findable=False)
            sequence.end(FinishReason.ERROR, now)
            self.assigned_sequences -= 1
        failed = group.failure = Failed(group, code, reason, message, retry_after_ns)
        self._emit(failed)
        self._remove_finished(group)

    # ------------------------------------------------------------------ the policy

    def schedule(self, now: int) -> StepPlan | None:
        """The next plan. None: enough plans are in flight, there is nothing to compute now, or it is too early
        (`held_until`)."""
        due, self.held_until = now if self.held_until is None else min(now, self.held_until), None
        result_at, self._result_at = self._result_at, None
        if len(self.in_flight) >= self.config.max_plans_in_flight or not (self.groups or self.parked.leaving):
            return None
        self.tenants.look(now)
        if self.in_flight:
            if self.census.searches and self._waits_for_beams():
                return None
            self.held_until = self._hold_until(now)
            if self.held_until is not None:
                return None
        if self.blocks.tier.is_on:
            self.blocks.tier.is_worth_it = self.costs.is_worth_keeping(
                self.capacity.block_bytes, self.capacity.block_size
            )
        while True:
            draft = Draft(self.last_step + 1)
            draft.idle_since = None if self.in_flight else result_at
            if self.parked.leaving:
                self.parked.swap_out(draft)
            if self._has_order:
                self._displace(draft)
            if self._may_sit_out() and self._plan_light_prompts(draft, now):
                return self._commit(draft, now, due)
            self._keep_running(draft, now)
            self.rows.release(draft)
            self._continue_prefills(draft, now)
            if not draft.has_preempted:
                if self.preempted:
                    self._admit_waiting(draft, now)  # who passes them
                    self._resume_preempted(draft, now)
                self._admit_waiting(draft, now)
            plan = self._commit(draft, now, due)
            # Whoever yielded in a step without other work may start again in the next: once per running group at most.
            if plan is not None or not draft.has_preempted:
                return plan

    def _keep_running(self, draft: Draft, now: int) -> None:
        """All decoding sequences go on, those whose prefill has just been planned join them, and each has a block
        for the position it will write."""
        step, blocks = self.last_decode_step + 1, self.blocks
        joining = self.joining
        if joining:
            self.joining = []
            joining = [sequence for sequence in joining if sequence.status is RUNNING]
            for sequence in joining:
                self.calendar.enter(sequence, step)
        due = self.calendar.due(step)
        copying = [s for s in joining if len(s.group.sequences) > 1 and self._must_copy(s)]  # forks share a last block
        # A sequence whose last block is shared needs a copy, except the last one that shares it: counted as one too
        # many per fork at most, which only matters when nothing is left.
        need = len(due) + len(copying)
        if self.moved_beams:
            need += sum(beams.blocks_to_write(group, blocks.block_size) for group in self.moved_beams)
        if need > blocks.num_free:
            self._make_room(self._needs(due, copying), draft, now)
        if due:
            draft.append_slots += [sequence.slot for sequence in due]
            draft.append_blocks += blocks.append_to_each([sequence.table for sequence in due])
        for sequence in copying:
            if sequence.status is RUNNING:
                self._copy_on_write(sequence, draft)
        if joining or self._decoding_changed:
            joining = [sequence for sequence in joining if sequence.status is RUNNING]
            self.decoding = [sequence for sequence in self.decoding if sequence.status is RUNNING] + joining
            self._decoding_changed = False
        draft.decode_add.extend(sequence.slot for sequence in (self.decoding if self._sits_out else joining))
        if self.moved_beams:
            self._move_beams(draft)
        decodes = len(self.decoding) + len(draft.beams)
        waited = draft.idle_since is not None
        draft.left = draft.left_for_heavy = self._prefill_budget(decodes, waited=waited)
        if self.tenants.is_guarded:
            draft.left_for_heavy = heavy_budget(draft.left, self._backlog(), decodes, self.costs.step_time)

    def _may_sit_out(self) -> bool:
        """Whether the decode set may sit out a step, so that a light tenant's prompt has it to itself. Never two steps
        in a row, and not where the time between two tokens has a target."""
        if not self.tenants.is_guarded or not self.decoding or self._sits_out or self.config.target_itl_ns:
            return False
        if self._beams_in_set or self.moved_beams:
            return False
        if any(sequence.starts_at <= self.last_step + 1 for sequence in self._light_prompts()):
            return True
        return bool(self.waiting) and self.tenants.is_light(self._first(self.waiting))

    def _plan_light_prompts(self, draft: Draft, now: int) -> bool:
        """Plans a step without decodes, in which light tenants' prompts are computed. False: none of them has room, and
        nothing has been planned."""
        if self._decoding_changed:
            self.decoding = [sequence for sequence in self.decoding if sequence.status is RUNNING]
            self._decoding_changed = False
        draft.left, draft.left_for_heavy = self.token_budget, 0
        self.rows.release(draft)
        self._continue_prefills(draft, now)
        self._admit_waiting(draft, now)
        if draft.chunk_slots:
            draft.decodes_sit_out = True
            draft.decode_remove = [sequence.slot for sequence in self.decoding]
        return draft.decodes_sit_out

    def _light_prompts(self) -> list[Sequence]:
        """Prompts of light tenants that are under way."""
        return [sequence for sequence in self.prefilling if self.tenants.is_light(sequence.group)]

    def _move_beams(self, draft: Draft) -> None:
        """All beams of the searches whose last results are in decode in this step: each row becomes its beam, and has
        a block of its own for the position it will write."""
        moved, self.moved_beams = self.moved_beams, {}
        for moves in moved.values():
            for sequence, parent_slot in moves:
                if not sequence.has_row:
                    self.rows.take(sequence)
                draft.beam_slots.append(sequence.slot)
                draft.beam_parents.append(parent_slot)
                draft.beam_tokens.append(sequence.output[-1])
                if sequence.computed % self.capacity.block_size:
                    self._copy_on_write(sequence, draft)
                else:
                    draft.append_slots.append(sequence.slot)
                    draft.append_blocks.append(self.blocks.append(sequence.table))
                self._decode_beam(sequence, draft)

    def _decode_beam(self, sequence: Sequence, draft: Draft) -> None:
        """Has a beam decode in this step."""
        sequence.computed += 1
        draft.beams.append(sequence)

    def _waits_for_beams(self) -> bool:
        """Whether the next plan is left until the next result, so that the beams that wait for it are in it too.
        Prompts wait as well: their chunks cost less in that step than in one of their own."""
        awaited = awaited_beams(self.in_flight, self.running)
        others, ready = len(self.decoding) + len(self.joining), sum(len(group.beams) for group in self.moved_beams)
        backlog = self._backlog()
        if not awaited or not others + ready + backlog:
            return False
        now, later, all_of_them = others + ready, others + awaited, others + ready + awaited
        chunk_now = min(backlog, self._prefill_budget(now))
        chunk_later = min(backlog - chunk_now, self._prefill_budget(later))
        ahead = (now, chunk_now), (later, chunk_later)
        together = all_of_them, min(backlog, self._prefill_budget(all_of_them, waited=True))
        step_time, gathering, target = self.costs.step_time, self.gathering, self.config.target_itl_ns
        if target and others and step_time.ns(*together) + gathering.wait_ns > TARGET_SHARE * target:
            return False
        if gathering.pays(ahead, together, step_time):
            return True
        if others:  # searches alone cannot be taken apart again, so they are not gathered for a try
            gathering.forget()
        return False

    def _prefill_budget(self, decodes: int, *, waited: bool = False) -> int:
        """Tokens that a step may compute beside a decode set of `decodes`: what the budget leaves, and what the target
        for the time between two tokens leaves, of which the wait for a result is a part."""
        target = self.config.target_itl_ns
        left = self.token_budget - decodes
        if target and (self.prefilling or self.preempted or self.waiting):
            within = TARGET_SHARE * target - (self.gathering.wait_ns if waited else 0)
            return self.costs.step_time.chunk_budget(left, int(within), decodes)
        return left

    def _backlog(self) -> int:
        """Prompt tokens that could be computed now if a step had no end: of prompts that are under way, and of waiting
        ones as far as there are rows and blocks for them."""
        room = self.blocks.num_free * self.capacity.block_size
        rows = self.max_rows - self.rows.held
        waiting = sum(len(group.request.prompt) for group in self.waiting[: max(0, min(rows, MOST_LOOKED_AT))])
        return min(waiting, room) + sum(sequence.num_tokens - sequence.computed for sequence in self.prefilling)

    def _hold_until(self, now: int) -> int | None:
        """When the plan behind those in flight should be made, because somebody may still come and be in it; None: now.
        A light tenant's request can be in it although others wait."""
        due = self.ahead.due
        if due <= now:
            return None
        if not self.tenants.is_guarded:
            return due if self.ahead.expects(now) and not self._is_full else None
        if self._light_prompts() or (self.waiting and self.tenants.is_light(self._first(self.waiting))):
            return None
        return due

    def _left_for(self, group: SequenceGroup, draft: Draft) -> int:
        """Chunk tokens of the step that a group may have."""
        if self.tenants.is_guarded and not self.tenants.is_light(group):
            return min(draft.left, draft.left_for_heavy)
        return draft.left

    def _continue_prefills(self, draft: Draft, now: int) -> None:
        """Prompts that are being computed get further chunks, oldest first, or by place in line where that differs.
        Waiting groups with a place before theirs start before they go on."""
        if self.prefilling:
            order = self.prefilling.copy()
            if self._has_order:
                order.sort(key=lambda sequence: self.place(sequence.group))
            for sequence in order:
                if self._has_order and not draft.has_preempted:
                    self._admit_waiting(draft, now, before=sequence.group)
                if draft.left > 0:
                    self._plan_chunk(sequence, draft)
            self.prefilling = [sequence for sequence in self.prefilling if sequence.status is PREFILLING]

    def _resume_preempted(self, draft: Draft, now: int) -> None:
        """Preempted groups come back, by place, once the results of their last steps are in."""
        while self.preempted and draft.left > 0:
            group = self._first(self.preempted)
            if (
                group.resumable_after > self.last_applied
                or not self.rows.has_room(group)
                or self.census.must_be_alone(group)
            ):
                return
            if group.live[0].status is PREEMPTED and self._left_for(group, draft) <= 0:
                return
            if self.waiting and self._passes(self._first(self.waiting), group):
                return
            if group.is_protected and not self._has_reserve(group):
                return
            if group.live[0].status is SWAPPED:
                resumed = self._swap_in(group, draft, now)
            else:
                resumed = self._start(group, draft, now)
            if not resumed:
                return

    def _admit_waiting(self, draft: Draft, now: int, before: SequenceGroup | None = None) -> None:
        """Waiting groups start, by place; none but those that pass the first of the preempted ones, and only those with
        a place before a group's, if one is given."""
        while self.waiting:
            group = self._first(self.waiting)
            if self._left_for(group, draft) <= 0:
                return
            if self.preempted and not self._passes(group, self._first(self.preempted)):
                return
            if before is not None and self.place(group) >= self.place(before):
                return
            if group.resumable_after > self.last_applied:
                return
            if not self.rows.has_room(group) or not self._start(group, draft, now):
                return

    def _commit(self, draft: Draft, now: int, due: int) -> StepPlan | None:
        """Turns the draft into a plan in flight. A draft without work is dropped; releases then wait for the next.
        `due`: when it was to be made."""
        draft.decoding = [] if draft.decodes_sit_out else self.decoding
        computes = bool(draft.decoding or draft.beams or draft.chunk_slots)
        if self.blocks.tier.is_on:
            if computes:
                self.blocks.clean()
            kept = self.blocks.tier.flush()
            if kept:
                draft.add_swap_out(kept)
                draft.cache_blocks_out = len(kept)
        num_out, num_in = len(draft.swap_out), len(draft.swap_in)
        if not (computes or num_out or num_in):
            self.rows.undo_release(draft)
            return None
        if self._beams_in_set or draft.beams:
            self._exchange_beams(draft)
        self.last_step = draft.step
        for blocks, keys in draft.registered:
            self.blocks.register(zip(blocks, keys, strict=False))
        self._sits_out = draft.decodes_sit_out
        if not self._sits_out:
            self.last_decode_step += 1
            for sequence in self.calendar.ending(self.last_decode_step):
                self._expect_end(sequence, draft)
        if num_out or num_in:
            size = self.capacity.block_bytes
            self.costs.planned(num_out * size, num_in * size)
            self.swap_out_blocks_total += num_out
            self.swap_in_blocks_total += num_in
        self.in_flight.append(draft)
        step_ns = 0.0
        decodes, chunks = len(draft.decoding) + len(draft.beams), sum(draft.chunk_tokens)
        self._is_full = bool(self.waiting or self.preempted)
        if self.tenants.is_guarded or self.ahead.expects(now):
            step_ns = self.costs.step_time.ns(decodes, chunks)
        self.ahead.planned(int(step_ns), now, due, has_chunks=bool(draft.chunk_slots))
        if not self.tenants.is_charged:
            self.tenants.note_step(chunks - draft.recomputed_tokens, decodes)
        elif not draft.decodes_sit_out:
            self.tenants.charge_decodes(draft.decoding + draft.beams if draft.beams else draft.decoding)
        return draft.plan(self.epoch)

    def _exchange_beams(self, draft: Draft) -> None:
        """The beams of the plan before leave the decode set, those of this one join it behind everybody else."""
        draft.decode_remove = [slot for slot in self._beams_in_set if slot not in draft.release_slots]
        self._beams_in_set = [sequence.slot for sequence in draft.beams]
        draft.decode_add.extend(self._beams_in_set)

    # ------------------------------------------------------------------ who comes first

    @property
    def _has_order(self) -> bool:
        """Whether there is any other order than that of arrival."""
        return len(self.census.priorities) > 1 or self.tenants.is_shared

    def place(self, group: SequenceGroup) -> Place:
        """A group's place in line; smaller comes first. What a tenant has been served counts among equal priorities."""
        rank = group.rank
        return rank[0], rank[1], self.tenants.served(group), rank

    def _first(self, queue: Line) -> SequenceGroup:
        """Who is first in a queue that is not empty."""
        return queue.first(self.place) if self.tenants.is_shared else queue[0]

    def _passes(self, waiting: SequenceGroup, preempted: SequenceGroup) -> bool:
        """Whether a waiting group may start although a preempted one waits to come back: its priority is higher, or its
        tenant has been served less."""
        return self.place(waiting)[:3] < self.place(preempted)[:3]

    def _displace(self, draft: Draft) -> None:
        """Preempts running groups for the one that is first in line, if that makes room for it."""
        queues = [queue for queue in (self.preempted, self.waiting) if queue]
        if not queues or not self.running:
            return
        claimant = self._first(queues[0])
        if len(queues) > 1 and self._passes(self._first(self.waiting), claimant):
            claimant = self._first(self.waiting)
        if claimant.resumable_after > self.last_applied or self.census.must_be_alone(claimant):
            return
        held = self.rows.by_tenant()
        if not self._may_displace(claimant, held):
            return
        # One more preemption would protect a group, which would then come back before the claimant.
        last = self.config.max_preemptions - 1
        priority, heavier = claimant.request.priority, self.tenants.served_more(claimant)
        takeable = [
            group
            for group in self.running
            if group.preemptions < last and (group.request.priority < priority or group.request.tenant in heavier)
        ]
        if not takeable:
            return
        live = claimant.live
        rows = self.rows.held - len(self.rows.released) + len(live) - self.max_rows
        need = self._blocks_to_start(claimant) + len(self.calendar.due(self.last_decode_step + 1)) + len(self.joining)
        need += sum(len(group.beams) for group in self.moved_beams)
        blocks = (
            need + max(len(live) - 1, self.watermark_blocks, self._headroom(claimant, draft)) - self.blocks.num_free
        )
        if rows > 0 or blocks > 0:
            others = [group for group in takeable if group not in self._resumed]
            for groups in (others, takeable):  # who has just been resumed only if nothing else helps
                victims = choose_to_displace(claimant, groups, held, rows, blocks, self.place, self._sole_blocks)
                for victim in victims:
                    self._preempt(victim, draft)
                if victims:
                    return

    def _may_displace(self, claimant: SequenceGroup, held: dict[str, int]) -> bool:
        """Whether there is a running group that choose_to_displace would take for a claimant. Told from who holds how
        many rows, because it is asked in every step in which somebody waits."""
        priority, own = claimant.request.priority, claimant.request.tenant
        if any(other < priority for _, other in self.rows.by):
            return True
        share = 2 * (held.get(own, 0) + len(claimant.live))
        heavier = self.tenants.served_more(claimant)
        return any(rows > share and tenant in heavier for tenant, rows in held.items())

    def _blocks_to_start(self, group: SequenceGroup) -> int:
        """Blocks that a waiting or preempted group needs to start, at most."""
        live = group.live
        if live[0].status is SWAPPED:
            return sum(len(sequence.table) + 1 for sequence in live)
        if live[0].table.blocks:
            return blocks_for(live[0].num_tokens, self.capacity.block_size)
        found = len(self.blocks.find_prefix(self._findable(live[0])))
        fresh = not live[0].output
        return sum(blocks_for(s.num_tokens, self.capacity.block_size) for s in (live[:1] if fresh else live)) - found

    def _sole_blocks(self, group: SequenceGroup) -> int:
        """Blocks that are free when a group is gone."""
        own: dict[int, int] = {}
        for sequence in group.live:
            for block in sequence.table.blocks:
                own[block] = own.get(block, 0) + 1
        references = self.blocks.pool.references
        return sum(1 for block, count in own.items() if references[block] == count)

    def _has_reserve(self, group: SequenceGroup) -> bool:
        """Whether a protected group and the protected ones that run fit into the pool at their largest. So none of them
        has to yield to another."""
        protected = [group, *(other for other in self.running if other.is_protected)]
        size = self.capacity.block_size
        most = sum(
            len(one.live) * blocks_for(len(one.request.prompt) + one.request.max_tokens, size) for one in protected
        )
        return len(protected) == 1 or most <= self.capacity.num_blocks

    # ------------------------------------------------------------------ prefill

    def _start(self, group: SequenceGroup, draft: Draft, now: int) -> bool:
        """Gives a waiting or recomputed group its blocks and its first chunk. False: there is no room for all of it.

        A fresh group computes its prompt once, in its first sequence; the others are forked when it is complete (those
        of a beam search when its result is in). A group that has output computes every sequence, and the others share
        the full prompt blocks of the first; beams share what full blocks of equal tokens they begin with.
        """
        blocks, size = self.blocks, self.capacity.block_size
        live = group.live
        leader, others = live[0], live[1:]
        if leader.table.blocks:
            return self._start_parked(group, leader, draft, now)
        known = leader.num_tokens
        is_fresh = not leader.output
        keys = self._findable(leader)
        found = blocks.find_prefix(keys)
        shares = self._shares(group, live) if others and not is_fresh else []
        need = blocks_for(known, size) - len(found)
        if shares:
            need += sum(blocks_for(s.num_tokens, size) - shared for s, (_, shared) in zip(others, shares, strict=True))
        # Copy-on-write comes with the next step: no room for it now would be a preemption then.
        soon = len(others) if is_fresh else 0
        if found:
            need += blocks.num_parked(found)
        if not self._has_room(need, max(soon, self._headroom(group, draft))):
            if self._is_empty and blocks.cache.yield_pinned():  # a request goes before a pinned prefix
                return self._start(group, draft, now)
            return self._fail_if_alone(group, now)

        self._leave_queue(group, live)
        kept_keys = self._kept_prefix(keys[len(found) :]) if blocks.tier.is_on else []
        kept = blocks.tier.take(kept_keys) if kept_keys else []
        if found:
            blocks.share_prefix(leader.table, found)
        blocks.extend(leader.table, known)
        if kept:
            draft.add_swap_in(blocks.fill_from_host(leader.table, len(found), kept, kept_keys))
            draft.cache_blocks_in += len(kept)
        leader.computed = (len(found) + len(kept)) * size
        if group.resumable_after and leader.computed_before:  # it ran here, so the cache could have kept its blocks
            self.costs.came_back(leader.computed, leader.computed_before)
        leader.starts_at = 0
        leader.status = PREFILLING
        for sequence in others:
            sequence.status, sequence.follows = PREFILLING, leader
            sequence.computed = known  # of a fresh group: when the leader has got there, it is forked
            sequence.starts_at = NEVER_STARTS
        if shares:
            for sequence, (followed, shared) in zip(others, shares, strict=True):
                sequence.follows = followed
                sequence.table = blocks.fork(followed.table, shared)
                blocks.extend(sequence.table, sequence.num_tokens)
                sequence.computed = shared * size
                if followed.starts_at == 0 and followed.computed >= sequence.computed:
                    sequence.starts_at = 0
        group.lookup_keys = None
        group.offers.clear()  # every beam will offer again
        group.shares_prefix = bool(found or kept)
        if group.shares_prefix:
            draft.sharers.append(group)
        self._count_start(group, leader, len(keys) * size, len(found) * size, len(kept) * size, now)
        for sequence in [leader] if is_fresh else live:
            if draft.left > 0:
                self._plan_chunk(sequence, draft)
            if sequence.status is PREFILLING:
                self.prefilling.append(sequence)
        return True

    def _start_parked(self, group: SequenceGroup, leader: Sequence, draft: Draft, now: int) -> bool:
        """A continued sequence gets its KV back from the arena, and computes what has been appended."""
        known = leader.num_tokens
        if not self._has_room(blocks_for(known, self.capacity.block_size), 0):
            if self._is_empty and self.blocks.cache.yield_pinned():
                return self._start_parked(group, leader, draft, now)
            return self._fail_if_alone(group, now)
        self._leave_queue(group, [leader])
        moves = self.blocks.swap_in([leader.table], [leader.computed // self.capacity.block_size])
        draft.add_swap_in(moves)
        group.swapped_bytes += len(moves) * self.capacity.block_bytes
        self.blocks.extend(leader.table, known)
        leader.starts_at = 0
        leader.status = PREFILLING
        group.lookup_keys = None
        group.shares_prefix = False
        self._count_start(group, leader, 0, 0, 0, now)  # its own KV, not the prefix cache's
        self._plan_chunk(leader, draft)
        if leader.status is PREFILLING:
            self.prefilling.append(leader)
        return True

    def _shares(self, group: SequenceGroup, live: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Of a group that has output: for every sequence but the first whose blocks it shares, and how many."""
        size = self.capacity.block_size
        if group.search is not None:
            return beams.common_beginnings(live, size)
        return [(live[0], len(group.request.prompt) // size)] * (len(live) - 1)

    def _kept_prefix(self, keys: list[bytes]) -> list[bytes]:
        """Keys of blocks in the host tier to copy in, if that is cheaper than computing them."""
        kept, size = self.blocks.tier.find(keys), self.capacity
        if kept and self.costs.prefers_copy_in(len(kept) * size.block_bytes, len(kept) * size.block_size):
            return kept
        return []

    def _count_start(
        self, group: SequenceGroup, leader: Sequence, queried: int, found: int, from_host: int, now: int
    ) -> None:
        """Counts a group's start, with the tokens looked up in the prefix cache and those found in each tier."""
        if group.started_at is None:
            group.started_at = now
            self.groups_started_total += 1
            group.cached_tokens = leader.computed
            self.prompt_tokens_total += len(group.request.prompt)
            self.query_tokens_total += queried
            self.hit_tokens_total += found
            self.host_hit_tokens_total += from_host
        else:
            self._resumed.add(group)
        if group.request.prompt_logprobs is None:
            self._announce(group)
        elif not group.announced:
            group.prompt_logprobs = ()  # they start over with the prompt

    def _findable(self, leader: Sequence) -> list[bytes]:
        """Keys of the blocks that a group that starts with this sequence may find in the prefix cache."""
        return lookup_keys(leader, self.capacity.block_size) if self.config.prefix_cache else []

    def _plan_chunk(self, sequence: Sequence, draft: Draft) -> None:
        """Computes as many further known tokens of a sequence as the budget allows. The last chunk samples."""
        group = sequence.group
        if sequence.starts_at > draft.step or (draft.serves_light_tenants and not self.tenants.is_light(group)):
            return
        size = self.capacity.block_size
        start, known = sequence.computed, sequence.num_tokens
        left = self._left_for(group, draft)
        if left <= 0:
            return
        end = min(known, start + left)
        draft.left_for_heavy -= end - start
        if not sequence.has_row:
            draft.new_sequences.append(self._new_row(sequence, start))
        draft.add_chunk(sequence, end - start)
        sequence.computed = end
        if start < sequence.computed_before:
            again = min(end, sequence.computed_before) - start
            group.recomputed_tokens += again
            draft.recomputed_tokens += again
        if self.tenants.is_charged:
            draft.serves_light_tenants = draft.serves_light_tenants or self.tenants.is_light(group)
            self.tenants.charge_prompt(group, max(0, end - max(start, sequence.computed_before)))
        if self.config.prefix_cache:
            keys = prompt_keys(group, size)
            covered = slice(start // size, end // size)
            draft.registered.append((sequence.table.blocks[covered], keys[covered]))
        if len(group.sequences) > 1:
            self._unblock(sequence, draft)
        if end == known:
            draft.sampling.append(sequence)
            self._after_prefill(sequence, draft)
            if not sequence.output and len(group.sequences) > 1 and group.search is None:
                for other in group.live:
                    if other is not sequence:
                        self._fork(sequence, other, draft)

    def _unblock(self, followed: Sequence, draft: Draft) -> None:
        """Lets the others of a recomputed group start in the next step, when the blocks that they share have been
        computed in this one."""
        for other in followed.group.sequences:
            if other.starts_at == NEVER_STARTS and other.follows is followed and followed.computed >= other.computed:
                other.starts_at = draft.step + 1

    def _fork(self, parent: Sequence, child: Sequence, draft: Draft) -> None:
        child.table = self.blocks.fork(parent.table)
        child.computed = parent.computed
        child.starts_at = 0
        self.rows.take(child)
        draft.forks.append(Fork(parent.slot, child.slot, child.index))
        draft.forked.append(child)
        self._after_prefill(child, draft)

    def _after_prefill(self, sequence: Sequence, draft: Draft) -> None:
        """All known tokens are computed and one is sampled: the sequence decodes from the next step on, if any."""
        sequence.status = RUNNING
        if sequence.group.search is not None:
            return  # the result says how it goes on
        if len(sequence.output) + 1 >= sequence.request.max_tokens:
            self._expect_end(sequence, draft)
        else:
            self.joining.append(sequence)

    def _new_row(self, sequence: Sequence, computed: int) -> NewSequence:
        self.rows.take(sequence)
        group = sequence.group
        return NewSequence(
            slot=sequence.slot,
            token_ids=sequence.token_ids,
            prompt_tokens=len(group.request.prompt),
            computed_tokens=computed,
            blocks=sequence.table.blocks.copy(),
            index=sequence.index,
            request=group.request,
            logprobs=group.request.logprobs if group.search is None else group.search.num_candidates,
            prompt_logprobs=None if group.announced else group.request.prompt_logprobs,
        )

    # ------------------------------------------------------------------ decode

    def _leave_decode(self, sequence: Sequence) -> None:
        if self.calendar.leave(sequence, self.last_decode_step):
            self._decoding_changed = True

    def _expect_end(self, sequence: Sequence, draft: Draft) -> None:
        """The draft samples a sequence's last token by length: its row goes with the next plan, its blocks with the
        result, when all its tokens are known and the prefix cache can have them."""
        self._leave_decode(sequence)
        self.rows.give_back(sequence)
        sequence.status = ENDING
        self.ending[sequence] = None
        draft.ending.append(sequence)
        self._update_running(sequence.group)

    def _must_copy(self, sequence: Sequence) -> bool:
        """Whether the position that a joining sequence writes first is in a block that it shares."""
        index, offset = divmod(sequence.computed, self.capacity.block_size)
        return offset > 0 and self.blocks.is_shared(sequence.table, index)

    def _copy_on_write(self, sequence: Sequence, draft: Draft) -> None:
        index = sequence.computed // self.capacity.block_size
        moved = self.blocks.make_private(sequence.table, index)
        if moved is not None:
            draft.add_copy(sequence.slot, index, *moved)

    # ------------------------------------------------------------------ preemption

    def _needs(self, due: Iterable[Sequence], copying: Iterable[Sequence]) -> dict[SequenceGroup, int]:
        """Blocks that each group needs in this step."""
        needs = {group: beams.blocks_to_write(group, self.blocks.block_size) for group in self.moved_beams}
        for sequence in due:
            needs[sequence.group] = needs.get(sequence.group, 0) + 1
        last_blocks = set()
        for sequence in copying:
            needs[sequence.group] = needs.get(sequence.group, 0) + 1
            last_blocks.add((sequence.group, sequence.table.blocks[sequence.computed // self.capacity.block_size]))
        for group, block in last_blocks:  # the last one that shares a block keeps it
            holders = sum(1 for s in copying if s.group is group and block in s.table.blocks)
            if holders == self.blocks.pool.references[block]:
                needs[group] -= 1
        return needs

    def _make_room(self, needs: dict[SequenceGroup, int], draft: Draft, now: int) -> None:
        """Frees blocks until every group that goes on has what it needs, those that rank first before the others.
        A victim never has a place before the group it yields to, so nothing that has been promised is taken back."""
        promised = 0
        for group in sorted(needs, key=self.place):
            need = needs[group]
            while group in self.running and promised + need > self.blocks.num_free:
                if self.ending:
                    self._reclaim_ending()
                    continue
                victim = choose_victim(group, self.running, self._resumed, self.place)
                if victim is None and self.blocks.cache.yield_pinned():
                    continue
                if victim is None:
                    message = (
                        f"the request has outgrown the KV pool of {self.capacity.num_blocks} blocks of "
                        f"{self.capacity.block_size} tokens"
                    )
                    self.fail(group, StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_EXHAUSTED", message, now)
                else:
                    self._preempt(victim, draft)
                    draft.has_preempted = True
            if group in self.running:
                promised += need

    def _reclaim_ending(self) -> None:
        """Takes the blocks of sequences that only wait for their last token; the prefix cache will not have them."""
        for sequence in self.ending:
            self.blocks.free(sequence.table)
        self.ending.clear()

    def _preempt(self, victim: SequenceGroup, draft: Draft) -> None:
        """Takes a whole group off the worker, by copying its KV out or by forgetting it."""
        live = [sequence for sequence in victim.live if sequence.status is not ENDING]
        mode = self._preemption_mode(live)
        self._resumed.clear()
        self.preemptions_total[mode] += 1
        victim.preemptions += 1
        if victim.preemptions >= self.config.max_preemptions:
            victim.protect()
        if mode == "swap":
            for sequence in live:
                self._leave_decode(sequence)
                self.rows.give_back(sequence)
                sequence.status = SWAPPED
            moves = self.blocks.swap_out([sequence.table for sequence in live])
            draft.add_swap_out(moves)
            victim.swapped_bytes += len(moves) * self.capacity.block_bytes
            self._set_aside(victim)
        else:
            self._forget_kv(victim, keep_blocks_findable=True)

    def _forget_kv(self, group: SequenceGroup, *, keep_blocks_findable: bool) -> None:
        """Puts a group among those to be recomputed. Sequences that only wait for their last token go on waiting."""
        for sequence in group.live:
            if sequence.status is not ENDING:
                if keep_blocks_findable and sequence.status is RUNNING:
                    self._register_output(sequence)
                self._detach(sequence)
                sequence.forget_computed()
                sequence.starts_at = 0
                sequence.status = PREEMPTED
        self.prefilling = [sequence for sequence in self.prefilling if sequence.status is PREFILLING]
        self._set_aside(group)

    def _set_aside(self, group: SequenceGroup) -> None:
        group.resumable_after = self.last_step
        self.running.pop(group, None)
        self.moved_beams.pop(group, None)
        if group not in self.preempted:
            self.preempted.enter(group)

    def _preemption_mode(self, live: list[Sequence]) -> str:
        """Swap or recompute. Whoever is still being prefilled is recomputed: it has no output to lose, and what it
        has computed of its prompt is in the prefix cache."""
        num_blocks = self.blocks.swap_out_need(sequence.table for sequence in live)
        num_bytes = num_blocks * self.capacity.block_bytes
        references = self.blocks.pool.references
        size = self.capacity.block_size
        own: dict[int, int] = {}
        for sequence in live:
            for block in sequence.table.blocks:
                own[block] = own.get(block, 0) + 1
        # Blocks that another group refers to as well will still be there to be found.
        held = sum(1 for block, count in own.items() if references[block] > count and block in self.blocks.cache)
        tokens = max(0, num_blocks - held) * size
        possible = num_blocks <= self.blocks.tier.num_available and all(s.status is RUNNING for s in live)
        wanted = self.config.preemption_mode
        swap = possible and (wanted == "swap" or (wanted == "auto" and self.costs.prefers_swap(num_bytes, tokens)))
        mode = "swap" if swap else "recompute"
        predicted = self.costs.swap_ns(num_bytes) if swap else self.costs.recompute_ns(tokens)
        self.predicted_ns[mode] += predicted or 0
        return mode

    def _swap_in(self, group: SequenceGroup, draft: Draft, now: int) -> bool:
        """Copies a group's KV back and lets it decode in this very step. False: there is no room for all of it."""
        live, size = group.live, self.capacity.block_size
        if draft.left < len(live):
            return False
        tables = [sequence.table for sequence in live]
        num_full = [sequence.computed // size for sequence in live]
        need = self.blocks.swap_in_need(tables, num_full)
        need += sum(1 for sequence in live if sequence.computed % size == 0)
        if not self._has_room(need, 0):
            if self._is_empty and self.blocks.cache.yield_pinned():
                return self._swap_in(group, draft, now)
            return self._fail_if_alone(group, now)
        self._leave_queue(group, live)
        self._resumed.add(group)
        moves = self.blocks.swap_in(tables, num_full)
        draft.add_swap_in(moves)
        group.swapped_bytes += len(moves) * self.capacity.block_bytes
        for sequence in live:
            sequence.status = RUNNING
            self.blocks.extend(sequence.table, sequence.computed + 1)
            draft.new_sequences.append(self._new_row(sequence, sequence.computed))
            if group.search is not None:
                self._decode_beam(sequence, draft)
            else:
                draft.decode_add.append(sequence.slot)
                self.calendar.enter(sequence, self.last_decode_step + 1)
        if group.search is None:
            self.decoding = self.decoding + live
        draft.left -= len(live)
        return True

    def _is_confirmed(self, sequence: Sequence) -> bool:
        """Whether results have confirmed the KV of all accepted tokens but the last."""
        if sequence.status is PREFILLING or not sequence.table.blocks:
            return False
        return not any(
            sequence is other for flight in self.in_flight for other in (*flight.chunks.values(), *flight.forked)
        )

    # ------------------------------------------------------------------ room

    def _has_room(self, need: int, soon: int) -> bool:
        """Whether `need` blocks can be taken so that `soon` more and the watermark stay free. Whoever would be alone
        may take everything."""
        free = self.blocks.num_free
        return need + max(soon, self.watermark_blocks) <= free or (need <= free and self._is_empty)

    def _headroom(self, group: SequenceGroup, draft: Draft) -> int:
        """Blocks that stay free for the growth of those who run when a group begins. One that was preempted has begun
        long ago: it comes back as soon as it fits.

        How long outputs get is not known. On average the blocks of those who end are as many as the others take; by how
        far a moment differs from that grows with the root of the number of sequences, not with their number. No more
        than what the outputs so far hold: long prompts with short answers need no such room."""
        if group.preemptions or not self.rows.held:
            return 0
        if self._grown[0] != draft.step:
            tokens = sum(len(sequence.output) for group in self.running for sequence in group.live)
            self._grown = draft.step, tokens / self.capacity.block_size
        grown = self._grown[1]
        if not grown:
            return 0
        return int(min(self.config.headroom * self.blocks.num_used, grown) / math.sqrt(self.rows.held))

    @property
    def _is_empty(self) -> bool:
        """Nobody holds KV blocks."""
        return self.blocks.num_used == 0

    def _fail_if_alone(self, group: SequenceGroup, now: int) -> bool:
        """The queue goes on behind a group that does not fit into an empty pool, which therefore fails."""
        if not self._is_empty:
            return False
        message = (
            f"the request no longer fits into the KV pool of {self.capacity.num_blocks} blocks of "
            f"{self.capacity.block_size} tokens"
        )
        self.fail(group, StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_EXHAUSTED", message, now)
        return True

    def _leave_queue(self, group: SequenceGroup, live: list[Sequence]) -> None:
        """A waiting or preempted group starts to run: it has rows from now on."""
        (self.waiting if live[0].status is WAITING else self.preempted).leave(group)
        self.running[group] = None
        self.rows.promise(group, len(live))

    # ------------------------------------------------------------------ results

    def apply(self, result: StepResult, now: int) -> StepOutput | None:
        """Accepts the result of a plan in flight, once; None: it is stale. One that overtook another waits for it."""
        flights = self.in_flight
        if result.epoch != self.epoch or not self.last_applied < result.step <= self.last_applied + len(flights):
            return None
        if result.step in self._early:
            return None
        if result.step != self.last_applied + 1:
            self._early[result.step] = result
            return StepOutput(accepted=False)
        output = self._apply_next(result, now)
        while (following := self._early.pop(self.last_applied + 1, None)) is not None:
            output = output.followed_by(self._apply_next(following, now))
        return output

    def _apply_next(self, result: StepResult, now: int) -> StepOutput:
        flight = self.in_flight[0]
        rows, tokens = flight.rows, result.token_ids
        check_result(flight, rows, result)
        self.in_flight.popleft()
        self.last_applied = flight.step
        self._result_at, timings = now, result.timings
        self.ahead.applied(now, timings)
        self._learn(flight, result)
        if flight.idle_since is not None:
            self.gathering.observe(now - flight.idle_since - timings.step_ns, timings.step_ns)
        if result.nonfinite_rows or result.out_of_memory_slots:
            self._drop_failed_rows(flight, rows, result, now)
        position_of: dict[int, int] | None = None  # of a row among the accepted ones; None: all are
        searching: list[SequenceGroup] = []
        if flight.searches:
            searching = self._take_offers(flight, rows, result)
        if flight.dropped or flight.searches:
            kept = [row for row, s in enumerate(rows) if s not in flight.dropped and s.group.search is None]
            position_of = {row: position for position, row in enumerate(kept)}
            rows, tokens = [rows[row] for row in kept], [tokens[row] for row in kept]
        for sequence, token in zip(rows, tokens, strict=True):
            sequence.output.append(token)
        self.generation_tokens_total += len(tokens)
        logprobs: dict[int, TokenLogprobs] = {}
        for row, entry in zip(result.logprob_rows, result.logprobs, strict=True):
            position = row if position_of is None else position_of.get(row)
            if position is not None:
                rows[position].add_logprobs(entry)
                logprobs[position] = entry
        first_tokens = self._note_first_tokens(flight, result, now) if flight.chunks else []
        if not self.census.stop_tokens.keys().isdisjoint(tokens):
            self._end_stopped(rows, tokens, now)
        for sequence in flight.ending:
            if sequence.finish is None and sequence not in flight.dropped:
                self._withdraw(sequence, keep_blocks_findable=True, keep_kv=sequence.request.hold_ns > 0)
                self._end(sequence, FinishReason.LENGTH, now)
        output = StepOutput(True, rows, tokens, logprobs, first_tokens=first_tokens)
        for group in searching:
            if len(group.offers) == len(group.beams):
                output = self._advance_search(group, output, now)
        if self.census.suspects:
            self.census.acquit()
        return output

    def _take_offers(self, flight: Draft, rows: list[Sequence], result: StepResult) -> list[SequenceGroup]:
        """Notes what the beams of this step have offered; returns their groups."""
        groups: dict[SequenceGroup, None] = {}
        for row, offer in zip(result.logprob_rows, result.logprobs, strict=True):
            sequence = rows[row]
            if sequence.group.search is not None and sequence not in flight.dropped:
                sequence.group.offers[sequence] = offer
                groups[sequence.group] = None
        return list(groups)

    def _advance_search(self, group: SequenceGroup, output: StepOutput, now: int) -> StepOutput:
        """Chooses the beams of a search's next step, or ends it and tells its answers."""
        moves = beams.advance(group, self.blocks)
        if moves:
            if group in self.running:
                self.moved_beams[group] = moves
            return output
        search = group.search
        assert search is not None
        answers = search.finished[: group.request.n]
        told = StepOutput()
        if group.first_token_at is None:
            group.first_token_at = now
            told.first_tokens.append(group)
        for sequence in group.live:
            self._withdraw(sequence, keep_blocks_findable=False)
            sequence.starts_at = 0
        for sequence, answer in zip(group.sequences, answers, strict=False):
            sequence.output, sequence.logprobs = answer.hypothesis.tokens, answer.hypothesis.logprobs
            told.logprobs.update(enumerate(sequence.logprobs, len(told.token_ids)))
            told.sequences.extend([sequence] * len(sequence.output))
            told.token_ids.extend(sequence.output)
        self.generation_tokens_total += len(told.token_ids)
        for sequence in group.last_ones_first:
            if sequence.is_answer:
                found = answers[sequence.index]
                reason = FinishReason.LENGTH if found.stop_token is None else FinishReason.STOP
                self._end(sequence, reason, now, matched_token_id=found.stop_token, logprob=found.hypothesis.logprob)
            else:
                self._end(sequence, FinishReason.LENGTH, now)
        return output.followed_by(replace(told, num_searched=len(told.token_ids)))

    def _learn(self, flight: Draft, result: StepResult) -> None:
        size, timings = self.capacity.block_bytes, result.timings
        if flight.recomputed_tokens:
            self.actual_ns["recompute"] += self.costs.recomputing_ns(flight.recomputed_tokens, timings)
        if flight.swap_out is NO_MOVES and flight.swap_in is NO_MOVES:  # nearly always
            self.costs.learn(0, 0, timings)
            return
        self.costs.learn(len(flight.swap_out) * size, len(flight.swap_in) * size, timings)
        for moves, of_cache, took_ns in (
            (flight.swap_out, flight.cache_blocks_out, timings.swap_out_ns),
            (flight.swap_in, flight.cache_blocks_in, timings.swap_in_ns),
        ):
            if moves:  # the cache's copies are nobody's preemption
                self.actual_ns["swap"] += took_ns * (len(moves) - of_cache) // len(moves)

    def _note_first_tokens(self, flight: Draft, result: StepResult, now: int) -> list[SequenceGroup]:
        """What only steps with chunks bring: prompt log-probabilities, and the groups that have their first token."""
        first_tokens = []
        for entry in result.prompt_logprobs:
            sequence = flight.chunks[entry.slot]
            if not flight.ignores(sequence.group):
                sequence.group.prompt_logprobs += tuple(entry.logprobs)
        for sequence in flight.sampling + flight.forked:
            if sequence not in flight.dropped:
                if sequence.group.first_token_at is None and sequence.group.search is None:
                    sequence.group.first_token_at = now
                    first_tokens.append(sequence.group)
                self._announce(sequence.group)
        return first_tokens

    def _announce(self, group: SequenceGroup) -> None:
        if not group.announced:
            group.announced = True
            self._emit(Admitted(group))

    def _end_stopped(self, rows: list[Sequence], tokens: list[int], now: int) -> None:
        for sequence, token in zip(rows, tokens, strict=True):
            if token in sequence.stop_ids and len(sequence.output) > sequence.request.min_tokens:
                self._withdraw(sequence, keep_blocks_findable=True, keep_kv=sequence.request.hold_ns > 0)
                self._end(sequence, FinishReason.STOP, now, matched_token_id=token)

    def _drop_failed_rows(self, flight: Draft, rows: list[Sequence], result: StepResult, now: int) -> None:
        """Fails the requests whose rows could not be computed. Blocks that they had made findable hold garbage: they
        are forgotten, and whoever has started on them since starts over."""
        starved = set(result.out_of_memory_slots)
        failed = [s for s in {*rows, *flight.chunks.values()} if s.slot in starved]
        nonfinite = [rows[row] for row in result.nonfinite_rows]
        for sequence in sorted({*failed, *nonfinite}, key=lambda s: (s.group.arrival, s.index)):
            group = sequence.group
            keys = group.prompt_hashes or []
            self.blocks.forget(keys)
            for later in self.in_flight:
                for sharer in later.sharers:
                    if (
                        keys
                        and sharer is not group
                        and not later.ignores(sharer)
                        and (sharer.prompt_hashes or [b""])[0] == keys[0]
                    ):
                        self._start_over(sharer)
            # A chunk is also the others' business: they are forked from it, or share its blocks.
            is_chunk = flight.chunks.get(sequence.slot) is sequence
            if group.is_finished or flight.ignores(group) or (sequence in flight.dropped and not is_chunk):
                continue
            flight.dropped.update(group.sequences)
            if sequence in failed:
                message = "the worker had no memory left for this request"
                self.fail(group, StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", message, now)
            elif group.shares_prefix and group.cache_allowed:
                # Perhaps not its own fault: once more, on blocks of its own.
                group.cache_allowed = False
                self._start_over(group)
            else:
                message = "the model's output for this request was not finite"
                self.fail(group, StatusCode.INTERNAL, "NONFINITE_LOGITS", message, now)

    def _start_over(self, group: SequenceGroup) -> None:
        """Recomputes a live group from its accepted tokens; what is in flight for it does not count."""
        if group.is_finished:
            return
        for later in self.in_flight:
            later.dropped.update(group.sequences)
        self.blocks.forget(group.prompt_hashes or [])
        for sequence in group.live:
            if sequence.status is ENDING:
                self._detach(sequence)
                sequence.status = PREEMPTED
        self._forget_kv(group, keep_blocks_findable=False)

    # ------------------------------------------------------------------ ends

    def _withdraw(self, sequence: Sequence, *, keep_blocks_findable: bool, keep_kv: bool = False) -> None:
        """Takes a live sequence out of wherever it is: its row goes with the next plan, its blocks are free now, and
        tokens that are in flight for it will be dropped. With `keep_kv` it keeps blocks that are worth keeping until
        its group ends, if that may be continued."""
        if keep_blocks_findable and sequence.status in (RUNNING, ENDING):
            self._register_output(sequence)
        if sequence.status is PREFILLING:
            self.prefilling = [other for other in self.prefilling if other is not sequence]
        keep_kv = keep_kv and self._is_confirmed(sequence)
        self._detach(sequence, keep_kv=keep_kv)
        for flight in self.in_flight:
            flight.dropped.add(sequence)

    def _detach(self, sequence: Sequence, *, keep_kv: bool = False) -> None:
        """Takes a sequence off the calendars and gives back its row and its blocks."""
        self._leave_decode(sequence)
        if sequence.status is RUNNING or sequence.status is PREFILLING:
            self.rows.give_back(sequence)
        elif sequence.status is ENDING:
            self.ending.pop(sequence, None)
        if not keep_kv:
            self.blocks.free(sequence.table)

    def _register_output(self, sequence: Sequence) -> None:
        """Makes the full blocks behind the prompt's findable, as far as results have confirmed their KV: all accepted
        tokens but the last."""
        if self.config.prefix_cache and sequence.table.blocks and not sequence.table.on_host:
            size = self.capacity.block_size
            first = len(sequence.group.request.prompt) // size
            keys = output_keys(sequence, sequence.num_tokens - 1, size)
            self.blocks.register(zip(sequence.table.blocks[first:], keys, strict=False))

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: int,
        *,
        matched_stop: str = "",
        matched_token_id: int | None = None,
        logprob: float | None = None,
    ) -> None:
        """Marks a withdrawn sequence as finished."""
        group = sequence.group
        sequence.end(
            reason, now, matched_stop=matched_stop, matched_token_id=matched_token_id, cumulative_logprob=logprob
        )
        self.assigned_sequences -= 1
        group.lookup_keys = None  # they may have been this sequence's
        if sequence.is_answer:
            self._emit(Finished(sequence))
        if group.is_finished:
            self._remove_finished(group)
        elif any(other.starts_at == NEVER_STARTS for other in group.live):
            self._forget_kv(group, keep_blocks_findable=False)  # nobody is left to compute the blocks they wait for
        else:
            self._update_running(group)

    def _update_running(self, group: SequenceGroup) -> None:
        """A group whose sequences only wait for their last tokens needs no further step."""
        if group in self.running and not any(s.status in (PREFILLING, RUNNING, WAITING) for s in group.live):
            del self.running[group]

    def _remove_finished(self, group: SequenceGroup) -> None:
        self.running.pop(group, None)
        self.moved_beams.pop(group, None)
        self._resumed.discard(group)
        (self.waiting if group.started_at is None else self.preempted).leave(group)
        self._forget_group(group)
        group.resumable_after = self.last_step
        group.parked_epoch = self.epoch
        if group.keep_until is not None:  # it may run elsewhere before the next plan: no trace of it stays
            self.joining = [sequence for sequence in self.joining if sequence.status is RUNNING]
            self.decoding = [sequence for sequence in self.decoding if sequence.status is RUNNING]
        self.parked.take_in(group)

    def _forget_group(self, group: SequenceGroup) -> None:
        del self.groups[group]
        self.tenants.leave(group)
        self.census.leave(group)
        group.worker_id = None
        self.assigned_sequences -= len(group.live)
