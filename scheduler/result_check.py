"""Whether a step result can be that of its plan."""

from __future__ import annotations

from scheduler.draft import Draft, ResultError
from scheduler.sequence import Sequence
from scheduler.step_plan import StepResult


def check_result(flight: Draft, rows: list[Sequence], result: StepResult) -> None:
    """Raises ResultError when a result cannot belong to its plan, whose rows these are. Changes nothing."""
    step, num_rows = result.step, len(rows)
    if len(result.token_ids) != num_rows:
        raise ResultError(f"step {step} has {num_rows} rows, its result has {len(result.token_ids)} token ids")
    if len(result.logprob_rows) != len(result.logprobs):
        raise ResultError(f"the result of step {step} has log-probabilities without a row, or the reverse")
    for row in (*result.logprob_rows, *result.nonfinite_rows):
        if not 0 <= row < num_rows:
            raise ResultError(f"the result of step {step} names row {row} of {num_rows}")
    if flight.searches:
        _check_offers(flight, rows, result)
    for entry in result.prompt_logprobs:
        sequence = flight.chunks.get(entry.slot)
        if sequence is None:
            raise ResultError(f"the result of step {step} has prompt log-probabilities of slot {entry.slot}")
        expected = len(sequence.group.prompt_logprobs) + 1
        if entry.first_token != expected and not flight.ignores(sequence.group):
            raise ResultError(
                f"prompt log-probabilities of slot {entry.slot} begin at {entry.first_token}, not at {expected}"
            )


def _check_offers(flight: Draft, rows: list[Sequence], result: StepResult) -> None:
    """Every beam that could be computed has offered as many tokens as it was asked."""
    offers = dict(zip(result.logprob_rows, result.logprobs, strict=True))
    starved = set(result.out_of_memory_slots)
    for row, sequence in enumerate(rows):
        search = sequence.group.search
        if search is None or row in result.nonfinite_rows or sequence.slot in starved or sequence in flight.dropped:
            continue
        given = len(offers[row].top_ids) if row in offers else 0
        if given < search.num_candidates or given != len(offers[row].top_logprobs):
            raise ResultError(
                f"row {row} of step {result.step} is a beam that offers {given} tokens, not {search.num_candidates}"
            )
