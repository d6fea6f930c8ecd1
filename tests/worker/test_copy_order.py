"""Copies between pool and arena beside the computation: any order of the three queues that obeys the waits gives the
content that plans executed one after another give."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from worker.copy_order import Blocks, CopyOrder

BLOCKS, HOST_BLOCKS = 8, 6
COMPUTE, OUT, IN = 0, 1, 2


def ids(*blocks: int) -> Blocks:
    return np.array(blocks, dtype=np.int64)


@dataclass
class Memory:
    """What every block holds: a number that tells where it came from."""

    pool: list[int] = field(default_factory=lambda: list(range(BLOCKS)))
    host: list[int] = field(default_factory=lambda: [-1] * HOST_BLOCKS)
    read: list[int] = field(default_factory=list)
    """What computation saw, in its order."""


@dataclass
class Work:
    """One piece of work in a queue, and the lengths of the three queues' history it waits for."""

    act: Callable[[Memory], None]
    after: tuple[int, int, int]


def copy_out(pairs: list[tuple[int, int]]) -> Callable[[Memory], None]:
    def act(memory: Memory) -> None:
        for block, host in pairs:
            memory.host[host] = memory.pool[block]

    return act


def copy_in(pairs: list[tuple[int, int]]) -> Callable[[Memory], None]:
    def act(memory: Memory) -> None:
        for block, host in pairs:
            memory.pool[block] = memory.host[host]

    return act


def compute(held: list[int], written: list[int], value: int) -> Callable[[Memory], None]:
    def act(memory: Memory) -> None:
        memory.read += [memory.pool[block] for block in held]
        for block in written:
            memory.pool[block] = value

    return act


def random_pairs(generator: random.Random) -> list[tuple[int, int]]:
    count = generator.randint(0, 3)
    return list(zip(generator.sample(range(BLOCKS), count), generator.sample(range(HOST_BLOCKS), count), strict=True))


def random_plans(generator: random.Random, count: int) -> tuple[Memory, list[deque[Work]]]:
    """Plans of random blocks: what memory must hold after them, and three queues that wait as CopyOrder says."""
    order, expected = CopyOrder(BLOCKS, HOST_BLOCKS), Memory()
    queues: list[deque[Work]] = [deque(), deque(), deque()]
    outs: dict[int, int] = {0: 0}
    ins: dict[int, int] = {0: 0}
    for number in range(count):
        computed = len(queues[COMPUTE])
        for lane, make, enqueue, ends in (
            (OUT, copy_out, order.copy_out, outs),
            (IN, copy_in, order.copy_in, ins),
        ):
            if pairs := random_pairs(generator):
                blocks, hosts = (ids(*side) for side in zip(*pairs, strict=True))
                act = make(pairs)
                act(expected)
                if lane == OUT:
                    queues[OUT].append(Work(act, (computed, 0, ins[enqueue(blocks, hosts)])))
                else:
                    queues[IN].append(Work(act, (computed, outs[enqueue(hosts, blocks)], 0)))
                ends[len(ends)] = len(queues[lane])
        held = generator.sample(range(BLOCKS), generator.randint(0, 3))
        written = generator.sample(held, generator.randint(0, len(held)))
        act = compute(held, written, 100 + number)
        act(expected)
        wait_out, wait_in = order.compute(ids(*held), ids(*written))
        queues[COMPUTE].append(Work(act, (0, outs[wait_out], ins[wait_in])))
    return expected, queues


@pytest.mark.parametrize("seed", range(300))
def test_queues_that_run_in_any_order_the_waits_allow_give_the_content_of_plans_one_after_another(seed: int) -> None:
    generator = random.Random(seed)
    expected, queues = random_plans(generator, 12)
    memory, done = Memory(), [0, 0, 0]
    # One queue is far ahead where the waits let it, which one changes by seed.
    eager = seed % 4
    while any(queues):
        ready = [
            lane
            for lane in range(3)
            if queues[lane] and all(have >= need for have, need in zip(done, queues[lane][0].after, strict=True))
        ]
        assert ready, "the queues wait for one another"
        lane = eager if eager in ready else generator.choice(ready)
        queues[lane].popleft().act(memory)
        done[lane] += 1
    assert memory == expected


def test_a_freed_block_is_written_only_after_the_copy_out_has_read_it() -> None:
    order = CopyOrder(BLOCKS, HOST_BLOCKS)
    assert order.copy_out(ids(2, 3), ids(0, 1)) == 0
    assert order.compute(ids(4, 5), ids(5)) == (0, 0)
    assert order.compute(ids(2, 4), ids(4)) == (0, 0), "reading beside the copy is harmless"
    assert order.compute(ids(3, 4), ids(3)) == (1, 0)
    assert order.compute(ids(2), ids(2)) == (0, 0), "it has waited for that copy"
    assert order.is_settled


def test_computation_waits_for_a_copy_in_only_in_the_step_that_uses_its_blocks() -> None:
    order = CopyOrder(BLOCKS, HOST_BLOCKS)
    order.copy_out(ids(0), ids(3))
    assert order.copy_in(ids(3), ids(6)) == 1
    assert order.compute(ids(1, 2), ids(2)) == (0, 0)
    assert not order.is_settled
    assert order.compute(ids(6, 2), ids(2)) == (0, 1)


def test_nobody_waits_for_copies_that_are_known_to_be_over() -> None:
    order = CopyOrder(BLOCKS, HOST_BLOCKS)
    order.copy_out(ids(0), ids(3))
    order.copy_in(ids(3), ids(1))
    order.finished(1, 1)
    assert order.is_settled
    assert order.compute(ids(0, 1), ids(0)) == (0, 0)
    assert order.copy_in(ids(3), ids(0)) == 0
