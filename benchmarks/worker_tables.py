"""Tables of docs/performance.md on several workers: what a second GPU gives, and what the loss of one costs."""

from __future__ import annotations

from benchmarks.markdown import Content, table

FILES = tuple(f"h100/workers_{name}" for name in ("one_offline", "one_online", "two_offline", "two_online"))
LOSS = "h100/worker_loss"
TWO = """One scheduler, and a worker with the whole model on each of two H100s of one host; one run of each row, beside
the same rows with one worker in the same hour. Rows that end in few long sequences gain less: 1,000 or 2,000 requests
are half as many for each.

"""
LOST = """
Requests at 40/s on both; in the second row one worker is killed (SIGKILL) after 10 s and nobody starts it again. What
ran on it is computed anew on the other, from prompts and the tokens that were streamed. Every stream got all its
tokens, each once: the client counts them. The pause of a stream is the time without a token around the loss, of all
that ran on either worker: of the other's, those are the steps that compute the lost KV.

"""


def two(results: dict[str, Content]) -> str:
    """Rows with one and two workers."""
    one_offline, one_online, two_offline, two_online = (results[name]["rows"] for name in FILES)
    alone = {row["workload"]: row for row in one_offline}
    lines = []
    for row in two_offline:
        # Two workers share 512 sequences: each has the 256 of the other row.
        name = row["workload"]
        base = alone["decode-b256" if name == "decode-b512" else name]["out_tok_s"]
        label = "decode-b256, decode-b512 with two" if name == "decode-b512" else name
        lines.append([label, f"{base:,.0f}", f"{row['out_tok_s']:,.0f}", f"{row['out_tok_s'] / base:.2f}"])
    text = TWO + table(["workload", "one: out tok/s", "two", "times"], lines)
    lines = [
        [
            f"{workers}, {row['rate']:g} requests/s",
            f"{row['out_tok_s']:,.0f}",
            *(f"{row[key]['p50']:.1f} / {row[key]['p99']:.1f}" for key in ("ttft_ms", "itl_ms")),
        ]
        for workers, rows in (("one", one_online), ("two", two_online))
        for row in rows
    ]
    heading = ["workers, arrivals", "out tok/s", "TTFT p50 / p99 ms", "inter-token p50 / p99 ms"]
    return text + "\n" + table(heading, lines)


def loss(content: Content) -> str:
    """The load with and without the loss."""
    lines = []
    for row in content["rows"]:
        lost = row.get("loss")
        pause = [f"{lost['streams']}", *(f"{lost['pause_ms'][share]:.0f}" for share in ("p50", "p99"))] if lost else []
        times = [f"{row[key]['p50']:.1f} / {row[key]['p99']:.1f}" for key in ("ttft_ms", "itl_ms")]
        lines.append(["one" if lost else "none", f"{row['out_tok_s']:,.0f}", *times, *(pause or ["-"] * 3)])
    heading = ["lost", "out tok/s", "TTFT p50 / p99 ms", "inter-token p50 / p99 ms", "streams", "pause p50 ms", "p99"]
    return LOST + table(heading, lines)
