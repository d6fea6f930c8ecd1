"""Pictures of the blocks and the changes between them: who applies the changes has exactly the newest picture."""

from __future__ import annotations

import random
from collections import Counter

from scheduler.block_picture import CACHED, FREE, PINNED, Painter, Picture, PoolKey, changes
from scheduler.dispatcher import SchedulerConfig
from scheduler.policy import TransferRates
from scheduler.scheduler import Scheduler
from scheduler.step_plan import StepResult
from tests.core.factories import OneWorker
from tests.core.test_simulation import Link, Simulation

HERE, THERE = PoolKey("w", 1, False), PoolKey("w", 1, True)


class Watcher:
    """What a client knows: only what changes have told it."""

    def __init__(self) -> None:
        self.picture = Picture()
        self.pools: dict[tuple[str, bool], tuple[list[int], list[int]]] = {}
        self.owners: dict[int, tuple[str, int]] = {}
        self.numbers_ever: set[int] = set()
        self.cells_told = 0

    def follow(self, picture: Picture) -> None:
        told = changes(self.picture, picture)
        for worker_id in told.gone_workers:
            del self.pools[worker_id, False], self.pools[worker_id, True]
        for number, owner in told.owners:
            assert number not in self.numbers_ever, "a number is used twice"
            self.numbers_ever.add(number)
            self.owners[number] = (owner.request_id, owner.index)
        for pool in told.pools:
            name = (pool.key.worker_id, pool.key.on_host)
            if pool.total_blocks is not None:
                self.pools[name] = ([FREE] * pool.total_blocks, [0] * pool.total_blocks)
            owners, references = self.pools[name]
            end, runs = 0, pool.runs
            for skip, length, owner, count in zip(runs.skips, runs.lengths, runs.owners, runs.references, strict=True):
                assert length > 0
                first, end = end + skip, end + skip + length
                assert end <= len(owners)
                owners[first:end] = [owner] * length
                references[first:end] = [count] * length
                self.cells_told += length
        for number in told.ended_owners:
            del self.owners[number]
        self.picture = picture


def check_against(watcher: Watcher, schedulers: list[Scheduler]) -> None:
    """Compares a client's view with the core's own tables, by other means than the painter's."""
    assert {name for name, _ in watcher.pools} == {one.worker_id for one in schedulers}
    for scheduler in schedulers:
        blocks = scheduler.blocks
        for on_host, pool in ((False, blocks.pool), (True, blocks.host)):
            holders: dict[int, list] = {}
            for group in [*scheduler.groups, *scheduler.parked.groups]:
                for sequence in group.sequences:
                    if sequence.table.on_host == on_host:
                        for block in sequence.table.blocks:
                            holders.setdefault(block, []).append(sequence)
            cached = set(blocks.tier.blocks if on_host else blocks.cache.parked)
            owners, references = watcher.pools[scheduler.worker_id, on_host]
            assert len(owners) == pool.num_blocks
            for block, (owner, count) in enumerate(zip(owners, references, strict=True)):
                if block in holders:
                    oldest = min(holders[block], key=lambda sequence: (sequence.group.arrival, sequence.index))
                    assert watcher.owners[owner] == (oldest.request.request_id, oldest.index)
                    assert count == len(holders[block])
                else:
                    assert count == 0
                    assert (owner in (CACHED, PINNED)) == (block in cached)
                    assert owner in (FREE, CACHED, PINNED)


class WatchedSimulation(Simulation):
    """A random life of the core with watchers that look every now and then; a lazy one looks seldom."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.look = random.Random(seed + 1)
        self.painter = Painter()
        self.eager, self.lazy = Watcher(), Watcher()
        self.seen: Counter[str] = Counter()

    def happen(self) -> None:
        super().happen()
        self.look_around()

    def deliver(self, worker_id: str, result: StepResult, link: Link) -> None:
        super().deliver(worker_id, result, link)
        self.look_around()

    def look_around(self) -> None:
        schedulers = self.dispatcher.schedulers
        if self.look.random() < 0.5:
            picture = self.painter.paint(schedulers)
            watchers = [self.eager, self.lazy] if self.look.random() < 0.1 else [self.eager]
            for watcher in watchers:
                watcher.follow(picture)
                check_against(watcher, schedulers)
            for (_, on_host), (owners, references) in self.eager.pools.items():
                where = "host" if on_host else "pool"
                names = {FREE: "free", CACHED: "cached", PINNED: "pinned"}
                self.seen.update(f"{where} {names.get(owner, 'used')}" for owner in owners)
                self.seen.update(f"{where} shared" for count in references if count > 1)


def test_whoever_applies_the_changes_has_exactly_the_cores_blocks_whenever_they_look() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        simulation = WatchedSimulation(seed)
        simulation.run()
        seen.update(simulation.seen)
    expected = {"pool free", "pool cached", "pool pinned", "pool used", "pool shared"}
    expected |= {"host free", "host cached", "host used", "host shared"}
    assert expected <= seen.keys(), f"these lives never show {expected - seen.keys()}"


def test_blocks_are_told_as_runs_of_literal_ids() -> None:
    one = OneWorker()
    painter = Painter()
    one.submit("a", [1, 2, 3, 4, 5])
    one.step()
    first = painter.paint(one.dispatcher.schedulers)
    assert first.pools[HERE].owners == [16, 16] + [FREE] * 14
    assert first.owners[16].request_id == "a"
    whole = changes(Picture(), first).pools
    assert [(pool.key, pool.total_blocks) for pool in whole] == [(HERE, 16), (THERE, 16)]
    assert (whole[0].runs.skips, whole[0].runs.lengths) == ([0], [2])
    assert (whole[0].runs.owners, whole[0].runs.references) == ([16], [1])
    one.submit("b", [1, 2, 3, 4, 9, 9], n=1)
    one.step()
    second = painter.paint(one.dispatcher.schedulers)
    (pool,) = changes(first, second).pools
    assert pool.total_blocks is None
    # Block 0 holds the prefix that both share; block 2 is b's own.
    assert (pool.runs.skips, pool.runs.lengths) == ([0, 1], [1, 1])
    assert (pool.runs.owners, pool.runs.references) == ([16, 17], [2, 1])


def test_nothing_is_told_when_nothing_has_changed() -> None:
    one = OneWorker()
    painter = Painter()
    one.submit("a")
    one.step()
    before, after = painter.paint(one.dispatcher.schedulers), painter.paint(one.dispatcher.schedulers)
    told = changes(before, after)
    assert (told.gone_workers, told.owners, told.pools, told.ended_owners) == ([], [], [], [])


def test_a_swapped_sequence_keeps_its_number_in_the_host_arena() -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="swap", host_prefix_cache=False)
    one = OneWorker(config, TransferRates(10**9, 10**9, 1), num_blocks=6)
    painter = Painter()
    one.submit("a", list(range(9)), max_tokens=12)
    one.submit("b", list(range(20, 29)), max_tokens=12)
    number = {}
    for _ in range(20):
        one.step()
        picture = painter.paint(one.dispatcher.schedulers)
        number.update({owner.request_id: key for key, owner in picture.owners.items()})
        if any(picture.pools[THERE].owners):
            break
    assert set(picture.pools[THERE].owners) == {FREE, number["b"]}
    assert number["b"] not in picture.pools[HERE].owners
    assert picture.pools[THERE].references.count(1) == picture.pools[THERE].owners.count(number["b"]) > 0
