"""What a row is held against: the peer's value, the card's limit and the goal, for Llama-3.1-8B on one H200.

The peer is vLLM 0.24.0 with FlashAttention-3, torch.compile, CUDA graphs and prefix caching, measured at its Python
API. The limit is the time that weights, arithmetic and KV need at the card's measured rates, without launches or host
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONFIG = "llama-3.1-8b"
"""The model that these values are for."""
GPU = "H200"


@dataclass(frozen=True)
class Anchor:
    """Values of one offline row."""

    unit: str
    """out_tok_s: more is better; seconds: less is better."""
    peer: float
    limit: float | None
    goal: float

    def ratio(self, row: dict[str, Any]) -> float | None:
        """How many times better than the peer a row is; None: it has no value."""
        value = row.get(self.unit)
        if not value:
            return None
        return float(value) / self.peer if self.unit == "out_tok_s" else self.peer / float(value)

    def meets_goal(self, row: dict[str, Any]) -> bool:
        """Whether the row reaches the goal."""
        value = row.get(self.unit)
        if not value:
            return False
        return bool(value >= self.goal if self.unit == "out_tok_s" else value <= self.goal)


OFFLINE = {
    "decode-b1": Anchor("out_tok_s", 201, 278, 255),
    "decode-b8": Anchor("out_tok_s", 1_554, 2_153, 1_950),
    "decode-b32": Anchor("out_tok_s", 5_539, 7_711, 6_900),
    "decode-b128": Anchor("out_tok_s", 12_758, 21_747, 18_000),
    "decode-b256": Anchor("out_tok_s", 18_831, 26_112, 22_500),
    "decode-b512": Anchor("out_tok_s", 20_837, 26_112, 23_500),
    "sharegpt-like-1000": Anchor("out_tok_s", 12_523, 21_056, 17_500),
    "alpaca-like-2000": Anchor("out_tok_s", 10_727, 25_174, 19_000),
    "prefill-64x4096": Anchor("seconds", 6.51, 5.31, 6.0),
    "shared-prefix-2048": Anchor("seconds", 1.69, None, 1.2),
}


@dataclass(frozen=True)
class OnlineAnchor:
    """Values of one online row, in milliseconds."""

    requests: int
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    itl_p99_goal: float

    def meets_goal(self, row: dict[str, Any]) -> bool:
        """Better in all four, and the inter-token p99 within its goal."""
        ttft, itl = row.get("ttft_ms"), row.get("itl_ms")
        if not ttft or not itl:
            return False
        peers = (self.ttft_p50, self.ttft_p99, self.itl_p50, self.itl_p99)
        ours = (ttft["p50"], ttft["p99"], itl["p50"], itl["p99"])
        return all(value < peer for value, peer in zip(ours, peers, strict=True)) and itl["p99"] <= self.itl_p99_goal


ONLINE = {
    10.0: OnlineAnchor(200, 21.9, 78.1, 5.42, 15.8, 9.0),
    30.0: OnlineAnchor(600, 26.8, 75.8, 6.62, 26.0, 14.0),
}
