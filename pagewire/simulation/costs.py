"""What a step costs on the machine of a recording, fitted to the step times in it.

    step = fixed + a * decode sequences + b * prefill tokens + c * context tokens
                 + d * copied blocks + e * swapped blocks

The worker times its copies by themselves, so d and e are their time over their blocks. The others are fitted to the
rest by least squares of the relative error, so that a few slow steps weigh no more than many quick ones; no cost may be
negative. What the line cannot follow is in its residuals: weights that hide the arithmetic of small chunks, sizes that
steps are padded to, and copies that overlap with computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from statistics import median

from pagewire.recording import Recording, RecordingError
from pagewire.simulation.batch import Batch, RequestRow, StepLoad
from pagewire.simulation.exact import ExactReport, Watch, simulate
from pagewire.v1 import worker_pb2
from scheduler.draft import StepOutput
from scheduler.step_plan import StepPlan, StepResult

LEAST_STEPS = 16
"""Fewer say nothing about so many costs."""
NUM_FITTED = 4
"""Of StepCosts' fields, the first that are fitted."""
SINGULAR = 1e-9
"""Of a column's square, what must be left of it without the columns before it."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Nanoseconds; 0 also where no step of the recording depends on it."""

    fixed_ns: float = 0.0
    """Per step."""
    decode_ns: float = 0.0
    """Per decode sequence."""
    prefill_ns: float = 0.0
    """Per token computed by a chunk."""
    context_ns: float = 0.0
    """Per pair of a computed token and a token that it attends to."""
    copy_ns: float = 0.0
    """Per block copied within the pool."""
    swap_ns: float = 0.0
    """Per block copied to or from the host arena."""

    def step_ns(self, load: StepLoad) -> float:
        """Time of a step."""
        ns: float = sum(cost * amount for cost, amount in zip(astuple(self), amounts(load), strict=True))
        return ns

    def with_measured_swap(self, hello: worker_pb2.WorkerHello) -> StepCosts:
        """Where no step of the recording has swapped: with the cost that the worker measured at its start, if any."""
        rate = min(hello.swap_out_bytes_per_second, hello.swap_in_bytes_per_second)
        if self.swap_ns or not rate:
            return self
        return replace(self, swap_ns=hello.capacity.block_bytes * 1e9 / rate)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was executed."""

    load: StepLoad
    computing_ns: int
    """Of the worker's time: model and sampling."""
    copying_ns: int
    """Copies within the pool."""
    swapping_ns: int
    """Copies to and from the host arena."""
    turnaround_ns: int
    """From when the worker could begin, plan made and result before it in, to its result."""

    @property
    def took_ns(self) -> int:
        """All of the worker's time for it."""
        return self.computing_ns + self.copying_ns + self.swapping_ns


@dataclass(frozen=True)
class Fit:
    """Costs and how well the steps agree with them."""

    costs: StepCosts
    num_steps: int
    num_with: tuple[int, ...]
    """Steps that each cost was fitted to, in the order of StepCosts' fields."""
    link_ns: float
    """Median time per step that is not the worker's: wire, queues, both ends' own work."""
    residuals: tuple[float, ...]
    """Relative error of every step's fitted time, unsigned, ascending."""
    took_ns: int
    """All steps together, as measured."""
    fitted_ns: float
    """All steps together, as fitted."""

    def residual(self, share: float) -> float:
        """The relative error that this share of the steps does not pass."""
        return self.residuals[min(len(self.residuals) - 1, int(share * len(self.residuals)))]


def amounts(load: StepLoad) -> tuple[int, ...]:
    """What each cost is multiplied with, in the order of StepCosts' fields."""
    swapped = load.swapped_out_blocks + load.swapped_in_blocks
    return 1, load.decode_tokens, load.chunk_tokens, load.attended_pairs, load.copied_blocks, swapped


def steps_of(recording: Recording, watch: StepWatch | None = None) -> tuple[list[Step], ExactReport]:
    """The executed steps of a recording, with a `watch` that sees more of them if one is given. Raises RecordingError
    when they cannot be simulated up to its end."""
    watch = watch or StepWatch()
    report = simulate(recording, watch)
    if report.first_difference:
        raise RecordingError(f"{recording.path}: cannot be simulated: {report.first_difference}")
    return watch.steps, report


