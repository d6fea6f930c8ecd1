"""Small loads and machines for the simulator's tests."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from benchmarks.simulator.profiles import A100_OPT_13B, WorkerProfile
from benchmarks.simulator.simulation import Arrival

TOKEN_BYTES = A100_OPT_13B.model.kv_token_bytes


def machine(num_blocks: int = 64, *, block_size: int = 4, host_blocks: int = 64, **fields: Any) -> WorkerProfile:
    """The paper's machine with a small KV pool."""
    fields = {"max_num_seqs": 16, "token_budget": 64} | fields
    return replace(
        A100_OPT_13B,
        block_size=block_size,
        kv_bytes=num_blocks * block_size * TOKEN_BYTES,
        host_bytes=host_blocks * block_size * TOKEN_BYTES,
        **fields,
    )


def burst(count: int, *, seed: int = 0, n: int = 1, gap_ns: int = 20_000_000) -> list[Arrival]:
    """Requests of 1 to 40 prompt tokens and 1 to 30 output tokens, some milliseconds apart."""
    dice = random.Random(seed)
    return [
        Arrival(number * dice.randrange(gap_ns), [0] * dice.randint(1, 40), dice.randint(1, 30), n=n)
        for number in range(count)
    ]


def in_order(arrivals: list[Arrival]) -> list[Arrival]:
    return sorted(arrivals, key=lambda arrival: arrival.at_ns)
