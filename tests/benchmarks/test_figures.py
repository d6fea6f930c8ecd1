"""From times to a row's values, and from rows to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import kv_waste, report
from pagewire.bench import doors, metrics, serve, throughput, workloads
from pagewire.bench.anchors import OFFLINE, ONLINE
from pagewire.bench.results import ROOT, Recorder, command, merged, percentiles, relative_spread
from pagewire.bench.serve import Limits
from pagewire.bench.session import BenchError, Times
from pagewire.bench.workloads import Job, Scale

MS = 1_000_000


def times(due_ms: int, *arrivals_ms: int, tokens: int | None = None) -> Times:
    arrivals = [moment * MS for moment in arrivals_ms]
    return Times(due=due_ms * MS, sent=due_ms * MS, arrivals=arrivals, tokens=tokens or len(arrivals))


def test_latencies_count_from_when_a_request_was_due_and_between_messages() -> None:
    jobs = [Job([1], 3), Job([1, 2], 2)]
    row = serve.summary([times(0, 10, 15, 25), times(100, 130, 135)], jobs, Limits(ttft_ms=20, itl_ms=50))
    assert row["ttft_ms"] == {"p50": 20.0, "p90": 28.0, "p95": 29.0, "p99": 29.8}
    assert row["itl_ms"]["p50"] == 5.0
    assert row["seconds"] == 0.135
    assert row["out_tok_s"] == round(5 / 0.135, 1)


def test_goodput_counts_requests_that_keep_both_limits() -> None:
    jobs = [Job([1], 3)] * 3
    slow_start, slow_tokens, good = times(0, 500, 501, 502), times(0, 10, 200, 400), times(0, 10, 20, 30)
    row = serve.summary([slow_start, slow_tokens, good], jobs, Limits(ttft_ms=100, itl_ms=50))
    assert row["goodput"]["share"] == pytest.approx(0.3333)


def test_a_limit_that_is_not_set_refuses_nobody() -> None:
    jobs = [Job([1], 3)] * 2
    row = serve.summary([times(0, 500, 900), times(0, 10, 20)], jobs, Limits(None, None, e2e_ms=100))
    assert row["goodput"]["share"] == 0.5
    assert row["e2e_ms"]["p50"] == 460.0


def test_events_that_come_in_pieces_have_the_time_of_their_last_piece() -> None:
    token = b'data: {"choices": [{"token_ids": [7, 8]}]}\n\n'
    chunks = [(1, token[:10]), (2, token[10:] + token), (3, b"data: [DONE]\n\n")]
    found = doors.events(chunks)
    assert [arrived for arrived, _ in found] == [2, 2, 3]
    assert [doors.num_tokens(event) for _, event in found] == [2, 2, 0]


def test_an_error_in_a_stream_fails_the_row() -> None:
    with pytest.raises(BenchError, match="a stream failed: the queue is full"):
        doors.num_tokens(b'data: {"error": {"message": "the queue is full"}}')


def test_a_plot_of_both_doors_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'pagewire[bench]'")
    from pagewire.bench.plot import plot_online

    rows = []
    for load in ({"rate": 1.0}, {"rate": 2.0}):
        for at in ("gateway", "openai"):
            values = serve.summary([times(0, 10, 20)], [Job([1], 2)], Limits())
            rows.append({**load, "at": at, **values})
    plot_online([*rows, {"rate": 3.0, "at": "openai", "error": "cut short"}], tmp_path / "rows.svg")
    text = (tmp_path / "rows.svg").read_text()
    assert "<svg" in text


def test_percentiles_are_interpolated() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0]) == {"p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97}


def test_a_single_run_has_no_spread() -> None:
    assert relative_spread([2.0]) is None
    assert relative_spread([1.9, 2.0, 2.1]) == 0.1


def test_a_recorded_command_names_no_folder_of_the_machine_that_ran_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        f"{ROOT}/benchmarks/configs/tiny",
        "/somewhere/out/rows.json",
        "--url",
        "http://127.0.0.1:1/v1",
        "-k",
        "a/b",
    ]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert command().endswith(" benchmarks/configs/tiny rows.json --url http://127.0.0.1:1/v1 -k a/b")


def test_a_recorded_file_holds_every_row_as_soon_as_it_is_known(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "new" / "offline.json", {"gpu": None})
    recorder.add({"workload": "decode-b1", "error": "the worker was lost"})
    assert json.loads((tmp_path / "new" / "offline.json").read_text()) == {
        "gpu": None,
        "rows": [{"workload": "decode-b1", "error": "the worker was lost"}],
    }


PAGE = """# HELP pagewire_step_seconds Where the time of a step goes.
pagewire_step_seconds_count{part="plan"} 10.0
pagewire_step_seconds_sum{part="plan"} 0.002
pagewire_step_seconds_count{part="forward"} 9.0
pagewire_step_seconds_sum{part="forward"} 0.09
pagewire_worker_gpu_idle_seconds_total{worker="w"} 1.5
pagewire_preemptions_total{mode="swap"} 1.0
pagewire_preemptions_total{mode="recompute"} 2.0
"""


def test_differences_of_two_metrics_pages_give_idle_time_and_parts_of_a_step() -> None:
    before = metrics.parse('pagewire_worker_gpu_idle_seconds_total{worker="w"} 1.0\n')
    found = metrics.used(before, metrics.parse(PAGE))
    assert found.idle_s == 0.5
    assert (found.steps, found.preemptions) == (10, 3)
    assert found.part_ms["plan"] == 0.2
    assert found.part_ms["forward"] == 10.0


def test_a_row_is_held_against_the_peer_in_its_own_unit() -> None:
    assert OFFLINE["decode-b1"].ratio({"out_tok_s": 402}) == 2.0
    assert OFFLINE["prefill-64x4096"].ratio({"seconds": 3.255}) == 2.0
    assert OFFLINE["decode-b1"].meets_goal({"out_tok_s": 255})
    assert not OFFLINE["prefill-64x4096"].meets_goal({"seconds": 6.1})
    assert not OFFLINE["decode-b1"].meets_goal({"error": "the worker was lost"})


def test_an_online_row_must_be_better_in_all_four_and_within_the_goal() -> None:
    better = {"ttft_ms": {"p50": 20.0, "p99": 70.0}, "itl_ms": {"p50": 5.0, "p99": 8.9}}
    assert ONLINE[10.0].meets_goal(better)
    assert not ONLINE[10.0].meets_goal({**better, "itl_ms": {"p50": 5.0, "p99": 9.5}})
    assert not ONLINE[10.0].meets_goal({**better, "ttft_ms": {"p50": 22.0, "p99": 70.0}})


def test_tables_show_failed_rows_too() -> None:
    lines = throughput.table([{"workload": "decode-b1", "error": "cut short after 60 s"}], compare=True)
    assert lines[1] == ["decode-b1", "error: cut short after 60 s"]


def test_kv_waste_is_under_the_bar_on_a_reduced_load() -> None:
    jobs = workloads.offline(kv_waste.WORKLOAD, Scale(0.15))
    ratios = kv_waste.simulate(jobs, kv_waste.BAR_BLOCK_SIZE, max_num_seqs=64)
    assert len(ratios) > 200
    assert sum(ratios) / len(ratios) < kv_waste.BAR


def test_blocks_of_one_token_waste_nothing() -> None:
    jobs = workloads.offline(kv_waste.WORKLOAD, Scale(0.05, 0.25))
    assert max(kv_waste.simulate(jobs, 1, max_num_seqs=64)) == 0.0


def test_the_page_shows_recorded_rows_beside_the_peer_and_says_what_is_missing() -> None:
    recorded = {
        "gpu": "NVIDIA H200",
        "commit": "abc",
        "rows": [
            {"workload": "decode-b1", "out_tok_s": 261.3, "seconds": 0.98, "spread": 0.012, "gpu_idle_ratio": 0.031},
            {"workload": "decode-b8", "error": "cut short after 60 s"},
        ],
    }
    page = report.render({"h200/offline": recorded})
    assert "| decode-b1 | 261.3 | 1.2% | 3.1% | 201 | 1.30x | 278 | >= 255 |" in page
    assert "| decode-b8 | cut short after 60 s | - | - | 1,554 | - | 2,153 | >= 1,950 |" in page
    assert "| decode-b32 | not measured yet |" in page
    assert "gpu `NVIDIA H200`, commit `abc`" in page
    assert "| 10 requests/s, session | not measured yet |" in page


def test_the_page_compares_with_the_best_of_a_peer_s_rows_and_gives_the_reason_of_a_missing_one() -> None:
    def row(engine: str, **values: object) -> dict[str, object]:
        return {"workload": "decode-b8", "engine": engine, **values}

    results: dict[str, report.Content] = {
        "h100/offline": {"rows": [{"workload": "decode-b8", "out_tok_s": 900.0}]},
        "h100/peers": {"rows": [row("static-batch", out_tok_s=100.0), row("continuous-batching", out_tok_s=90.0)]},
        "h100/peers_again": {
            "rows": [
                row("static-batch", out_tok_s=150.0),
                row("continuous-batching-graphs", error="RuntimeError: out of memory"),
            ]
        },
    }
    assert "| decode-b8 | 900 | 90 | out of memory | 150 | 6.0x |" in report.peers(results)


def test_the_page_says_what_a_sanitizer_found_and_where_it_was_cut_short() -> None:
    def row(tool: str, errors: int, unfinished: list[str]) -> dict[str, object]:
        return {"tool": tool, "file": "test_decode", "errors": errors, "passed": 9, "unfinished": unfinished}

    planted = {"tool": "memcheck", "planted": "x", "errors": 0}
    results: dict[str, report.Content] = {
        "h200/sanitize": {"rows": [row("memcheck", 2, []), row("racecheck", 0, ["a", "b"]), planted]}
    }
    page = report.sanitizer(results)
    assert "| test_decode.py | 9 | 2 | 0, cut short in 2 |" in page
    assert "| x | memcheck | not found |" in page
    bare = {**row("racecheck", 0, []), "without_options": 4}
    assert "| test_decode.py | 9 | 0, 4 without options |" in report.sanitizer({"h200/sanitize": {"rows": [bare]}})
    results["h200/sanitize_again"] = {"rows": [row("racecheck", 0, []), {**row("memcheck", 1, []), "file": "more"}]}
    assert "| test_decode.py | 9 | 2 | 0 |" in report.sanitizer(results)
    assert "| more.py | 9 | 1 | not run |" in report.sanitizer(results)


def test_the_page_counts_the_gpu_tests() -> None:
    rows = [
        {"file": "tests/a.py", "passed": 7, "failed": 0, "skipped": 1},
        {"file": "tests/b.py", "passed": 2, "failed": 1, "skipped": 0},
    ]
    page = report.gpu_tests({"seconds": 90, "rows": rows})
    assert "| tests/b.py | 2 | 1 | 0 |" in page
    assert "| all | 9 | 1 | 1 |\n\nThat took 90 s." in page


def test_modes_of_preemption_stand_with_median_and_range_and_auto_beside_the_better_one() -> None:
    def row(mode: str, out_tok_s: float, mean_ms: float) -> dict[str, object]:
        times = {"p50": 7.0, "p95": 9.0, "p99": mean_ms}
        shared = {"itl_ms": {"p50": 7.5, "p99": 25.0}, "ttft_ms": {"p50": 2000.0, "p99": 4000.0}}
        return {"num_blocks": 1333, "mode": mode, "out_tok_s": out_tok_s, "mean_itl_ms": times, **shared}

    modes = [
        *(row("auto", rate, late) for rate, late in ((5000.0, 12.0), (4900.0, 14.0), (4950.0, 11.0))),
        *(row("swap", rate, late) for rate, late in ((4500.0, 15.0), (5100.0, 16.0))),
        row("recompute", 4400.0, 10.0),
        {"num_blocks": 1333, "mode": "recompute", "error": "cut short after 100 s"},
        row("swap", 5000.0, 15.0) | {"num_blocks": 500},
        row("auto", 4752.0, 5.0) | {"headroom": 0.3},
        row("swap", 4000.0, 1.0) | {"headroom": 0.3},
    ]
    page = report.pressure({"rows": modes})
    tail = "7.50 / 25.0 | 2.0 / 4.0 |"
    assert (
        "| 1,333 blocks, auto | 3 | 4,950 (4,900..5,000) | 7.00 (7.00..7.00) | 9.00 (9.00..9.00) "
        f"| 12.00 (11.00..14.00) | {tail}"
    ) in page
    assert f"| 1,333 blocks, recompute | 1 | 4,400 | 7.00 | 9.00 | 10.00 | {tail}" in page
    assert f"| 500 blocks, swap | 1 | 5,000 | 7.00 | 9.00 | 15.00 | {tail}" in page
    assert "| 1,333 blocks, auto | 103.1% | 100.0% | 100.0% | 120.0% |" in page
    assert "| 1,333 blocks, auto, headroom 0.3 | 99.0% | 100.0% | 100.0% | 50.0% |" in page
    assert "| 500 blocks, auto" not in page


def test_files_of_several_runs_become_one_only_if_machine_and_commit_are_the_same() -> None:
    one = {"gpu": "H100", "commit": "abc", "command": "run --pool 1", "rows": [{"pool": 1}]}
    other = {"gpu": "H100", "commit": "abc", "command": "run --pool 2", "rows": [{"pool": 2}, {"pool": 2}]}
    assert merged([one, other]) == {
        "gpu": "H100",
        "commit": "abc",
        "command": "run --pool 1; run --pool 2",
        "rows": [{"pool": 1}, {"pool": 2}, {"pool": 2}],
    }
    with pytest.raises(ValueError, match="the files differ in commit, gpu, seeds"):
        merged([one, {**other, "gpu": "H200", "commit": "abd", "seeds": {}}])


def test_the_page_is_made_of_what_is_recorded_here() -> None:
    results = report.read(report.RESULTS)
    page = report.render(results)
    for name in ("planning", "kv_waste", "host_path", "host_rows"):
        assert name in results
        assert f"[{name}.json](../benchmarks/results/{name}.json)" in page