def fit(steps: Sequence[Step]) -> Fit:
    """The costs that fit the steps best. Raises ValueError when there are too few."""
    steps = [step for step in steps if step.computing_ns > 0]
    if len(steps) < LEAST_STEPS:
        raise ValueError(f"it has {len(steps)} steps with times; a fit needs {LEAST_STEPS} at least")
    rows = [amounts(step.load) for step in steps]
    weighted = [
        [amount / step.computing_ns for amount in row[:NUM_FITTED]] for row, step in zip(rows, steps, strict=True)
    ]
    copied, swapped = (sum(column) for column in list(zip(*rows, strict=True))[NUM_FITTED:])
    copy_ns = sum(step.copying_ns for step in steps) / max(1, copied)
    swap_ns = sum(step.swapping_ns for step in steps) / max(1, swapped)
    fixed, decode, prefill, context = _least_squares(weighted)
    costs = StepCosts(fixed, decode, prefill, context, copy_ns, swap_ns)
    fitted = [costs.step_ns(step.load) for step in steps]
    return Fit(
        costs=costs,
        num_steps=len(steps),
        num_with=tuple(sum(1 for row in rows if row[column]) for column in range(len(fields(StepCosts)))),
        link_ns=median(max(0, step.turnaround_ns - step.took_ns) for step in steps),
        residuals=tuple(sorted(abs(ns - step.took_ns) / step.took_ns for ns, step in zip(fitted, steps, strict=True))),
        took_ns=sum(step.took_ns for step in steps),
        fitted_ns=sum(fitted),
    )


class StepWatch(Watch):
    """Collects the steps of a simulation."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._batches: dict[int, Batch[RequestRow]] = {}  # by epoch
        self._pending: dict[tuple[int, int], tuple[StepLoad, int]] = {}  # (epoch, step): its load, when it was planned
        self._result_at: dict[int, int] = {}  # by epoch, of the last one

    def joined(self, hello: worker_pb2.WorkerHello, epoch: int) -> None:
        self._batches[epoch] = Batch(RequestRow.of)

    def planned(self, worker_id: str, plan: StepPlan, now: int) -> None:
        batch = self._batches[plan.epoch]
        self._pending[plan.epoch, plan.step] = batch.execute(plan), now
        self.sampling(plan, batch)

    def sampling(self, plan: StepPlan, batch: Batch[RequestRow]) -> None:
        """The batch has executed a plan."""

    def applied(self, worker_id: str, result: StepResult, output: StepOutput, now: int) -> None:
        found = self._pending.pop((result.epoch, result.step), None)
        if found is None:
            return  # it came twice
        load, planned_at = found
        begun = max(planned_at, self._result_at.get(result.epoch, 0))
        self._result_at[result.epoch] = now
        timings = result.timings
        computing_ns, swapping_ns = timings.forward_ns + timings.sample_ns, timings.swap_out_ns + timings.swap_in_ns
        self.steps.append(Step(load, computing_ns, timings.copy_ns, swapping_ns, now - begun))


def _least_squares(rows: list[list[float]]) -> list[float]:
    """x >= 0 for which the sum of squares of (row . x - 1) is small: columns that would be negative are left out, the
    most negative first; so are columns that depend on the others."""
    width = len(rows[0])
    scale = [max(abs(row[column]) for row in rows) or 1.0 for column in range(width)]
    scaled = [[value / size for value, size in zip(row, scale, strict=True)] for row in rows]
    free = [column for column in range(width) if any(row[column] for row in scaled)]
    squares = [[sum(row[one] * row[other] for row in scaled) for other in range(width)] for one in range(width)]
    sums = [sum(row[column] for row in scaled) for column in range(width)]
    while True:
        found = _solve(squares, sums, free)
        negative = [column for column in free if found[column] < 0]
        if not negative:
            return [value / size for value, size in zip(found, scale, strict=True)]
        free.remove(min(negative, key=lambda column: found[column]))


def _solve(squares: list[list[float]], sums: list[float], free: list[int]) -> list[float]:
    """Gaussian elimination of a symmetric system; columns that are left out are 0."""
    matrix = {one: [*squares[one], sums[one]] for one in free}
    kept = []
    for column in free:
        pivot = matrix[column][column]
        if pivot <= SINGULAR * squares[column][column]:
            continue  # it is a sum of those before it
        kept.append(column)
        for other in free:
            if other != column:
                factor = matrix[other][column] / pivot
                matrix[other] = [a - factor * b for a, b in zip(matrix[other], matrix[column], strict=True)]
    found = [0.0] * len(squares)
    for column in kept:
        found[column] = matrix[column][-1] / matrix[column][column]
    return found
