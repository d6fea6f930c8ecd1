"""The supervisor: real processes, with stand-ins for the roles."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pagewire.supervisor import Child, Supervisor, UpSettings, supervise
from tests.pagewire.fake_roles import COMMAND

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0


class Up:
    """A supervisor under test."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.folder = folder
        self.ready_file = folder / "ready.json"
        self.process = subprocess.Popen(
            [*COMMAND, "up", "--ready-file", str(self.ready_file), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "FAKE_FOLDER": str(folder), **environment},
        )

    def wait_ready(self) -> dict[str, Any]:
        wait_until(self.ready_file.exists)
        return self.ready()

    def ready(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.ready_file.read_text())
        return content

    def flags_of(self, pid: int) -> list[str]:
        flags: list[str] = json.loads((self.folder / f"{pid}.json").read_text())["flags"]
        return flags

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, output, errors


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls what no event tells: another process's file or death."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def pids(ready: dict[str, Any]) -> list[int]:
    return [ready["pids"]["scheduler"], *ready["pids"]["workers"], *ready["pids"]["gateways"]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def make(*flags: str, **environment: str) -> Up:
        started.append(Up(tmp_path, *flags, **environment))
        return started[-1]

    yield make
    for up in started:
        if up.process.poll() is None:
            up.process.kill()
        up.process.communicate()


def test_the_ready_file_names_the_doors_and_every_process(start: Callable[..., Up]) -> None:
    up = start("--workers", "2", "--gateways", "2")
    ready = up.wait_ready()
    assert ready.keys() == {"grpc", "http", "metrics", "pids"}
    assert (ready["grpc"], ready["http"], ready["metrics"]) == ("127.0.0.1:7777", None, "127.0.0.1:9999")
    assert len(ready["pids"]["workers"]) == len(ready["pids"]["gateways"]) == 2
    assert all(psutil.pid_exists(pid) for pid in pids(ready))
    code, output, _errors = up.stop()
    assert code == 0
    assert "gRPC 127.0.0.1:7777, HTTP off" in output
    assert output.count(" ready after ") == 5, "one line per process"


def test_a_ready_file_of_an_earlier_run_is_removed_before_anything_starts(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    (tmp_path / "ready.json").write_text("old")
    code, _output, _errors = start(FAKE_WORKER="refuse").end()
    assert code == 2
    assert not (tmp_path / "ready.json").exists()


def test_a_ready_file_that_cannot_be_written_ends_the_start_with_one_line(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    name = "x" * 255  # the temporary file beside it has too long a name
    code, _output, errors = start("--ready-file", str(tmp_path / name)).end()
    assert code == 2
    assert errors == f"pagewire up: --ready-file {tmp_path / name}: File name too long\n"


def test_the_children_read_their_tables_of_the_configuration_file(start: Callable[..., Up], tmp_path: Path) -> None:
    config = tmp_path / "pagewire.toml"
    config.write_text("[up]\nworkers = 2\n[scheduler]\nretention_s = 5\n")
    up = start("--config", str(config))
    ready = up.wait_ready()
    assert len(ready["pids"]["workers"]) == 2
    assert all(psutil.Process(pid).environ()["PAGEWIRE_CONFIG"] == str(config) for pid in pids(ready))


def test_each_worker_has_a_gpu_of_its_own_and_keeps_it_when_it_is_replaced(start: Callable[..., Up]) -> None:
    def gpu(worker: int) -> str | None:
        return psutil.Process(worker).environ().get("CUDA_VISIBLE_DEVICES")

    up = start("--workers", "2", CUDA_VISIBLE_DEVICES="5,2")
    before = up.wait_ready()
    assert [gpu(pid) for pid in before["pids"]["workers"]] == ["5", "2"]
    os.kill(before["pids"]["workers"][1], signal.SIGKILL)
    wait_until(lambda: up.ready() != before)
    assert gpu(up.ready()["pids"]["workers"][1]) == "2"
    assert gpu(before["pids"]["scheduler"]) == "5,2"


@pytest.mark.parametrize("flags", [["--workers", "2", "--device", "cpu"], ["--workers", "1"]], ids=["cpu", "alone"])
def test_workers_on_the_cpu_and_one_alone_see_what_the_supervisor_sees(
    start: Callable[..., Up], flags: list[str]
) -> None:
    workers = start(*flags, CUDA_VISIBLE_DEVICES="5,2").wait_ready()["pids"]["workers"]
    assert {psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in workers} == {"5,2"}


def test_a_long_temporary_folder_is_no_obstacle_to_the_socket_between_the_roles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    seen: list[str] = []

    async def look(self: Supervisor) -> None:
        seen.append(self.scheduler_address)

    monkeypatch.setattr(Supervisor, "run", look)
    asyncio.run(supervise(UpSettings()))
    (address,) = seen
    assert len(address.removeprefix("unix:")) <= 107


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_children_and_exits_0(start: Callable[..., Up], number: signal.Signals) -> None:
    up = start()
    ready = up.wait_ready()
    assert up.stop(number)[0] == 0
    assert not any(psutil.pid_exists(pid) for pid in pids(ready))


def test_a_killed_worker_is_replaced_and_the_ready_file_names_the_new_one(start: Callable[..., Up]) -> None:
    up = start("--workers", "2")
    before = up.wait_ready()
    os.kill(before["pids"]["workers"][1], signal.SIGKILL)
    wait_until(lambda: up.ready() != before)
    after = up.ready()
    assert after["pids"]["workers"][0] == before["pids"]["workers"][0], "the other worker goes on"
    assert after["pids"]["workers"][1] != before["pids"]["workers"][1]
    assert after["pids"]["gateways"] == before["pids"]["gateways"]
    wait_until(lambda: (up.folder / f"{after['pids']['workers'][1]}.json").exists())
    code, _output, errors = up.stop()
    assert code == 0
    assert "worker 1 was ended by SIGKILL; starting it again in 0.1 s" in errors


def test_a_replaced_gateway_listens_where_the_first_one_did(start: Callable[..., Up]) -> None:
    up = start("--grpc-port", "0")
    before = up.wait_ready()
    (gateway,) = before["pids"]["gateways"]
    assert "127.0.0.1:0" in up.flags_of(gateway)
    os.kill(gateway, signal.SIGKILL)
    wait_until(lambda: up.ready() != before)
    (replacement,) = up.ready()["pids"]["gateways"]
    wait_until(lambda: (up.folder / f"{replacement}.json").exists())
    assert "127.0.0.1:7777" in up.flags_of(replacement)


def test_a_child_that_cannot_start_hands_up_its_line_once_and_the_exit_code_is_2(start: Callable[..., Up]) -> None:
    up = start("--workers", "3", FAKE_WORKER="refuse")
    code, _output, errors = up.end()
    assert code == 2
    assert errors.splitlines() == ["pagewire up: worker: no config.json in /nowhere: name another --model"]
    assert not up.ready_file.exists()


def test_a_child_that_crashes_before_it_is_ready_is_tried_three_times(start: Callable[..., Up]) -> None:
    up = start(FAKE_GATEWAY="crash")
    code, _output, errors = up.end()
    assert code == 2
    assert errors.splitlines()[-1] == (
        "pagewire up: gateway 0 ended 3 times before it was ready, last exited with code 1"
    )
    attempts = [json.loads(path.read_text())["role"] for path in up.folder.glob("*.json")]
    assert attempts.count("gateway") == 3


def test_a_child_that_ignores_sigterm_is_killed(start: Callable[..., Up]) -> None:
    up = start(FAKE_WORKER="stubborn")
    ready = up.wait_ready()
    code, _output, errors = up.stop()
    assert code == 0
    assert "worker 0 did not stop within 5 s and is killed" in errors
    assert not any(psutil.pid_exists(pid) for pid in pids(ready))


def test_a_start_that_fails_is_one_line_even_if_another_child_has_to_be_killed(start: Callable[..., Up]) -> None:
    up = start(FAKE_SCHEDULER="refuse", FAKE_WORKER="slow")
    code, _output, errors = up.end()
    assert code == 2
    assert errors.splitlines() == ["pagewire up: scheduler: no config.json in /nowhere: name another --model"]


def test_no_child_outlives_a_supervisor_that_is_killed(start: Callable[..., Up]) -> None:
    up = start(FAKE_WORKER="stubborn")
    children = [psutil.Process(pid) for pid in pids(up.wait_ready())]
    up.process.kill()
    gone, alive = psutil.wait_procs(children, timeout=LIMIT_S)
    assert (len(gone), alive) == (3, [])


def test_flags_go_to_the_role_concerned(start: Callable[..., Up]) -> None:
    up = start(
        *("--model", "some/model", "--served-model-name", "tiny", "--device", "cpu", "--dtype", "float32"),
        *("--block-size", "4", "--num-blocks", "100", "--host-blocks", "50", "--max-num-seqs", "8"),
        *("--token-budget", "64", "--preemption-mode", "swap", "--no-prefix-cache", "--metrics-port", "0"),
    )
    ready = up.wait_ready()
    socket = f"unix:{up.folder}/scheduler.sock"
    own = ["--log-level", "warning"]

    def flags_of(pid: int) -> list[str]:
        flags = up.flags_of(pid)
        position = flags.index("--ready-fd")
        return flags[:position] + flags[position + 2 :]

    assert flags_of(ready["pids"]["scheduler"]) == [
        *("--listen", socket, "--metrics-port", "0", "--max-num-seqs", "8", "--token-budget", "64"),
        *("--preemption-mode", "swap", "--no-prefix-cache", *own),
    ]
    assert flags_of(ready["pids"]["workers"][0]) == [
        *("--scheduler", socket, "--model", "some/model", "--served-model-name", "tiny", "--device", "cpu"),
        *("--dtype", "float32", "--block-size", "4", "--num-blocks", "100", "--host-blocks", "50"),
        *("--max-num-seqs", "8", "--token-budget", "64", *own),
    ]
    assert flags_of(ready["pids"]["gateways"][0]) == [
        *("--scheduler", socket, "--listen", "127.0.0.1:50051", "--http-listen", "127.0.0.1:8000"),
        *("--model", "some/model"),
        *("--served-model-name", "tiny", *own),
    ]


def test_a_metrics_port_in_the_environment_is_the_schedulers_alone(start: Callable[..., Up]) -> None:
    up = start(PAGEWIRE_METRICS_PORT="9555")
    ready = up.wait_ready()
    flags = up.flags_of(ready["pids"]["scheduler"])
    assert flags[flags.index("--metrics-port") + 1] == "9555"
    for pid in (*ready["pids"]["workers"], *ready["pids"]["gateways"]):
        assert "PAGEWIRE_METRICS_PORT" not in psutil.Process(pid).environ()


def test_gateways_take_consecutive_ports(start: Callable[..., Up]) -> None:
    up = start("--gateways", "2", "--grpc-port", "6000", "--http-port", "7000", "--api-keys-file", "/some/keys")
    for index, pid in enumerate(up.wait_ready()["pids"]["gateways"]):
        flags = up.flags_of(pid)
        assert flags[flags.index("--listen") + 1] == f"127.0.0.1:{6000 + index}"
        assert flags[flags.index("--http-listen") + 1] == f"127.0.0.1:{7000 + index}"
        assert flags[flags.index("--api-keys-file") + 1] == "/some/keys"


def test_http_can_be_turned_off(start: Callable[..., Up]) -> None:
    up = start("--no-http")
    (gateway,) = up.wait_ready()["pids"]["gateways"]
    flags = up.flags_of(gateway)
    assert flags[flags.index("--http-listen") + 1] == "off"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--tensor-parallel", "2"],
            "--tensor-parallel above 1 is not built yet: leave it out, and use --workers for replicas",
        ),
        (
            ["--workers", "2", "--replicas", "3"],
            "--replicas and --workers are the same setting: give only one of them",
        ),
        (["--ready-file", "/nowhere/ready.json"], "--ready-file: the folder /nowhere does not exist"),
        (["--ready-file", "/tmp"], "--ready-file: /tmp is a folder; give a file in it"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_one_line(
    start: Callable[..., Up], flags: list[str], line: str
) -> None:
    code, _output, errors = start(*flags).end()
    assert code == 2
    assert errors == f"pagewire up: {line}\n"


def test_the_pause_before_a_restart_doubles_with_recent_deaths_and_has_a_bound() -> None:
    child = Child("worker", 0, list)
    child.deaths.append(100.0)
    assert child.delay_s(100.0) == 0.1
    child.deaths.extend([100.0, 100.0])
    assert child.delay_s(100.0) == 0.4
    assert child.delay_s(200.0) == 0.1, "old deaths are forgotten"
    child.failed_starts = 40
    assert child.delay_s(200.0) == 30.0
