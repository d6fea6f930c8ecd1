"""What the policies are for, in figures: the cases of benchmarks/policy.py that the documentation names."""

from __future__ import annotations

import json

import pytest

from benchmarks import policy
from scheduler import plan_ahead


def test_a_target_keeps_the_gaps_between_tokens_and_still_serves_prompts() -> None:
    off, on = policy.chunking(rates=(30,), targets_ms=(0, 8), profiles=[policy.H200])["rows"]
    assert off["itl_ms"]["p99"] > 14
    assert on["itl_p99_over_target"] < 1
    assert on["itl_ms"]["p99.9"] < 9
    assert on["ttft_ms"]["p99"] < 75
    assert on["out_tok_s"] > 0.99 * off["out_tok_s"]


def test_a_light_tenant_hardly_notices_one_that_sends_twenty_times_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its lone value is that of plans made at once. That they are late for everybody makes a lone tenant faster, not one
    # beside another slower (docs/decisions/0054-plans-are-late-while-requests-come.md).
    monkeypatch.setattr(plan_ahead, "EXPECTED_NS", 0)
    knee, overload = policy.fairness([policy.AT_THE_KNEE, policy.OVERLOAD], num_seeds=1)["rows"]
    for row in (knee, overload):
        assert row["p99_over_lone"] < 1.3
        assert row["light_ttft_ms_one_queue"]["p99"] > 20 * row["light_ttft_ms_beside"]["p99"]
        assert row["throughput_over_one_queue"] > 0.98


def test_every_recorded_load_keeps_a_light_tenant_within_the_goal() -> None:
    recorded = json.loads((policy.RESULTS / "fairness.json").read_text())
    assert len(recorded["rows"]) == len(policy.TENANTS)
    assert max(row["p99_over_lone"] for row in recorded["rows"]) == recorded["worst_p99_over_lone"] < 1.3


def test_deadlines_that_are_told_are_met_more_often_than_those_that_are_only_kept() -> None:
    (row,) = policy.deadlines(rates=(70,), seconds=30)["rows"]
    assert row["told"]["in_time"] > 1.02 * row["cancelled"]["in_time"]
    assert row["told"]["tokens_for_late_answers"] < row["cancelled"]["tokens_for_late_answers"]
    assert row["told"]["refused_early"] > 0


def test_auto_is_as_good_as_the_better_mode_at_every_overcommit_and_on_every_link() -> None:
    report = policy.preemption(pressures=((1.0, 2.0), (0.1, 2.0)))
    assert report["worst_auto_over_best"] > 0.97
    chosen = [row["auto"]["preemptions"] for row in report["rows"]]
    assert any(modes["swap"] > 9 * modes["recompute"] for modes in chosen)
    assert any(modes["recompute"] > 9 * modes["swap"] for modes in chosen)
    assert all(row["auto"]["most_preemptions_of_one"] <= 16 for row in report["rows"])


def test_a_late_percentile_of_few_requests_is_chance_and_the_same_chance_for_swap_and_auto() -> None:
    (row,) = policy.preemption_speeds(pools=(1000,), num_speeds=5)["rows"]
    swap, auto = (row[mode]["time_per_output_token_p99_ms"] for mode in ("swap", "auto"))
    assert swap["most"] > 1.1 * swap["least"]
    assert auto == pytest.approx(swap, rel=0.05)
    assert row["auto"]["out_tok_s"] > 0.97 * max(row["swap"]["out_tok_s"], row["recompute"]["out_tok_s"])


def test_beams_take_one_step_per_token_and_not_two_where_that_pays_in_total() -> None:
    both_kinds = ("greedy", "beams")
    greedy, beams, both = policy.gathering(waits_ms=(1.0,), loads=(("greedy",), ("beams",), both_kinds))["rows"]
    assert greedy["ahead"] == greedy["gathered"]
    assert beams["ahead"]["ms_per_token"] > 1.7 * greedy["ahead"]["ms_per_token"]
    assert beams["gathered"]["ms_per_token"] < 1.15 * greedy["ahead"]["ms_per_token"]
    assert both["gathered"]["row_tok_s"] > 1.2 * both["ahead"]["row_tok_s"]
    (late,) = policy.gathering(waits_ms=(4.0,), loads=(both_kinds,))["rows"]
    assert late["gathered"]["ms_per_token"] == pytest.approx(late["ahead"]["ms_per_token"], rel=0.01)


def test_gathering_keeps_to_a_target_for_the_streams_beside_searches() -> None:
    (row,) = policy.gathering_online(loads=((16, 0.1),), waits_ms=(1.0,), targets_ms=(10,), seconds=10.0)["rows"]
    assert row["gathered"]["beams_ms_per_token"]["p50"] < 0.75 * row["ahead"]["beams_ms_per_token"]["p50"]
    assert row["gathered"]["greedy_itl_ms"]["p99"] <= 1.02 * 10


def test_conversations_find_in_the_arena_what_the_pool_lost_unless_the_link_is_slow() -> None:
    off, on, slow_off, slow_on = policy.host_tier(counts=(80,))["rows"]
    assert on["found_in_arena"] > 0.4
    assert on["ttft_ms"]["p99"] < 0.5 * off["ttft_ms"]["p99"]
    assert slow_on["ttft_ms"] == slow_off["ttft_ms"]
