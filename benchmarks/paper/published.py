"""What the paper says, with where it says it. None: the paper does not give the number in text or as a label."""

from __future__ import annotations

from typing import Any

WASTE: dict[str, Any] = {
    "source": "figure 2, labels; percent of KV memory",
    "orca-max": {"tokens": 20.4, "reserved": 13.3, "internal": 57.3, "other": 8.9},
    "orca-pow2": {"tokens": 26.8, "reserved": 17.9, "internal": 13.6, "other": 41.6},
    "orca-oracle": {"tokens": 38.2, "reserved": 25.2, "internal": 0.0, "other": 36.6},
    "pagewire": {"tokens": 96.3, "reserved": None, "internal": None, "other": None},
}

SUSTAINED: dict[str, Any] = {
    "source": "section 6.2, text, over three models on 1, 4 and 8 A100s; 'pagewire' stands for the paper's vLLM",
    "sharegpt-like": {
        "over_orca_oracle": [1.7, 2.7],
        "over_orca_max": [2.7, 8.0],
        "over_static_batcher_at_most": 22.0,
    },
    "alpaca-like": {
        "over_orca_oracle": None,
        "over_orca_max": None,
        "note": "section 6.3 gives 1.3 over Orca (Oracle) for OPT-13B; other ratios are only curves",
        "over_orca_oracle_opt_13b": 1.3,
    },
}

BATCHED: dict[str, Any] = {
    "source": "figure 13, labels; OPT-13B. The text gives 2.2 times Oracle and 4.3 times Max for ShareGPT",
    "sharegpt-like at 2/s": {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "pagewire": 30.42},
    "alpaca-like at 30/s": {"orca-max": 7.00, "orca-pow2": 43.24, "orca-oracle": 72.75, "pagewire": 132.44},
}

SHARING: dict[str, Any] = {
    "source": "section 6.3, text: percent of blocks saved, from width 2 to width 6",
    "alpaca-like": {"parallel": [6.1, 9.8], "beam": [37.6, 55.2]},
    "sharegpt-like": {"parallel": [16.2, 30.5], "beam": [44.3, 66.3]},
    "sustained_over_orca_oracle": {
        "note": "section 6.3, text: OPT-13B, Alpaca, basic sampling and beams of width 6",
        "basic": 1.3,
        "beams of width 6": 2.3,
    },
}

SHARED_PREFIX: dict[str, Any] = {
    "source": "section 6.4, text: throughput over Orca (Oracle), LLaMA-13B, WMT16 English to German",
    "one-shot, 80 tokens": 1.67,
    "five-shot, 341 tokens": 3.58,
}

CHATBOT: dict[str, Any] = {
    "source": "section 6.5, text: sustained rate over the three Orca baselines, OPT-13B",
    "over_orca": 2.0,
}

BLOCK_SIZE: dict[str, Any] = {
    "source": "section 7.2, text; figure 18 has curves only",
    "sharegpt-like": "16 to 128 lead to the best performance",
    "alpaca-like": "16 and 32 work well, larger ones degrade the performance significantly",
    "default": 16,
}

SWAP_VS_RECOMPUTE: dict[str, Any] = {
    "source": "section 7.3, text; figure 19 has curves only",
    "micro": "swapping has excessive overhead at small block sizes, recomputing costs the same at all of them and is "
    "never higher than 20 % of swapping's latency",
    "end_to_end": "comparable from 16 to 64; recomputing is better for smaller blocks, swapping for larger ones",
}
