"""Rows over real processes: scheduler, a worker around a stand-in device, a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pagewire.bench import serve, suite, throughput, workloads
from pagewire.bench.results import ROOT
from pagewire.bench.runner import Runner
from pagewire.bench.service import Launch
from pagewire.bench.session import BenchError, Session, loads
from pagewire.bench.workloads import Job, Scale

STAND_IN = ("benchmarks.host_path", "worker")


@pytest.fixture
async def runner(tmp_path: Path) -> AsyncIterator[Runner]:
    launch = Launch(model="0.2", max_num_seqs=16, token_budget=256, gateways=1, http=True, worker_module=STAND_IN)
    found = Runner(launch, tmp_path, say=lambda _line: None)
    yield found
    await found.stop()


def online_tokens(count: int) -> int:
    jobs, _ = workloads.online(1.0, count, Scale(lengths=0.1), 31_000)
    return workloads.totals(jobs)[1]


async def test_rows_are_measured_at_session_and_gateway_and_a_lost_worker_is_one_failed_row(runner: Runner) -> None:
    scale = Scale(requests=0.01, lengths=0.25)

    async def offline() -> dict[str, object]:
        return await throughput.measure(runner, "alpaca-like-2000", scale=scale, repeat=2, vocab_size=31_000)

    row = await runner.row({"workload": "alpaca-like-2000"}, 60, offline)
    assert "error" not in row
    assert (row["requests"], len(row["runs_s"]), row["preemptions"]) == (20, 2, 0)
    assert row["cached_tokens"] == 0, "a run must not find another's prefixes"
    assert 0 <= row["gpu_idle_ratio"] <= 1

    for place in suite.PLACES:
        online = await serve.measure(
            runner,
            place,
            serve.Load(rate=200.0),
            20,
            scale=Scale(lengths=0.1),
            limits=serve.DEFAULT_LIMITS,
            vocab_size=31_000,
        )
        assert online["requests"] == 20
        assert ("gateway_cpu_us_per_token" in online) == (place != "session")
        assert 0 < online["ttft_ms"]["p50"] <= online["ttft_ms"]["p99"]

    for place in ("gateway", "openai"):
        side_by_side = await serve.measure(
            runner,
            place,
            serve.Load(concurrency=3),
            9,
            scale=Scale(lengths=0.1),
            limits=serve.DEFAULT_LIMITS,
            vocab_size=31_000,
        )
        assert side_by_side["requests"] == 9
        assert side_by_side["out_tokens"] == online_tokens(9)

    assert runner.service is not None
    worker = runner.service.pids["worker"]

    async def broken() -> dict[str, object]:
        os.kill(worker, signal.SIGKILL)
        return await offline()

    row = await runner.row({"workload": "broken"}, 60, broken)
    assert row.keys() == {"workload", "error"}
    assert "the worker process ended with code -9" in row["error"]
    row = await runner.row({"workload": "after"}, 60, offline)
    assert "error" not in row, "the service is started again for the next row"


async def test_a_row_that_takes_too_long_is_cut_short_and_leaves_nothing_running(runner: Runner) -> None:
    await runner.vocab_size()

    async def endless() -> dict[str, object]:
        await throughput.run(runner, [Job([11] * 8, 400_000)], "endless")
        raise AssertionError("it cannot end")

    row = await runner.row({"workload": "endless"}, 1.0, endless)
    assert row == {"workload": "endless", "error": "cut short after 1 s"}
    (load,) = (await loads(runner.scheduler)).loads
    assert (load.running, load.waiting) == (0, 0)


async def test_a_row_with_time_for_one_run_has_the_values_of_that_run(runner: Runner) -> None:
    await runner.vocab_size()
    row = await throughput.measure(
        runner, "decode-b8", scale=Scale(lengths=0.25), repeat=50, vocab_size=31_000, limit_s=0.001
    )
    assert len(row["runs_s"]) == 1
    assert row["spread"] is None


async def test_the_token_budget_changes_while_the_worker_stays(tmp_path: Path) -> None:
    launch = Launch(
        model="0",
        max_num_seqs=4,
        token_budget=64,
        online_token_budget=32,
        online_target_itl_ms=5.0,
        gateways=1,
        worker_module=STAND_IN,
    )
    runner = Runner(launch, tmp_path, say=lambda _line: None)
    try:
        await runner.vocab_size()
        assert runner.service is not None
        before = runner.service.pids
        await runner.begin_online()
        after = runner.service.pids
        assert after["worker"] == before["worker"]
        assert after["scheduler"] != before["scheduler"]
        async with Session(runner.scheduler, "again") as session:
            await session.submit(session.prepare([Job([11] * 100, 4)]))
            await session.drain()
            assert session.num_tokens == 4
    finally:
        await runner.stop()


async def test_a_refused_request_is_a_clear_error(runner: Runner) -> None:
    await runner.vocab_size()
    async with Session(runner.scheduler, "refused") as session:
        await session.submit(session.prepare([Job([31_000], 4)]))
        with pytest.raises(BenchError, match="token_ids must be below the vocabulary size 31000"):
            await session.drain()


def bench(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagewire.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def test_a_missing_matplotlib_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    result = bench("serve", "--plot", "rows.svg", environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert result.returncode == 2
    assert result.stderr == "pagewire bench: the package matplotlib is missing: pip install 'pagewire[bench]'\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["throughput", "--workload", "decode"],
            "pagewire bench: there is no workload 'decode': the names are",
        ),
        (["throughput", "--scale", "2"], "pagewire bench: --scale and --length-scale must be above 0 and at most 1"),
        (["serve", "--door", "back"], "pagewire bench: --door back is unknown: use grpc, openai, session"),
        (["serve", "--goodput", "ttft:soon"], "pagewire bench: --goodput ttft:soon is no limit: write ttft:200ms"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], expected: str) -> None:
    result = bench(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(expected)


@pytest.mark.slow
def test_the_command_measures_a_real_model_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "offline.json"
    small = [
        "--scale",
        "0.004",
        "--length-scale",
        "0.1",
        "--max-num-seqs",
        "8",
        "--num-blocks",
        "512",
        "--device",
        "cpu",
    ]
    tiny = ["--model", str(ROOT / "benchmarks" / "configs" / "tiny"), "--load-format", "dummy"]
    names = ["--workload", "decode-b8", "--workload", "sharegpt-like-1000"]
    result = bench("throughput", *names, *small, *tiny, "--output", str(output), "--logs", str(tmp_path / "logs"))
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(output.read_text())
    assert {"gpu", "versions", "commit", "command", "rows"} <= content.keys()
    assert [row["workload"] for row in content["rows"]] == ["decode-b8", "sharegpt-like-1000"]
    for row in content["rows"]:
        assert {"out_tok_s", "total_tok_s", "seconds", "gpu_idle_ratio", "spread"} <= row.keys()


async def test_without_a_scheduler_a_session_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire.bench.session.START_TIMEOUT_S", 0.5)
    with pytest.raises(BenchError, match=r"no worker is ready at the scheduler|UNAVAILABLE"):
        async with asyncio.timeout(20), Session(f"unix:{tmp_path}/nobody.sock", "nobody"):
            pass
