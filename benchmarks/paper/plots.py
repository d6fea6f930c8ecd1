"""Plots of the recorded results as SVG, with matplotlib (the `bench` extra). Reads JSON, simulates nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # before pyplot is imported: no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes

FOLDER = Path(__file__).parents[2] / "docs" / "paper"
COLOURS = {
    "static-batcher": "#999999",
    "orca-max": "#d55e00",
    "orca-pow2": "#e69f00",
    "orca-oracle": "#56b4e9",
    "pagewire": "#009e73",
}
STATES = {"tokens": "#009e73", "reserved": "#56b4e9", "internal": "#d55e00", "other": "#cccccc"}


def plot_all(results: Path) -> None:
    """Writes every plot into docs/paper/."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update(
        {"svg.hashsalt": "pagewire", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    )
    for name, plot in PLOTS.items():
        report = json.loads((results / f"{name}.json").read_text())
        plot(report)
        pyplot.tight_layout()
        pyplot.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        pyplot.close()


def axes(columns: int, height: float = 3.0, width: float = 4.8) -> list[Axes]:
    _, grid = pyplot.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    return list(grid[0])


def waste(report: dict[str, Any]) -> None:
    (axis,) = axes(1, 3.2, width=6.2)
    names = ["orca-max", "orca-pow2", "orca-oracle", "pagewire"]
    for side, (who, shift) in enumerate((("paper", -0.2), ("ours", 0.2))):
        bottoms = [0.0] * len(names)
        for state, colour in STATES.items():
            values = [report[who][name][state] or 0.0 for name in names]
            places = [place + shift for place in range(len(names))]
            label = state if side == 0 else None
            hatch = "//" if who == "paper" else None
            axis.bar(places, values, 0.36, bottom=bottoms, color=colour, hatch=hatch, edgecolor="white", label=label)
            bottoms = [below + value for below, value in zip(bottoms, values, strict=True)]
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("KV memory, %")
    axis.set_title("left, hatched: paper; right: ours (simulated)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def latency_vs_rate(report: dict[str, Any]) -> None:
    for axis, (load, entry) in zip(axes(2), report["ours"].items(), strict=True):
        for policy, curve in entry["curves"].items():
            rates = [point["rate"] for point in curve]
            latencies = [point["normalized_latency_s"] for point in curve]
            axis.plot(rates, latencies, marker=".", color=COLOURS[policy], label=policy)
        axis.axhline(report["bound_s_per_token"], color="black", linewidth=0.8, linestyle=":")
        axis.set_ylim(0, 1)
        axis.set_xlabel("requests per second")
        axis.set_ylabel("normalized latency, s/token")
        axis.set_title(f"{load}, OPT-13B, A100 (simulated)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def batched_requests(report: dict[str, Any]) -> None:
    for axis, (load, entry) in zip(axes(2), report["ours"].items(), strict=True):
        names = list(entry)
        for who, shift, hatch in (("paper", -0.2, "//"), ("ours", 0.2, None)):
            values = [report[who][load][name] for name in names]
            places = [place + shift for place in range(len(names))]
            bars = axis.bar(
                places, values, 0.36, color=[COLOURS[name] for name in names], hatch=hatch, edgecolor="white"
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel("batched requests")
        axis.set_title(f"{load}: paper hatched, ours plain")


def sharing(report: dict[str, Any]) -> None:
    panels = axes(2)
    for axis, decoding, title in zip(panels, ("parallel", "beam"), ("parallel samples", "beams"), strict=True):
        for load, colour in (("alpaca-like", "#e69f00"), ("sharegpt-like", "#009e73")):
            ours, paper = report["ours"][load], report["paper"][load]
            widths, percents = percent_by_width(ours[decoding])
            axis.plot(widths, percents, marker="o", color=colour, label=f"{load}, ours")
            axis.plot([2, 6], paper[decoding], "x--", color=colour, label=f"{load}, paper")
            if decoding == "beam":
                by_certainty = ours["beam_by_other_certainty"]
                least, most = (percent_by_width(by_certainty[pick(by_certainty)])[1] for pick in (min, max))
                axis.fill_between(widths, least, most, color=colour, alpha=0.2, linewidth=0)
        axis.set_ylim(0, 90)
        axis.set_xticks([2, 4, 6])
        axis.set_xlabel(title)
        axis.set_ylabel("blocks saved, %")
    panels[1].set_title("band: the model's certainty from 0.5 to 0.97")
    panels[0].legend()


def percent_by_width(ours: dict[str, Any]) -> tuple[list[int], list[float]]:
    return [int(width) for width in ours], [each["percent"] for each in ours.values()]


def block_size(report: dict[str, Any]) -> None:
    (axis,) = axes(1)
    for load, entry in report["ours"].items():
        sizes = [int(size) for size in entry]
        axis.plot(sizes, [each["normalized_latency_s"] for each in entry.values()], marker="o", label=load)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("block size, tokens")
    axis.set_ylabel("normalized latency, s/token")
    axis.set_title("memory effect alone (simulated)")
    axis.legend()


def swap_vs_recompute(report: dict[str, Any]) -> None:
    left, right = axes(2)
    for (name, entry), colour in zip(report["ours"]["micro"].items(), COLOURS.values(), strict=False):
        if entry["tokens"] != 256:
            continue
        sizes = [int(size) for size in entry["swap_ms_by_block_size"]]
        left.plot(sizes, list(entry["swap_ms_by_block_size"].values()), marker="o", color=colour, label=f"swap, {name}")
        left.axhline(entry["recompute_among_others_ms"], color=colour, linestyle="--")
    left.set_yscale("log")
    left.set_ylim(1, 1500)
    left.set_ylabel("ms; dashed: recompute")
    left.legend(fontsize=6)
    for name, entry in report["ours"].items():
        if name == "micro" or "paper's layout" not in name:
            continue
        for mode in ("swap", "recompute", "auto"):
            sizes = [int(size) for size in entry]
            values = [each[mode]["normalized_latency_s"] for each in entry.values()]
            right.plot(sizes, values, marker=".", linestyle="--" if mode == "auto" else "-", label=mode)
        right.set_title(name.removeprefix("end_to_end, "), fontsize=8)
    right.set_ylabel("normalized latency, s/token")
    right.legend()
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("block size, tokens")


PLOTS = {
    "waste": waste,
    "latency_vs_rate": latency_vs_rate,
    "batched_requests": batched_requests,
    "sharing": sharing,
    "block_size": block_size,
    "swap_vs_recompute": swap_vs_recompute,
}
