"""What a decode step begins and ends with: its rows' inputs from the batch, and the batch moved on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.reference.sampling import decode_ids

LAST, KNOWN, PROMPT = 0, 1, 2
"""Rows of the batch's tokens, int64 [3, slots]: the token each slot sampled last, how many it knows (0: it is padding),
how many of those are its prompt."""


class DecodeInputs(NamedTuple):
    """Of B decode rows."""

    known: torch.Tensor
    """int64 [B]: tokens of each row; 0 in padding."""
    output_lens: torch.Tensor
    """int64 [B]: output tokens so far."""
    token_ids: torch.Tensor
    """int64 [B]: what each row sampled last."""
    positions: torch.Tensor
    """int64 [B]: where that token is; 0 in padding."""
    slot_mapping: torch.Tensor
    """int64 [B]: block * block_size + offset of that place; -1 in padding."""
    block_tables: torch.Tensor
    """int32 [B, columns]."""
    context_lens: torch.Tensor
    """int32 [B]."""


def decode_inputs(
    slots: torch.Tensor, tokens: torch.Tensor, block_tables: torch.Tensor, columns: int, block_size: int
) -> DecodeInputs:
    """Inputs of the rows in these slots, int64 [B]. tokens: as LAST, KNOWN and PROMPT say; block_tables int32
    [slots, at least columns]; block_size a power of two."""
    of_rows = tokens.index_select(1, slots)
    known = of_rows[KNOWN]
    positions = (known - 1).clamp_(min=0)
    tables = block_tables[:, :columns].index_select(0, slots)
    shift = block_size.bit_length() - 1
    blocks = tables.gather(1, (positions >> shift).unsqueeze(1)).squeeze(1).long()
    places = (blocks << shift) + (positions & (block_size - 1))
    return DecodeInputs(
        known=known,
        output_lens=known - of_rows[PROMPT],
        token_ids=of_rows[LAST],
        positions=positions,
        slot_mapping=places.masked_fill_(known == 0, -1),
        block_tables=tables,
        context_lens=known.int(),
    )


def move_on(
    tokens: torch.Tensor, slots: torch.Tensor, known: torch.Tensor, encoded: torch.Tensor, out: torch.Tensor
) -> None:
    """Rows in these slots, which knew so many tokens, have sampled `encoded`, all int64 [B]: tokens has it afterwards,
    but for padding, and out, int64 [B], which may be `encoded`, is equal to it. A slot that is no padding appears once.
    """
    held = known > 0
    of = slots[held]
    tokens[LAST, of] = decode_ids(encoded[held])
    tokens[KNOWN, of] = known[held] + 1
    out.copy_(encoded)


def copy_words(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Copies source to destination, of one shape and dtype, both contiguous and whole words of 4 bytes."""
    destination.copy_(source)
