"""Preemption: who has to go, and whether its KV is copied to the host arena or computed again.

The two costs are predicted from live figures. For a group with `bytes` of KV and `tokens` computed tokens:

    swap       (pending copies out + bytes) / rate out + (pending copies in + bytes) / rate in
    recompute  tokens that the prefix cache will not hold / marginal prefill rate

Rates start from what the worker measured and are then learned from step results (docs/decisions/0051-*); so is the
share of a recomputed group's tokens that the prefix cache still has when it comes back. Blocks that another group holds
stay in any case and are not counted. The mode changes only for a gain of HYSTERESIS, so that two equal costs do not
alternate. This is the choice that the PagedAttention paper leaves to the operator (section 4.5, figure 19).

Why this ends. A group yields only to itself or to a group with a place before it; the head of all never yields, so it
runs to its end. Whoever has been preempted `max_preemptions` times is protected: it comes before everybody else, comes
back only when all protected groups fit at their largest, and so is never preempted again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from scheduler.policy import TransferRates
from scheduler.sequence import SequenceGroup
from scheduler.step_plan import StepTimings
from scheduler.step_time import StepTime

Place = tuple[int, int, int, tuple[int, int, int, int]]
"""A group's place in line: 0 if protected, negative priority, what its tenant has been served, rank."""

MEMORY = 0.9
"""How much of the past a rate keeps per observation."""
FORGOTTEN_AFTER = 1000
"""Results without a copy after which the rate of copies is again what the worker measured at its start: some ten
seconds of decoding."""
HYSTERESIS = 0.1
"""How much cheaper than the mode chosen last the other one must be."""


def choose_victim(
    needer: SequenceGroup,
    running: Iterable[SequenceGroup],
    resumed: Collection[SequenceGroup],
    place: Callable[[SequenceGroup], Place],
) -> SequenceGroup | None:
    """Who gives up its blocks for `needer`: the group with the last place, never one that comes before the needer,
    never the head of all, and a group that was resumed since the last preemption only if there is no other. The needer
    itself may be the answer. None: it is alone."""
    groups = list(running)
    head = min(groups, key=place)
    own = place(needer)
    candidates = [group for group in groups if group is not head and place(group) >= own]
    unprotected = [group for group in candidates if group not in resumed]
    return max(unprotected or candidates, key=place, default=None)


def choose_to_displace(
    claimant: SequenceGroup,
    running: Iterable[SequenceGroup],
    rows_held: dict[str, int],
    rows: int,
    blocks: int,
    place: Callable[[SequenceGroup], Place],
    blocks_of: Callable[[SequenceGroup], int],
) -> list[SequenceGroup]:
    """Running groups to preempt so that a claimant that is not running gets `rows` rows and `blocks` blocks: the last
    in line first, as few as will do, and none if all that may be taken is not enough.

    A lower priority may be taken. So may an equal one of a tenant that has been served more and still has, without it,
    twice as many rows as the claimant's tenant will have (`rows_held`: rows by tenant). Both are one-way: nobody can
    take back in the same manner what was taken. Protected groups are never taken."""
    own = place(claimant)
    held = dict(rows_held)
    share = 2 * (held.get(claimant.request.tenant, 0) + len(claimant.live))
    chosen: list[SequenceGroup] = []
    for group in sorted(running, key=place, reverse=True):
        if rows <= 0 and blocks <= 0:
            return chosen
        theirs, size, tenant = place(group), len(group.live), group.request.tenant
        if theirs[0] == 0 or theirs[1] < own[1]:
            continue
        if theirs[1] == own[1]:
            if theirs[2] <= own[2] or held[tenant] - size < share:
                continue
            held[tenant] -= size
        chosen.append(group)
        rows -= size
        blocks -= blocks_of(group)
    return chosen if rows <= 0 and blocks <= 0 else []


class LearnedRate:
    """Units per second: a decaying mean of what was observed, in which a large observation weighs more than a small.

    Of speeds and not of times: a copy that a busy host began late looks a hundred times slower than the bus is. Among
    ten it lowers a mean of speeds by a tenth; it would multiply a mean of times by ten.
    """

    __slots__ = ("_start", "_units", "_unobserved", "_weighed")

    def __init__(self, start: float) -> None:
        self._start = start  # holds while nothing is learned; 0: unknown
        self._units = 0.0
        self._weighed = 0.0  # sum of units times their speed
        self._unobserved = 0  # results since the last observation

    def observe(self, units: int, nanoseconds: int) -> None:
        """What a result tells. Nothing, FORGOTTEN_AFTER times in a row: the start holds again, or a rate so low that
        nobody copies any more could never be found to be wrong."""
        if units > 0 and nanoseconds > 0:
            self._units = MEMORY * self._units + units
            self._weighed = MEMORY * self._weighed + units * (units * 1e9 / nanoseconds)
            self._unobserved = 0
        elif self._units:
            self._unobserved += 1
            if self._unobserved == FORGOTTEN_AFTER:
                self._units = self._weighed = 0.0
                self._unobserved = 0

    @property
    def per_second(self) -> float:
        """0: unknown."""
        return self._weighed / self._units if self._units else self._start


