"""A picture of online rows: latencies and goodput against the load, one line per door. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot is imported: no display is needed

from matplotlib import pyplot

from pagewire.bench.results import Row

NAMES = {"session": "scheduler's session", "gateway": "gRPC", "openai": "OpenAI HTTP"}


def plot_online(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture; its format is that of the file name's ending. Rows with an error are left out."""
    good = [row for row in rows if "error" not in row]
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    titles = ("time to first token, ms", "time between tokens, ms", "output tokens/s", "goodput, share of requests")
    label = "requests per second" if any("rate" in row for row in good) else "requests at once"
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for color, place in enumerate(dict.fromkeys(row["at"] for row in good)):
        found = sorted((row for row in good if row["at"] == place), key=_load)
        loads, style = [_load(row) for row in found], {"color": f"C{color}", "marker": "o"}
        for axis, name in zip(axes[:2], ("ttft_ms", "itl_ms"), strict=True):
            for percentile, line in (("p50", "-"), ("p99", "--")):
                values = [row[name][percentile] for row in found]
                axis.plot(loads, values, line, label=f"{NAMES[place]} {percentile}", **style)
        axes[2].plot(loads, [row["out_tok_s"] for row in found], label=NAMES[place], **style)
        axes[3].plot(loads, [row["goodput"]["share"] for row in found], label=NAMES[place], **style)
    for axis in axes:
        if good:
            axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _load(row: Row) -> float:
    load: float = row["rate"] if "rate" in row else row["concurrency"]
    return load
