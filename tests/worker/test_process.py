"""The worker as a process: what it says, what it answers, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.v1 import inference_pb2, worker_pb2
from tests.worker.fake_scheduler import FakeScheduler, Session

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120
"""A cold import of torch on a busy machine takes most of it."""
SMALL = ["--max-model-len", "64", "--num-blocks", "16", "--host-blocks", "8", "--max-num-seqs", "4", "--device", "cpu"]


class WorkerProcess:
    """`pagewire worker` with the bundled model and little memory."""

    def __init__(self, scheduler: str, *arguments: str, fault_points: str = "") -> None:
        self.ready_pipe, ready_fd = os.pipe()
        command = [sys.executable, "-m", "pagewire.cli", "worker", "--scheduler", scheduler]
        self.process = subprocess.Popen(
            [*command, "--ready-fd", str(ready_fd), *SMALL, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT_POINTS": fault_points},
            stderr=subprocess.PIPE,
            pass_fds=[ready_fd],
        )
        os.close(ready_fd)

    def ready(self) -> dict[str, str]:
        """What it announced; empty if it ended without."""
        with os.fdopen(self.ready_pipe) as pipe:
            line = pipe.readline()
        return json.loads(line) if line else {}

    def wait(self) -> tuple[int, str]:
        """Exit code and everything it wrote to stderr."""
        _, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, errors.decode()


@pytest.fixture
def scheduler() -> Iterator[FakeScheduler]:
    scheduler = FakeScheduler()
    yield scheduler
    scheduler.stop()


def send_sequence(session: Session) -> None:
    new = worker_pb2.NewSequence(
        slot=0,
        token_ids=[5, 6, 7],
        prompt_tokens=3,
        blocks=[3],
        sampling=inference_pb2.SamplingParams(temperature=0, seed=1),
    )
    session.plan(new_sequences=[new], chunk_slots=[0], chunk_tokens=[3])


def test_a_worker_introduces_itself_serves_and_ends_cleanly_on_sigterm(scheduler: FakeScheduler) -> None:
    worker = WorkerProcess(scheduler.address, "--served-model-name", "small")
    session = scheduler.session()
    hello = session.hello
    assert worker.ready() == {"worker_id": hello.worker_id}
    assert hello.protocol_version == 1
    assert hello.device.startswith("cpu")
    assert (hello.model.name, hello.model.architecture) == ("small", "LlamaForCausalLM")
    assert (hello.model.max_model_len, hello.model.dtype) == (64, "float32")
    capacity = hello.capacity
    assert (capacity.block_size, capacity.num_blocks, capacity.host_blocks, capacity.max_slots) == (16, 16, 8, 4)
    assert capacity.max_step_tokens == 2048
    assert hello.swap_out_bytes_per_second > 0
    assert hello.swap_in_bytes_per_second > 0
    send_sequence(session)
    (token,) = session.result().token_ids
    assert token < hello.model.vocab_size
    worker.process.send_signal(signal.SIGTERM)
    code, errors = worker.wait()
    assert code == 0
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "point",
    ["worker.step.before_forward", "worker.step.after_forward", "worker.step.mid_swap", "worker.step.before_send"],
)
def test_a_worker_dies_where_a_fault_point_says(scheduler: FakeScheduler, point: str) -> None:
    worker = WorkerProcess(scheduler.address, fault_points=f"{point}:kill@2")
    session = scheduler.session()
    worker.ready()
    send_sequence(session)
    assert session.result().step == 1
    moves = worker_pb2.BlockMoves(sources=[9], destinations=[1])
    session.plan(decode_add=[0], swap_out=moves)
    session.plan(swap_in=worker_pb2.BlockMoves(sources=[1], destinations=[9]))
    code, errors = worker.wait()
    assert code == -signal.SIGKILL
    assert f"fault point {point}: kill (visit 2)" in errors


def test_a_failed_step_ends_the_process_with_one_line(scheduler: FakeScheduler) -> None:
    worker = WorkerProcess(scheduler.address)
    session = scheduler.session()
    worker.ready()
    session.plan(decode_add=[2])
    code, errors = worker.wait()
    assert code == 1
    (line,) = [json.loads(line) for line in errors.splitlines() if "plan refused" in line]
    assert line["error"] == "PlanError: decode_add: not all of [2] are rows in use"
    assert session.results.empty()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--block-size", "12"], "power of two"),
        (["--num-blocks", "100000000"], "needed"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_what_cannot_start_says_so_in_one_line_and_exits_2(
    scheduler: FakeScheduler, arguments: list[str], message: str
) -> None:
    worker = WorkerProcess(scheduler.address, *arguments)
    answer = worker.ready()
    code, errors = worker.wait()
    assert code == 2
    assert message in answer["error"]
    assert "Traceback" not in errors


def test_a_refused_worker_exits_2_with_the_schedulers_reason(scheduler: FakeScheduler) -> None:
    scheduler.refusal = "fingerprints differ"
    worker = WorkerProcess(scheduler.address)
    assert "fingerprints differ" in worker.ready()["error"]
    assert worker.wait()[0] == 2
