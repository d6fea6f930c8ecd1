"""What cards were measured to sustain, which limits are made of."""

from __future__ import annotations

RATES = {"h200": (4.68e3, 742e3), "h100": (2.95e3, 773e3)}
"""Bytes and bfloat16 operations a nanosecond: what an H200 reads in long pieces (benchmarks/results/h200/reading.json),
what an H100 copies (benchmarks/results/h100/ceilings.json), and products of 8192 x 8192 x 8192 on either."""
