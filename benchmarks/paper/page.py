"""Fills the tables of docs/paper.md from the recorded results, between its markers; the text around them is by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
CONFIGS = Path(__file__).parents[1] / "configs"
Report = dict[str, Any]


def fill_page(results: Path) -> None:
    """Replaces what is between `<!-- name -->` and `<!-- end -->`. Raises KeyError for a name without a table."""
    text = PAGE.read_text()

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        report = json.loads((results / f"{name}.json").read_text())
        return f"<!-- {name} -->\n{TABLES[name](report)}\n<!-- end -->"

    PAGE.write_text(re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL))


def rows(head: list[str], body: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def span(values: list[float] | None) -> str:
    return "-" if values is None else " to ".join(f"{value:g}" for value in values)


def waste(report: Report) -> str:
    body = []
    for name, ours in report["ours"].items():
        paper = report["paper"][name]
        body.append([name, *(cell for state in ours for cell in (paper[state], ours[state]))])
    head = ["% of KV memory"]
    for state in ("tokens", "reserved", "internal", "other"):
        head += [f"{state}: paper", "ours"]
    return rows(head, body)


def latency_vs_rate(report: Report) -> str:
    body = []
    for load, ours in report["ours"].items():
        paper = report["paper"][load]
        for name, key in (
            ("Orca (Oracle)", "over_orca_oracle"),
            ("Orca (Pow2)", "over_orca_pow2"),
            ("Orca (Max)", "over_orca_max"),
        ):
            seeds = [seed.get(key) for seed in ours["other_seeds"]]
            published = span(paper.get(key))
            if key == "over_orca_oracle" and "over_orca_oracle_opt_13b" in paper:
                published = f"{paper['over_orca_oracle_opt_13b']} (OPT-13B)"
            body.append(
                [
                    load,
                    name,
                    published,
                    f"**{ours[key]}**",
                    ", ".join(str(seed) for seed in seeds) if all(seeds) else "-",
                    ours["lean_engine"][key],
                ]
            )
        most = paper.get("over_static_batcher_at_most")
        body.append([load, "static batcher", f"up to {most:g}" if most else "-", ours["over_static_batcher"], "-", "-"])
    head = ["load", "sustained rate over", "paper", "ours", "two other seeds", "with a lean engine"]
    table = rows(head, body)
    names = list(next(iter(report["ours"].values()))["sustained_per_s"])
    rates = [[load, *(ours["sustained_per_s"][name] for name in names)] for load, ours in report["ours"].items()]
    return table + "\n\n" + rows(["requests/s sustained", *names], rates)


def batched_requests(report: Report) -> str:
    body = []
    for load, ours in report["ours"].items():
        for name, value in ours.items():
            body.append([load, name, report["paper"][load][name], value])
    return rows(["load", "policy", "paper", "ours"], body)


def sharing(report: Report) -> str:
    body = []
    for load in ("alpaca-like", "sharegpt-like"):
        ours, paper = report["ours"][load], report["paper"][load]
        body.append([load, "parallel sampling", span(paper["parallel"]), by_width(ours["parallel"], "n")])
        certainties = {str(report["certainty"]): ours["beam"], **ours["beam_by_other_certainty"]}
        for certainty in sorted(certainties):
            decoding = f"beam search, certainty {certainty}"
            body.append([load, decoding, span(paper["beam"]), by_width(certainties[certainty], "width")])
    ours, paper = report["ours"]["alpaca-like"], report["paper"]["sustained_over_orca_oracle"]
    rates = [
        ["parallel sampling", f"{paper['basic']} (n=1)", ours["sustained_over_orca_oracle"], "n"],
        ["beam search", f"{paper['beams of width 6']} (width=6)", ours["sustained_over_orca_oracle_by_beams"], "width"],
    ]
    over = [[*line, ", ".join(f"{rate} ({name}={n})" for n, rate in found.items())] for *line, found, name in rates]
    saved = rows(["load", "decoding", "paper, % of blocks saved", "ours"], body)
    return saved + "\n\n" + rows(["alpaca-like, sustained rate over Orca (Oracle)", "paper", "ours"], over)


def by_width(ours: dict[str, Any], name: str) -> str:
    return ", ".join(f"{each['percent']} ({name}={width})" for width, each in ours.items())


def real_beams(report: Report) -> str:
    body = []
    for load, widths in report["ours"].items():
        for width, ours in widths.items():
            seeds = ours["by_seed"]
            of_real = ("likeliest_token_mean", "tokens_apart_mean_of_pairs", "percent")
            body.append(
                [
                    f"{load}, {width}",
                    *(listed([each["real"][key] for each in seeds]) for key in of_real),
                    listed([each["certainty_of_same_distance"] for each in seeds]),
                    listed([each["certainty_of_same_savings"] for each in seeds]),
                    ours["figure_15_at_that_certainty"]["percent"],
                ]
            )
    head = ["load, width", "likeliest token", "tokens apart", "% saved"]
    head += ["certainty of the same distance", "of the same savings", "figure 15 at the former, % saved"]
    return rows(head, body)


def listed(values: list[float]) -> str:
    return ", ".join(str(value) for value in values)


def shared_prefix(report: Report) -> str:
    body = [
        [name, report["paper"][name], ours["over_orca_oracle"], ours["of_which_without_prefix_cache"]]
        for name, ours in report["ours"].items()
    ]
    return rows(["shared prefix", "paper, over Orca (Oracle)", "ours", "ours without the prefix cache"], body)


def chatbot(report: Report) -> str:
    ours, paper = report["ours"], report["paper"]["over_orca"]
    body = [
        [name, rate, ours["batched_when_overloaded"][name], paper, ours[f"over_{name.replace('-', '_')}"]]
        for name, rate in ours["sustained_per_s"].items()
        if name != "pagewire"
    ]
    body.append(["pagewire", ours["sustained_per_s"]["pagewire"], ours["batched_when_overloaded"]["pagewire"], "", ""])
    return rows(["policy", "requests/s sustained", "batched when overloaded", "paper: vLLM over it", "ours"], body)


def block_size(report: Report) -> str:
    loads = list(report["ours"])
    sizes = list(report["ours"][loads[0]])
    body = [
        [f"{load}: normalized latency, s/token"]
        + [f"{report['ours'][load][size]['normalized_latency_s']:.3f}" for size in sizes]
        for load in loads
    ]
    return rows(["block size", *sizes], body)


def swap_vs_recompute(report: Report) -> str:
    micro = report["ours"]["micro"]
    sizes = list(next(iter(micro.values()))["swap_ms_by_block_size"])
    body = []
    for name, entry in micro.items():
        swaps = entry["swap_ms_by_block_size"].values()
        recompute = f"{entry['recompute_among_others_ms']} / {entry['recompute_alone_ms']}"
        body.append([name, *swaps, recompute])
    table = rows(["ms, 256 tokens unless said", *sizes, "recompute among others / alone"], body)
    ends = []
    for name, entry in report["ours"].items():
        if name != "micro":
            for mode in ("swap", "recompute", "auto"):
                values = [f"{entry[size][mode]['normalized_latency_s']:.3f}" for size in sizes]
                ends.append([f"{name.removeprefix('end_to_end, ')}: {mode}", *values])
    return table + "\n\n" + rows(["end to end, s/token", *sizes], ends)


def kv_token_bytes(shape: str) -> int:
    """Keys and values of one token over all layers in bfloat16, for a shape of benchmarks/configs."""
    config = json.loads((CONFIGS / shape / "config.json").read_text())
    return int(2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def crossover(report: Report) -> str:
    shapes = list(dict.fromkeys(row["shape"] for row in report["rows"]))
    sizes = sorted({row["block_size"] for row in report["rows"]})
    longest = max(row["context"] for row in report["rows"])
    body = []
    for shape in shapes:
        own = [row for row in report["rows"] if row["shape"] == shape]
        for context in (256, longest):
            of = {row["block_size"]: row for row in own if row["context"] == context}
            swaps = [f"{of[size]['swap_out_ms'] + of[size]['swap_in_ms']:.2f}" for size in sizes]
            recompute = [f"{of[size]['recompute_ms']:.1f}" for size in sizes]
            body.append([f"{shape}, {context} tokens: swap out and in, ms", *swaps])
            body.append([f"{shape}, {context} tokens: recompute, ms", *recompute])
        # Of the longest, whose time is least made of what a step costs in any case.
        copied = longest * kv_token_bytes(shape)
        times = [(of[size]["blocks"], of[size]["swap_out_ms"], of[size]["swap_in_ms"]) for size in sizes]
        rates = [f"{copied / out / 1e6:.1f} / {copied / back / 1e6:.1f}" for _, out, back in times]
        copies = [f"{1e3 * out / count:.1f} / {1e3 * back / count:.1f}" for count, out, back in times]
        body.append([f"{shape}, {longest} tokens: GB/s out / in", *rates])
        body.append([f"{shape}, {longest} tokens: us a copy out / in", *copies])
        found = report["swapping_wins_from"][shape]
        body.append([f"{shape}: swapping is cheaper from, tokens", *(found[str(size)] for size in sizes)])
    return rows(["block size", *sizes], body) + f"\n\n{report['gpu']}, commit `{report['commit'][:12]}`."


def h200(report: Report) -> str:
    body = [
        [name, *each["sustained_per_s"].values(), each["over_orca_max"], each["over_orca_oracle"]]
        for name, each in report["ours"].items()
    ]
    names = list(next(iter(report["ours"].values()))["sustained_per_s"])
    return rows(["requests/s sustained", *names, "pagewire over Max", "over Oracle"], body)


def measured(report: Report) -> str:
    policies = list(dict.fromkeys(row["policy"] for row in report["rows"]))
    body: list[list[Any]] = []
    for workload in dict.fromkeys(row["workload"] for row in report["rows"]):
        of = {row["policy"]: row for row in report["rows"] if row["workload"] == workload}
        speeds = {policy: of[policy]["out_tok_s"] if policy in of else None for policy in policies}
        ours = speeds["pagewire"]
        body.append([f"{workload}: out tok/s", *(speed and f"{speed:,.0f}" for speed in speeds.values())])
        body.append(
            [f"{workload}: Pagewire is as fast, times", *(speed and f"{ours / speed:.2f}" for speed in speeds.values())]
        )
    note = f" {report['note'][0].upper()}{report['note'][1:]}." if "note" in report else ""
    return rows(["", *policies], body) + f"\n\n{report['gpu']}, commit `{report['commit'][:12]}`.{note}"


TABLES: dict[str, Callable[[Report], str]] = {
    "waste": waste,
    "latency_vs_rate": latency_vs_rate,
    "batched_requests": batched_requests,
    "sharing": sharing,
    "real_beams": real_beams,
    "shared_prefix": shared_prefix,
    "chatbot": chatbot,
    "block_size": block_size,
    "swap_vs_recompute": swap_vs_recompute,
    "crossover": crossover,
    "h200": h200,
    "measured": measured,
    "measured_tokens": measured,
}
