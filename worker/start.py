"""From a loaded model to an executor that is ready for plans: memory taken, kernels compiled, graphs captured.

On a GPU the pool gets what a profiling run leaves. The run is real: an executor of the same size on a small pool takes
the largest step that may be asked for and one that samples every row with everything a sampler can do, so kernels are
compiled and libraries have their workspaces before the pool takes the rest.
"""

from __future__ import annotations

import gc
import sys
import time

import torch
from rich.console import Console
from rich.progress import Progress

from kernels import backend
from kernels.backend import CudaKernels
from kernels.compile import KernelError
from kernels.kv_layout import KvLayout
from pagewire.runtime.errors import StartError
from pagewire.runtime.logs import get_logger
from worker import kv_pool
from worker.config import WorkerSettings
from worker.decode import bucket_sizes
from worker.executor import Executor
from worker.models.base import PagedModel
from worker.step import NewSequence, Sampling, StepPlan

log = get_logger("worker.start")

EVERYTHING = Sampling(
    temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1, logit_bias=((0, 1.0),)
)
"""Sampling that needs all of the sampler's memory."""


def choose_device(wanted: str) -> torch.device:
    """The device for a setting of auto, cpu or cuda. StartError: cuda is wanted and there is none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "sees no usable GPU: check `nvidia-smi`" if torch.version.cuda else "is a build without CUDA"
        raise StartError(f"--device cuda, but torch {torch.__version__} {built}; or use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_kernels(device: torch.device) -> None:
    """StartError, one line with the mend, if the GPU kernels cannot run on `device`."""
    if device.type != "cuda":
        return
    try:
        backend.check_device(device)
    except KernelError as error:
        raise StartError(str(error)) from None


def make_executor(settings: WorkerSettings, model: PagedModel, device: torch.device) -> Executor:
    """Takes the memory for KV blocks, says how much it is, and makes everything ready. StartError."""
    spec = model.spec
    try:
        layout = KvLayout(spec.num_layers, spec.num_kv_heads, settings.block_size, spec.head_dim, spec.dtype)
    except ValueError as error:
        raise StartError(f"--block-size: {error}") from None
    reserved = _profile_cuda(settings, model, layout, device) if device.type == "cuda" else 0
    num_blocks = kv_pool.pool_size(
        layout,
        wanted_blocks=settings.num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=spec.max_model_len,
        free=kv_pool.free_bytes(device),
        device=device,
        utilization=settings.gpu_memory_utilization,
        reserved=reserved,
    )
    host_blocks = kv_pool.arena_size(
        layout,
        wanted_blocks=settings.host_blocks,
        num_blocks=num_blocks,
        free_ram=kv_pool.free_bytes(torch.device("cpu")),
    )
    pool = kv_pool.allocate(layout, num_blocks=num_blocks, host_blocks=host_blocks, device=device)
    log.info(
        "memory",
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        num_blocks=num_blocks,
        pool_bytes=num_blocks * layout.block_bytes,
        pool_tokens=num_blocks * layout.block_size,
        host_blocks=host_blocks,
        arena_bytes=host_blocks * layout.block_bytes,
        step_bytes=reserved,
        threads=torch.get_num_threads(),
    )
    graphs = device.type == "cuda" and settings.decode_graphs
    executor = Executor(
        model,
        pool,
        max_slots=settings.max_num_seqs,
        max_step_tokens=settings.token_budget,
        max_model_len=spec.max_model_len,
        buckets=bucket_sizes(settings.max_num_seqs) if graphs else (),
    )
    if isinstance(executor.kernels, CudaKernels):
        for operation, why in executor.kernels.twins.items():
            log.warning("no kernel: torch computes it, slowly", operation=operation, why=why)
        if graphs and not executor.kernels.twins:
            capture_graphs(executor, chunks=settings.chunk_graphs)
    return executor


def capture_graphs(executor: Executor, *, chunks: bool = False) -> None:
    """Captures the decode graphs, and those of steps with `chunks`, with a progress bar where somebody looks on.
    StartError: no memory for them."""
    started = time.perf_counter()
    done = 0
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("graphs", total=None)
        try:
            for done, total in executor.decode.capture():
                progress.update(task, completed=done, total=total)
            if chunks and done:
                most_decode = executor.batch.buckets[-1]
                before = done
                for more, total in executor.chunk_graphs.capture(executor.decode.memory, most_decode):
                    done = before + more
                    progress.update(task, completed=done, total=before + total)
        except torch.OutOfMemoryError:
            raise StartError(
                "too little memory for decode graphs: lower --gpu-memory-utilization or --max-num-seqs, "
                "or give --no-decode-graphs"
            ) from None
        except KernelError as error:
            raise StartError(str(error)) from None
    log.info("graphs", count=done, seconds=round(time.perf_counter() - started, 1))


def _profile_cuda(settings: WorkerSettings, model: PagedModel, layout: KvLayout, device: torch.device) -> int:
    """Bytes that steps need besides weights and pool."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        pool_bytes = run_largest_steps(settings, model, layout, device)
    except torch.OutOfMemoryError:
        free = kv_pool.free_bytes(device) / kv_pool.GIB
        raise StartError(
            f"too little memory for a step of {settings.token_budget} tokens: {free:.2f} GiB are free beside the "
            "model; lower --token-budget or --max-num-seqs"
        ) from None
    except KernelError as error:
        raise StartError(str(error)) from None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before - pool_bytes
    gc.collect()
    torch.cuda.empty_cache()
    return max(0, peak)


def run_largest_steps(settings: WorkerSettings, model: PagedModel, layout: KvLayout, device: torch.device) -> int:
    """Runs the steps that need most memory on a pool of their own. Returns that pool's bytes."""
    spec = model.spec
    budget, rows = settings.token_budget, min(settings.max_num_seqs, settings.token_budget)
    lengths = _lengths(budget, min(spec.max_model_len, budget), settings.max_num_seqs)
    num_blocks = max(sum(layout.blocks_for(length) for length in lengths), rows)
    pool = kv_pool.allocate(layout, num_blocks=num_blocks, host_blocks=0, device=device)
    executor = Executor(
        model,
        pool,
        max_slots=settings.max_num_seqs,
        max_step_tokens=budget,
        max_model_len=spec.max_model_len,
    )
    executor.execute(_prefill(1, lengths, layout, Sampling(temperature=0.0)))
    executor.reset()
    # Every row draws, with penalties and log-probabilities: the most that lies beside the logits.
    executor.execute(_prefill(1, [1] * rows, layout, EVERYTHING))
    return num_blocks * layout.block_bytes


def _lengths(total: int, longest: int, most: int) -> list[int]:
    """Chunks of `longest` tokens and a shorter one that are `total` tokens together; at most `most` of them."""
    lengths = [longest] * (total // longest)
    if total % longest:
        lengths.append(total % longest)
    return lengths[:most]


def _prefill(step: int, lengths: list[int], layout: KvLayout, sampling: Sampling) -> StepPlan:
    """A plan that computes new sequences of these lengths, whole."""
    sequences, first_block = [], 0
    for slot, length in enumerate(lengths):
        count = layout.blocks_for(length)
        blocks = range(first_block, first_block + count)
        first_block += count
        logprobs = None if sampling.temperature == 0.0 else 1
        sequences.append(
            NewSequence(
                slot=slot,
                token_ids=[0] * length,
                prompt_tokens=length,
                computed_tokens=0,
                blocks=blocks,
                sampling=sampling,
                logprobs=logprobs,
            )
        )
    return StepPlan(epoch=1, step=step, new_sequences=sequences, chunk_slots=range(len(lengths)), chunk_tokens=lengths)
