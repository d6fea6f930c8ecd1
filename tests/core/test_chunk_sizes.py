"""How many prompt tokens fit beside decodes where a worker pads steps to a few sizes."""

from __future__ import annotations

import pytest

from scheduler.chunk_sizes import ChunkSizes
from scheduler.policy import ChunkStep
from scheduler.step_time import StepTime

MS = 1_000_000
STEPS = [ChunkStep(rows, ns) for rows, ns in ((32, 6 * MS), (128, 7 * MS), (256, 9 * MS), (512, 15 * MS))]


def test_a_chunk_fills_the_largest_size_that_keeps_to_the_target() -> None:
    sizes = ChunkSizes(STEPS)
    assert sizes.budget(10 * MS, 5) == 251
    assert sizes.budget(14 * MS, 5) == 251
    assert sizes.budget(16 * MS, 5) == 507
    assert sizes.budget(9 * MS - 1, 5) == 123


def test_a_chunk_that_hardly_stretches_the_step_is_taken_however_tight_the_target() -> None:
    assert ChunkSizes(STEPS).budget(1, 5) == 123
    assert ChunkSizes(STEPS).budget(1, 32) == 96, "a size that is full of decodes has no room for a chunk"


def test_what_contexts_and_sampling_add_is_learned_and_a_stall_is_not() -> None:
    sizes = ChunkSizes(STEPS)
    for _ in range(200):
        sizes.observe(5, 200, 11 * MS)  # 9 measured
    assert sizes.budget(10 * MS, 5) == 123
    assert sizes.budget(round(11.01 * MS), 5) == 251
    sizes.observe(5, 200, 10_000 * MS)
    assert sizes.budget(round(11.6 * MS), 5) == 251


def test_a_size_that_a_hiccup_made_longer_than_a_larger_one_takes_no_more_than_that() -> None:
    slow = [ChunkStep(step.rows, 30 * MS if step.rows == 128 else step.ns) for step in STEPS]
    assert ChunkSizes(slow).budget(10 * MS, 5) == 251
    assert ChunkSizes(slow).budget(9 * MS - 1, 5) == 27


def test_sizes_that_do_not_hold_a_step_say_nothing_and_learn_nothing() -> None:
    sizes = ChunkSizes(STEPS)
    sizes.observe(65, 448, 50 * MS)
    sizes.observe(5, 508, 50 * MS)
    assert sizes.budget(10 * MS, 512) is None
    assert sizes.budget(10 * MS, 511) == 1
    assert sizes.budget(10 * MS, 64) == 192
    assert ChunkSizes(()).budget(10 * MS, 5) is None


def test_measured_sizes_come_before_the_line_through_steps_seen() -> None:
    learned = StepTime(chunk_steps=STEPS)
    for _ in range(50):
        learned.observe(5, 495, 15 * MS)
        learned.observe(5, 40, 7 * MS)
    assert learned.chunk_budget(2048, 10 * MS, 5) == 251
    assert learned.chunk_budget(100, 10 * MS, 5) == 100
    assert learned.chunk_budget(2048, 10 * MS, 0) == 2048, "nobody waits for a token"
    assert learned.chunk_budget(2048, 20 * MS, 600) == pytest.approx(670, rel=0.2), "too many decodes: by the line"
