"""The worker process: loads a model, takes its memory, joins the scheduler, executes plans until it is told to stop."""

from __future__ import annotations

import gc
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import NoReturn

import torch

from pagewire.runtime.errors import StartError
from pagewire.runtime.logs import get_logger
from pagewire.runtime.ready import announce
from pagewire.runtime.tracing import make_tracer
from pagewire.v1 import worker_pb2
from worker import kv_pool
from worker.config import WorkerSettings
from worker.executor import Executor
from worker.link import SchedulerLink
from worker.metrics import start_page
from worker.models.base import ModelError, ModelSpec
from worker.models.loader import load_model
from worker.start import check_kernels, choose_device, make_executor
from worker.step import PlanError
from worker.traces import Traces

PROTOCOL_VERSION = 1
EXIT_STEP_FAILED = 1
"""A supervisor answers it with a restart; the scheduler recovers the sequences by recompute."""

SWITCH_INTERVAL_S = 0.0002
"""How long a thread of the worker runs while another one waits for the interpreter."""

log = get_logger("worker.main")


def run(settings: WorkerSettings) -> None:
    """Runs the worker until a signal ends it. StartError: it cannot start, or the scheduler refuses it."""
    tracer = make_tracer(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    check_kernels(device)
    try:
        model = load_model(
            settings.model,
            device=device,
            dtype=settings.dtype,
            load_format=settings.load_format,
            max_model_len=settings.max_model_len,
        )
    except ModelError as error:
        raise StartError(str(error)) from None
    except torch.OutOfMemoryError:
        free = kv_pool.free_bytes(device) / kv_pool.GIB
        raise StartError(f"the model's weights do not fit on {device}: {free:.2f} GiB are still free") from None
    executor = make_executor(settings, model, device)
    hello = make_hello(settings, model.spec, executor)
    link = SchedulerLink(
        settings.scheduler,
        hello,
        executor,
        on_welcome=lambda: announce(settings.ready_fd, worker_id=hello.worker_id),
        on_failure=fail,
        traces=None if tracer is None else Traces(tracer),
    )
    if settings.metrics_port is not None and settings.metrics_port >= 0:
        log.info("metrics", address=start_page(link, settings.metrics_host, settings.metrics_port))
    # Threads take turns: one receives plans, one launches them, one waits for results. By default one that needs the
    # interpreter waits 5 ms before it asks a running one to stop, and a step takes 7.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # what is loaded by now lives for ever: collections need not walk it
    try:
        link.run()
    finally:
        if tracer is not None:
            tracer.stop()


def make_hello(settings: WorkerSettings, spec: ModelSpec, executor: Executor) -> worker_pb2.WorkerHello:
    """Introduces the worker; measures its rates first, which overwrites KV blocks."""
    swap_out, swap_in = executor.measure_swaps()
    chunk_steps = [
        worker_pb2.ChunkStep(rows=rows, nanoseconds=ns)
        for rows, ns in executor.chunk_graphs.measure(executor.runtime).items()
    ]
    pool = executor.pool
    log.info("swap rates", swap_out_bytes_per_second=swap_out, swap_in_bytes_per_second=swap_in)
    return worker_pb2.WorkerHello(
        protocol_version=PROTOCOL_VERSION,
        worker_id=f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}",
        kernel_version=kernel_version(pool.device_blocks.device),
        device=device_name(pool.device_blocks.device),
        model=worker_pb2.ModelInfo(
            name=settings.served_model_name or default_name(settings.model),
            fingerprint=spec.fingerprint,
            architecture=spec.architecture,
            vocab_size=spec.vocab_size,
            max_model_len=spec.max_model_len,
            dtype=str(spec.dtype).removeprefix("torch."),
            eos_token_ids=spec.eos_token_ids,
        ),
        capacity=worker_pb2.WorkerCapacity(
            block_size=pool.layout.block_size,
            num_blocks=pool.num_blocks,
            host_blocks=pool.num_host_blocks,
            block_bytes=pool.layout.block_bytes,
            max_slots=settings.max_num_seqs,
            max_step_tokens=settings.token_budget,
        ),
        swap_out_bytes_per_second=swap_out,
        swap_in_bytes_per_second=swap_in,
        chunk_steps=chunk_steps,
    )


def device_name(device: torch.device) -> str:
    """`cpu` or `cuda`, with the device's own name behind a colon."""
    if device.type == "cuda":
        return f"cuda:{torch.cuda.get_device_name(device)}"
    return f"cpu:{torch.get_num_threads()} threads"


def kernel_version(device: torch.device) -> str:
    """What computes: torch, and CuPy for the kernels on a GPU."""
    versions = [f"torch-{torch.__version__}"]
    if device.type == "cuda":
        import cupy

        versions.append(f"cupy-{cupy.__version__}")
    return " ".join(versions)


def default_name(model: str) -> str:
    """The name a model is served under: a directory's last part, or the hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def fail(error: BaseException) -> NoReturn:
    """Ends the process at once: after a failed step nothing it computes can be trusted."""
    what = "plan refused" if isinstance(error, PlanError) else "step failed"
    log.error(what, error=f"{type(error).__name__}: {error}", exc_info=error)
    sys.stderr.flush()
    os._exit(EXIT_STEP_FAILED)
