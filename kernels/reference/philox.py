"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A number is a pure function of (seed, sequence index, position, token), so a sequence that is swapped, recomputed,
migrated or replayed draws the same numbers, whatever shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORDS = 4
"""Words of one counter: the numbers of four neighbouring tokens."""


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ten rounds of Philox4x32: counter int64 [..., 4] and key int64 [..., 2], each word in 0..2^32-1, to [..., 4].

    The 64-bit products wrap in int64; their halves are taken as bits, so the sign does not matter.
    """
    return torch.stack(_words(counter.unbind(-1), key.unbind(-1)), dim=-1)


def _words(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The four words, each of the shape to which counter and key broadcast; what differs in no row is computed once."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 carry whole products on, and c0 and c2 are cut to their 32 bits: two masks a round instead of four.
        c0, c1, c2, c3 = ((product1 >> 32) ^ c1 ^ k0) & _MASK, product1, ((product0 >> 32) ^ c3 ^ k1) & _MASK, product0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _row_words(
    blocks: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    counter = (blocks, indices & _MASK, positions & _MASK, (positions >> 32) & _MASK)
    return _words(counter, (seeds & _MASK, (seeds >> 32) & _MASK))


def _uniform(words: torch.Tensor) -> torch.Tensor:
    return (words.double() + 0.5) * 2.0**-32


def token_uniforms(
    seeds: torch.Tensor, indices: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """One uniform number per element: float64 [K] in (0, 1), of 32 random bits each; all arguments int64 [K].

    seeds are the bits of unsigned 64-bit seeds; indices the sequence's index in its request; positions the number of
    output tokens that precede the drawn one; token_ids whose numbers are wanted. The key is (seed low word, seed high
    word), the counter (token id // 4, index, position low word, position high word); the number is
    (word token id % 4 + 0.5) / 2^32.
    """
    words = torch.stack(_row_words(token_ids // _WORDS, seeds, indices, positions), dim=-1)
    return _uniform(words.gather(-1, (token_ids % _WORDS).unsqueeze(-1)).squeeze(-1))


def vocabulary_uniforms(
    seeds: torch.Tensor, indices: torch.Tensor, positions: torch.Tensor, begin: int, end: int
) -> torch.Tensor:
    """The numbers of `token_uniforms` for the tokens begin..end-1 of R rows: float64 [R, end - begin].

    seeds, indices and positions are int64 [R]; begin is a multiple of 4.
    """
    blocks = torch.arange(begin // _WORDS, -(-end // _WORDS), device=seeds.device).unsqueeze(0)
    rows = (column.unsqueeze(1) for column in (seeds, indices, positions))
    words = torch.stack(_row_words(blocks, *rows), dim=-1).flatten(1)
    return _uniform(words[:, : end - begin])