class CostModel:
    """Predicts what a preemption costs, in nanoseconds."""

    __slots__ = ("_found", "_swapped_last", "pending_in_bytes", "pending_out_bytes", "step_time", "swap_in", "swap_out")

    def __init__(self, rates: TransferRates) -> None:
        self.swap_out = LearnedRate(rates.swap_out_bytes_per_second)
        self.swap_in = LearnedRate(rates.swap_in_bytes_per_second)
        self.step_time = StepTime(rates.prefill_tokens_per_second, rates.chunk_steps)
        self.pending_out_bytes = 0  # in plans whose results are not in yet
        self.pending_in_bytes = 0
        self._found = (0.0, 1.0)  # tokens that the prefix cache still had, of tokens; decaying
        self._swapped_last = True  # cheaper on most machines

    def swap_ns(self, num_bytes: int) -> int | None:
        """Time to copy `num_bytes` out and in again, behind the pending copies. None: a rate is unknown."""
        rate_out, rate_in = self.swap_out.per_second, self.swap_in.per_second
        if not rate_out or not rate_in:
            return None
        seconds = (self.pending_out_bytes + num_bytes) / rate_out + (self.pending_in_bytes + num_bytes) / rate_in
        return round(seconds * 1e9)

    def recompute_ns(self, num_tokens: int) -> int | None:
        """What computing `num_tokens` again, as far as they will not be found, adds to steps that run anyway, and what
        makes one of them a step with a chunk. None: the rate is unknown."""
        rate = self.step_time.prefill_tokens_per_second
        found, of = self._found
        if not rate:
            return None
        return round(num_tokens * (1 - found / of) / rate * 1e9 + self.step_time.first_chunk_ns(0))

    def prefers_swap(self, num_bytes: int, num_tokens: int) -> bool:
        """The cheaper of the two, or the one chosen last if that is about as cheap; swap while figures are missing."""
        swap_ns, recompute_ns = self.swap_ns(num_bytes), self.recompute_ns(num_tokens)
        if swap_ns is None or recompute_ns is None:
            return True
        swap_factor, recompute_factor = (1, 1 + HYSTERESIS) if self._swapped_last else (1 + HYSTERESIS, 1)
        self._swapped_last = swap_ns * swap_factor <= recompute_ns * recompute_factor
        return self._swapped_last

    def prefers_copy_in(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether copying a kept prefix in is cheaper than computing it; yes while figures are missing."""
        rate_in, rate = self.swap_in.per_second, self.step_time.prefill_tokens_per_second
        return not rate_in or not rate or (self.pending_in_bytes + num_bytes) / rate_in <= num_tokens / rate

    def is_worth_keeping(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether copying a block out and in again is cheaper than computing it again; yes while figures are missing.
        Not every kept block comes back, so on a slow link keeping is never worth it."""
        rate_out, rate_in = self.swap_out.per_second, self.swap_in.per_second
        rate = self.step_time.prefill_tokens_per_second
        if not rate_out or not rate_in or not rate:
            return True
        return num_bytes / rate_out + num_bytes / rate_in <= num_tokens / rate

    def came_back(self, found_tokens: int, num_tokens: int) -> None:
        """A recomputed group with `num_tokens` computed before comes back: so many of them need not be computed."""
        found, of = self._found
        self._found = MEMORY * found + min(found_tokens, num_tokens), MEMORY * of + num_tokens

    def planned(self, out_bytes: int, in_bytes: int) -> None:
        """A plan with these copies has been made."""
        self.pending_out_bytes += out_bytes
        self.pending_in_bytes += in_bytes

    def recomputing_ns(self, num_tokens: int, timings: StepTimings) -> int:
        """What computing `num_tokens` chunk tokens again has added to a step: its time beyond that of the step without
        them, or their share of its tokens while no other step is known."""
        forward = timings.forward_ns
        without = self.step_time.ns(timings.decode_tokens, timings.chunk_tokens - num_tokens)
        if timings.decode_tokens + timings.chunk_tokens == num_tokens or not without:
            return forward * num_tokens // max(1, timings.decode_tokens + timings.chunk_tokens)
        return max(0, forward - round(without))

    def learn(self, out_bytes: int, in_bytes: int, timings: StepTimings) -> None:
        """The result of a plan with these copies is in."""
        self.pending_out_bytes -= out_bytes
        self.pending_in_bytes -= in_bytes
        self.swap_out.observe(out_bytes, timings.swap_out_ns)
        self.swap_in.observe(in_bytes, timings.swap_in_ns)
        computing_ns = timings.copy_ns + timings.forward_ns + timings.sample_ns
        self.step_time.observe(timings.decode_tokens, timings.chunk_tokens, computing_ns)
