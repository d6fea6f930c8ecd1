"""What the scheduler's Prometheus page said over a run: idle time of the device, and where a step's time went."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from dataclasses import dataclass

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
PARTS = ("plan", "wire", "forward", "sample")
TIERS = ("gpu", "host")
TIMEOUT_S = 5.0

Page = dict[tuple[str, str], float]
"""Values by name and labels' text."""


@dataclass(frozen=True)
class Used:
    """Differences between two pages."""

    workers: int
    idle_s: float
    """Seconds that the device waited for plans, mean of the workers."""
    steps: int
    """Plans made for a worker, mean of the workers."""
    part_ms: dict[str, float]
    """Mean milliseconds per step, by part."""
    preemptions: int
    cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    found_tokens: dict[str, int]
    """The same by tier of the prefix cache."""


async def read(address: str) -> Page:
    """The page at host:port. Raises OSError when it cannot be read."""
    return parse(await asyncio.to_thread(_fetch, address))


def _fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
        text: str = answer.read().decode()
    return text


def parse(text: str) -> Page:
    """The samples of a page in Prometheus text format."""
    page: Page = {}
    for line in text.splitlines():
        found = SAMPLE.match(line)
        if found:
            page[found[1], found[2] or ""] = float(found[3])
    return page


def used(before: Page, after: Page) -> Used:
    """What happened between two pages of one scheduler."""

    def total(name: str, label: str = "") -> float:
        keys = [key for key in after if key[0] == f"pagewire_{name}" and label in key[1]]
        return sum(after[key] - before.get(key, 0.0) for key in keys)

    workers = max(1, sum(name == "pagewire_worker_gpu_idle_seconds_total" for name, _ in after))
    steps = int(total("step_seconds_count", 'part="plan"'))
    part_ms = {
        part: 1e3
        * total("step_seconds_sum", f'part="{part}"')
        / max(1.0, total("step_seconds_count", f'part="{part}"'))
        for part in PARTS
    }
    return Used(
        workers=workers,
        idle_s=total("worker_gpu_idle_seconds_total") / workers,
        steps=steps // workers,
        part_ms={part: round(value, 4) for part, value in part_ms.items()},
        preemptions=int(total("preemptions_total")),
        cached_tokens=int(total("prefix_cache_hits_total")),
        found_tokens={tier: int(total("prefix_cache_hits_total", f'tier="{tier}"')) for tier in TIERS},
    )
