"""From a model to an executor: profiling, sizes, and errors that say the mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import backend
from kernels.compile import KernelError
from kernels.kv_layout import KvLayout
from pagewire.runtime.errors import StartError
from tests.worker.toy import HEAD_DIM, KV_HEADS, LAYERS, ToyModel
from worker import kv_pool, start
from worker.config import WorkerSettings
from worker.decode import bucket_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYOUT = KvLayout(LAYERS, KV_HEADS, 4, HEAD_DIM, torch.float32)


def settings(**fields: Any) -> WorkerSettings:
    return WorkerSettings(**{"block_size": 4, "max_num_seqs": 5, "token_budget": 150, **fields})


def test_the_profiling_run_takes_the_largest_step_and_samples_every_row() -> None:
    model = ToyModel()
    size = start.run_largest_steps(settings(), model, LAYOUT, CPU)
    # 64 + 64 + 22 tokens, then one token in each of 5 rows.
    assert model.forward_rows == [150, 5]
    assert model.logit_rows == [3, 5]
    assert size == (16 + 16 + 6) * LAYOUT.block_bytes


def test_a_step_that_no_sequences_can_fill_is_profiled_as_far_as_they_go() -> None:
    model = ToyModel()
    start.run_largest_steps(settings(token_budget=1000, max_num_seqs=2), model, LAYOUT, CPU)
    assert model.forward_rows == [128, 2]


def test_the_pool_takes_its_share_of_gpu_memory_less_what_steps_need() -> None:
    def size(**fields: Any) -> int:
        sizes = {"wanted_blocks": 0, "max_num_seqs": 100, "max_model_len": 64, "device": CUDA, "free": 1 << 20}
        return kv_pool.pool_size(LAYOUT, **{**sizes, **fields})

    assert LAYOUT.block_bytes == 1024
    assert size(utilization=0.5) == 512
    assert size(utilization=0.5, reserved=100 * 1024) == 412
    with pytest.raises(StartError, match=r"one sequence of 64 tokens.*--max-model-len"):
        size(reserved=1 << 20)
    with pytest.raises(StartError, match="too little memory for the KV pool"):
        size(wanted_blocks=1024, reserved=1)


def test_a_gpu_that_cannot_run_the_kernels_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise KernelError("this GPU has compute capability 7.5; use --device cpu")

    monkeypatch.setattr(backend, "check_device", refuse)
    start.check_kernels(CPU)
    with pytest.raises(StartError, match="use --device cpu"):
        start.check_kernels(CUDA)


def test_an_executor_on_the_cpu_has_no_buckets_and_the_wanted_memory() -> None:
    executor = start.make_executor(settings(num_blocks=30, host_blocks=7), ToyModel(), CPU)
    assert (executor.pool.num_blocks, executor.pool.num_host_blocks) == (30, 7)
    assert executor.batch.padded(5) == 5


@pytest.mark.parametrize(
    ("max_slots", "head", "tail"),
    [(1, [1], [1]), (3, [1, 2, 4], [4]), (9, [1, 2, 4, 8, 16], [16]), (256, [1, 2, 4, 8, 16, 24], [248, 256])],
)
def test_buckets_hold_every_size_of_the_decode_set(max_slots: int, head: list[int], tail: list[int]) -> None:
    sizes = list(bucket_sizes(max_slots))
    assert sizes[: len(head)] == head
    assert sizes[-len(tail) :] == tail
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("max_slots", [300, 512, 1000, 4097])
def test_buckets_reach_any_number_of_rows(max_slots: int) -> None:
    sizes = bucket_sizes(max_slots)
    assert sizes[-1] >= max_slots > sizes[-2]
