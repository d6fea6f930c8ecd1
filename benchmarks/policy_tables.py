"""Tables of what `benchmarks.policy_measured` has recorded, for the page of `benchmarks.report`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import Content, table, with_range

FILES = ("h100/tenants", "h200/conversations", "h100/one_off", "h100/groups", "h100/parking")
HEAD = """What the policies do with real processes and Llama-3.1-8B's shape; `python -m benchmarks.policy_measured OUT`.
[scheduling.md](scheduling.md) explains them.

"""
TENANTS = """A light tenant, alone and beside one that sends 20 times as much (in one queue with it, on another day: p99
39.6). Time to first token in ms.

"""
CONVERSATIONS = """
On an H200: 80 conversations of 8 turns, 8 turns/s, in a pool of 65,536 tokens, three tenths of all that is said; with
and without the prefix cache's second tier, an arena of four times the pool.

"""
ONE_OFF = """
What the tier costs requests that never come back: ShareGPT-like ones, 30/s, in a pool full of others' blocks. Medians,
in brackets the least and the most of turns with and without it.

"""
GROUPS = """
As many rows as requests of their own, as four samples or four beams of a prompt, and mixed: prompts of 512 tokens,
found in the prefix cache, and answers of 256.

"""
PARKING = """
A request that is parked while it decodes, and continued after others have used the whole pool: the time to its next
token, beside that of a new request of as many tokens.

"""


def policies(results: dict[str, Content]) -> str:
    """All tables there are results for."""
    writers = (tenants, conversations, one_off, groups, parking)
    return HEAD + "".join(
        write(results[name]["rows"]) for name, write in zip(FILES, writers, strict=True) if name in results
    )


def tenants(rows: Sequence[Content]) -> str:
    """First tokens of both tenants, and the light one's over its lone value."""
    alone = next(row["light_ttft_ms"]["p99"] for row in rows if row["how"] == "alone")
    lines = []
    for row in rows:
        light, heavy = row["light_ttft_ms"], row.get("heavy_ttft_ms")
        lines.append(
            [
                f"{row['light_per_s']:g} + {row['heavy_per_s']:g}/s, {row['how']}",
                *_late(light),
                f"{light['p99'] / alone:.2f}",
                f"{heavy['p99']:.1f}" if heavy else "-",
                f"{row['itl_ms']['p99']:.1f}",
                f"{row['out_tok_s']:,.0f}",
            ]
        )
    heading = [
        "requests/s",
        "light p50",
        "p95",
        "p99",
        "over alone",
        "heavy p99",
        "p99 from token to token",
        "out tok/s",
    ]
    return TENANTS + table(heading, lines)


def conversations(rows: Sequence[Content]) -> str:
    """First tokens of turns, and the shares of their prompts' tokens that were found."""
    lines = []
    for row in rows:
        found = row["scheduler"]["found_tokens"]
        lines.append(
            [
                _tier(row),
                *_late(row["ttft_ms"]),
                f"{row['itl_ms']['p99']:.1f}",
                *(f"{found[tier] / row['prompt_tokens']:.0%}" for tier in ("gpu", "host")),
            ]
        )
    heading = [
        "second tier",
        "TTFT p50 ms",
        "p95",
        "p99",
        "p99 from token to token",
        "found in the pool",
        "in the arena",
    ]
    return CONVERSATIONS + table(heading, lines)


def one_off(rows: Sequence[Content]) -> str:
    """With and without the tier, turns together."""
    lines = []
    for on in (False, True):
        found = [row for row in rows if row["host_prefix_cache"] == on]
        values = (
            ("out_tok_s", None, 0),
            ("mean_itl_ms", "p50", 2),
            ("itl_ms", "p99", 1),
            ("ttft_ms", "p50", 1),
            ("ttft_ms", "p99", 1),
        )
        cells = [
            with_range([row[name][share] if share else row[name] for row in found], digits)
            for name, share, digits in values
        ]
        lines.append([_tier(found[0]), *cells])
    heading = ["second tier", "out tok/s", "a stream's mean ms", "p99 from token to token", "TTFT p50 ms", "p99"]
    return ONE_OFF + table(heading, lines)


def groups(rows: Sequence[Content]) -> str:
    """Time and memory of the same number of rows."""
    lines = [
        [
            ", ".join(f"{count} x {kind}" for kind, count in row["requests"].items()),
            f"{row['rows']}",
            f"{row['ms_per_token']:.1f}",
            f"{row['row_tok_s']:,.0f}",
            f"{row['most_blocks']:,}",
        ]
        for row in rows
    ]
    return GROUPS + table(["requests", "rows", "ms a token", "tokens/s of all rows", "most blocks used"], lines)


def parking(rows: Sequence[Content]) -> str:
    """By length."""
    lines = [
        [f"{row['tokens']:,}", *(f"{row[name]:.1f}" for name in ("park_ms", "continue_ms", "new_request_ms"))]
        for row in rows
    ]
    return PARKING + table(["tokens", "Park ms", "Continue ms", "new request ms"], lines)


def _late(milliseconds: dict[str, float]) -> list[str]:
    """Half of the requests, and the latest of them."""
    return [f"{milliseconds[share]:.1f}" for share in ("p50", "p95", "p99")]


def _tier(row: Content) -> str:
    return "on" if row["host_prefix_cache"] else "off"
