"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (seed, sequence index, position), so a sequence that is swapped, recomputed, migrated or
replayed draws the same numbers, whatever shares its batch.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ten rounds of Philox4x32: counter int64 [..., 4] and key int64 [..., 2], each word in 0..2^32-1, to [..., 4].

    The 64-bit products wrap in int64; their halves are taken as bits, so the sign does not matter.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform_draws(seeds: torch.Tensor, indices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One uniform number per row: float64 [R] in (0, 1), of 32 random bits each.

    seeds is int64 [R], the bits of an unsigned 64-bit seed; indices int64 [R] is the sequence's index in its request;
    positions int64 [R] the number of output tokens that precede the drawn one. The key is (seed low word, seed high
    word), the counter (position low word, position high word, index, 0); the number is (first word + 0.5) / 2^32.
    """
    key = torch.stack((seeds & _MASK, (seeds >> 32) & _MASK), dim=-1)
    zero = torch.zeros_like(positions)
    counter = torch.stack((positions & _MASK, (positions >> 32) & _MASK, indices & _MASK, zero), dim=-1)
    return (philox4x32(counter, key)[..., 0].double() + 0.5) * 2.0**-32
