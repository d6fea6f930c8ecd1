"""A running service, as its control service tells it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from pagewire import __version__
from pagewire.doctor.check import Check
from pagewire.errors import StatusError
from pagewire.runtime.channel import client_options
from pagewire.terminal.figures import Answers
from pagewire.terminal.watch import ask
from pagewire.v1 import control_pb2_grpc

NS_PER_S = 1e9
FULL_RATIO = 0.98


def check_service(address: str) -> Iterator[Check]:
    """Asks the service at `address` and judges the answer."""
    with grpc.insecure_channel(address, options=client_options(internal=False)) as channel:
        try:
            answers = ask(control_pb2_grpc.ControlServiceStub(channel), address)
        except StatusError as error:
            yield unreachable(error)
            return
    yield from judge(answers)


def unreachable(error: StatusError) -> Check:
    """Why nothing could be asked."""
    mend = {
        "NO_SCHEDULER": "the gateway runs, its scheduler does not: start one, or check the gateway's --scheduler",
    }.get(error.reason, "start it with pagewire up, or check the address")
    if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        mend = "the process is frozen or overloaded: look at it (py-spy dump), and end it so that it is restarted"
    elif error.code is grpc.StatusCode.UNIMPLEMENTED:
        mend = "something else, or an older Pagewire, listens there"
    return Check("service", "bad", str(error), mend)


def judge(answers: Answers) -> Iterator[Check]:
    """Checks of what a service said."""
    server, loads = answers.server, answers.loads
    if server.version != __version__:
        mend = "install the same version on both sides"
        yield Check("service", "note", f"Pagewire {server.version} there, {__version__} here", mend)
    else:
        yield Check("service", "ok", f"Pagewire {server.version}, up {server.uptime_ns / NS_PER_S:.0f} s")
    if loads.draining:
        mend = "ControlService.Drain with resume takes requests again; or restart the scheduler"
        yield Check("admission", "note", "draining: new requests are refused", mend)
    if not answers.workers.workers:
        mend = "start a worker (pagewire worker --scheduler ...), or read its log: it may have failed at its start"
        yield Check("workers", "bad", "none has joined", mend)
    for info in answers.workers.workers:
        name = f"worker {info.hello.worker_id}"
        heard = info.since_heartbeat_ns / NS_PER_S
        if info.stalled:
            mend = "frozen: end its process, the supervisor starts another and its requests go on (kill -9 PID)"
            yield Check(name, "bad", f"owes a result and makes no progress; last heard of {heard:.1f} s ago", mend)
        else:
            yield Check(name, "ok", f"{info.hello.device}, epoch {info.epoch}, {info.last_step} steps")
    for load in loads.loads:
        if load.waiting and load.total_blocks and load.free_blocks <= (1 - FULL_RATIO) * load.total_blocks:
            mend = "more workers, a larger --num-blocks or --gpu-memory-utilization, or shorter requests"
            used = load.total_blocks - load.free_blocks
            found = f"{used} of {load.total_blocks} blocks used, {load.waiting} requests wait"
            yield Check(f"KV pool of {load.worker_id}", "note", found, mend)
        if load.swapped and not load.free_host_blocks:
            mend = "a larger --host-blocks: what does not fit is computed again"
            yield Check(f"swap arena of {load.worker_id}", "note", f"all {load.total_host_blocks} blocks used", mend)
    kernels = {info.hello.kernel_version for info in answers.workers.workers}
    if len(kernels) > 1:
        mend = "install the same Pagewire on all: outputs of one seed may differ from worker to worker"
        yield Check("kernels", "note", f"workers have {', '.join(sorted(kernels))}", mend)
