from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels import reference
from kernels.kv_layout import KvLayout
from pagewire.runtime.errors import StartError
from worker import kv_pool
from worker.device import CpuRuntime
from worker.step import BlockMoves
from worker.swapper import Swapper, independent_runs

CPU = torch.device("cpu")
LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype=torch.float32)
"""A block of this layout has 1 KiB."""


def size(wanted_blocks: int = 0, *, free: int, max_num_seqs: int = 4, max_model_len: int = 40) -> int:
    return kv_pool.pool_size(
        LAYOUT,
        wanted_blocks=wanted_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        free=free,
        device=CPU,
    )


def test_the_pool_takes_a_share_of_the_free_memory() -> None:
    assert LAYOUT.block_bytes == 1024
    assert size(free=80 * 1024) == 20


def test_the_pool_is_no_larger_than_all_sequences_could_use() -> None:
    assert size(free=1 << 30) == 4 * 10


def test_a_wanted_size_is_taken_as_it_is() -> None:
    assert size(77, free=77 * 1024) == 77


def test_too_little_memory_is_refused_with_both_figures() -> None:
    with pytest.raises(StartError, match=r"2\.00 GiB needed, 1\.00 GiB free"):
        size(2 << 20, free=1 << 30)
    with pytest.raises(StartError, match=r"one sequence of 40 tokens.*--max-model-len"):
        size(free=39 * 1024)


def test_the_arena_is_half_the_pool_within_a_tenth_of_the_ram() -> None:
    def arena(wanted: int | None, num_blocks: int, free_ram: int) -> int:
        return kv_pool.arena_size(LAYOUT, wanted_blocks=wanted, num_blocks=num_blocks, free_ram=free_ram)

    assert arena(None, 40, 1 << 30) == 20
    assert arena(None, 40, 100 * 1024) == 10
    assert arena(0, 40, 1 << 30) == 0
    assert arena(33, 40, 33 * 1024) == 33
    with pytest.raises(StartError, match="--host-blocks"):
        arena(33, 40, 32 * 1024)


class Registry:
    """Stands in for the CUDA runtime: knows which pages are locked, and refuses any of them a second time."""

    def __init__(self, allowed: int = 1 << 30) -> None:
        self.allowed = allowed
        self.locked: dict[int, range] = {}

    def lock(self, address: int, size: int, flags: int) -> int:
        pages = range(address // kv_pool.PAGE_BYTES, -(-(address + size) // kv_pool.PAGE_BYTES))
        if size > self.allowed:
            return 2
        if any(set(pages) & set(others) for others in self.locked.values()):
            return 712
        self.locked[address] = pages
        return 0

    def unlock(self, address: int) -> int:
        del self.locked[address]
        return 0

    def reason(self, status: int) -> str:
        return {2: "out of memory", 712: "already mapped"}[status]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    runtime = SimpleNamespace(
        cudaHostRegister=made.lock, cudaHostUnregister=made.unlock, cudaGetErrorString=made.reason
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return made


def test_an_arena_is_unlocked_when_its_last_tensor_is_gone(registry: Registry) -> None:
    arena = kv_pool.pinned(LAYOUT, 7)
    assert (arena.shape, arena.dtype, arena.is_contiguous()) == ((7, *LAYOUT.block_shape), torch.float32, True)
    (locked,) = registry.locked
    assert locked == arena.data_ptr()
    part = arena[3:5]
    del arena
    assert list(registry.locked) == [locked]
    del part
    assert not registry.locked


def test_arenas_share_no_page_whatever_their_size(registry: Registry) -> None:
    arenas = [kv_pool.pinned(LAYOUT, host_blocks) for host_blocks in (1, 1, 5, 4, 300)]
    assert len(registry.locked) == 5
    del arenas
    assert not registry.locked


def test_an_arena_that_cannot_be_locked_says_why(registry: Registry) -> None:
    registry.allowed = 1 << 20
    with pytest.raises(StartError, match=r"cannot lock the swap arena's 0\.01 GiB: out of memory; lower --host-blocks"):
        kv_pool.pinned(LAYOUT, 8192)


def test_free_memory_is_found() -> None:
    assert 0 < kv_pool.free_bytes(CPU) < 1 << 50


def runs(sources: list[int], destinations: list[int]) -> list[tuple[list[int], list[int]]]:
    return [(list(run.sources), list(run.destinations)) for run in independent_runs(BlockMoves(sources, destinations))]


def test_copies_that_touch_each_others_blocks_are_made_one_after_another() -> None:
    assert runs([], []) == []
    assert runs([1, 1, 2], [5, 6, 7]) == [([1, 1, 2], [5, 6, 7])]
    # Block 5 is written before it is read; block 2 is read before it is written.
    assert runs([1, 5], [5, 6]) == [([1], [5]), ([5], [6])]
    assert runs([2, 1], [5, 2]) == [([2], [5]), ([1], [2])]


def test_measuring_gives_rates_only_where_there_is_an_arena() -> None:
    for host_blocks, measured in ((5, True), (0, False)):
        pool = kv_pool.allocate(LAYOUT, num_blocks=9, host_blocks=host_blocks, device=CPU)
        out_rate, in_rate = Swapper(pool, reference, CpuRuntime()).measure()
        assert (out_rate > 0) == (in_rate > 0) == measured
