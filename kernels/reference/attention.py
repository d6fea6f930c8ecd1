"""PagedAttention (Kwon et al. 2023, section 4.1) in torch: keys and values are read through block tables."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch.nn import functional

_GATHER_ELEMENTS = 1 << 22
"""Most key and value elements gathered at once (16 MiB in float32): memory stays bounded and near the caches."""
_SCORE_ELEMENTS = 1 << 23
"""Most scores of one prefill piece over all heads (32 MiB in float32)."""


@dataclass(frozen=True)
class SharedPrefix:
    """What rows of a decode step have in common at their beginning, so that it is read once for all of them. A hint:
    block tables name those blocks as well, and kernels that cannot use it take them from there."""

    block_table: torch.Tensor
    """int32 [1, M]: the block table of one of the rows."""
    length: torch.Tensor
    """int32 [1]: tokens in common, whole blocks of them; 0: none."""
    row_lens: torch.Tensor
    """int32 [B]: `length` in rows that begin with these blocks and are longer, 0 in others."""
    query_start: torch.Tensor
    """int32 [2]: 0 and B."""


class Settled(enum.IntEnum):
    """What decode attention reads that no kernel writes which may still run: it need not wait to read it.

    Kernels are launched early, while those before them run. One that is told of nothing waits until all before are
    done, then lets the next start: what was written before it is settled for all that follow.
    """

    NOTHING = 0
    LENGTHS = 1
    """Block tables and context lengths."""
    CONTEXT = 2
    """And keys and values, but for the query tokens' own."""


def paged_attention_decode(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    *,
    out: torch.Tensor | None = None,
    shared: SharedPrefix | None = None,
    settled: Settled = Settled.NOTHING,
) -> torch.Tensor:
    """Attention of one new token per sequence over that sequence's whole context.

    query is [B, Hq, D]; kv_layer a layer view [num_blocks, 2, Hkv, block_size, D] of the same dtype, Hkv dividing Hq
    (query head h reads key head h // (Hq / Hkv)); block_tables int32 [B, M]; context_lens int32 [B], the tokens in the
    cache, the new one included, in 1..M * block_size; 0 is a row of padding, which gives zeros. Scores are
    `scale * q.k`; with soft_cap = c they become `c * tanh(score / c)`. With sliding_window = w only the last w tokens
    are seen. `shared` and `settled` change nothing here. Returns [B, Hq, D] of query's dtype, in `out` if given.
    """
    block_size = kv_layer.shape[3]
    lengths = context_lens.tolist()
    seen = [length if sliding_window is None else min(length, sliding_window) for length in lengths]
    order = sorted((row for row in range(len(seen)) if seen[row]), key=seen.__getitem__, reverse=True)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    if len(order) < len(seen):
        output.zero_()
    elements_per_token = kv_layer[0, :, :, 0].numel()
    start = 0
    while start < len(order):
        # A group's rows are padded to its longest: as many rows as fit, none shorter than half the longest.
        longest = seen[order[start]]
        most = max(1, _GATHER_ELEMENTS // ((longest + block_size) * elements_per_token))
        end = start + 1
        while end < len(order) and end - start < most and 2 * seen[order[end]] >= longest - block_size:
            end += 1
        rows = torch.tensor(order[start:end], device=query.device)
        output[rows] = _decode_group(
            query[rows],
            kv_layer,
            block_tables[rows],
            context_lens[rows].long(),
            scale,
            sliding_window,
            soft_cap,
            num_columns=min(-(-longest // block_size) + (sliding_window is not None), block_tables.shape[1]),
        )
        start = end
    return output


def _decode_group(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    num_columns: int,
) -> torch.Tensor:
    """Decode of rows of similar length: gathers `num_columns` blocks of each, from the first block that is seen."""
    rows, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_layer.shape
    columns = torch.arange(num_columns, device=query.device).unsqueeze(0)
    first = torch.zeros_like(context_lens)
    if sliding_window is not None:
        first = (context_lens - sliding_window).clamp_(min=0)
        columns = columns + (first // block_size).unsqueeze(1)
    # Columns behind the last block hold anything: read the row's last block instead, and mask it.
    last = ((context_lens - 1) // block_size).unsqueeze(1)
    blocks = block_tables.long().gather(1, columns.minimum(last))
    offsets = torch.arange(block_size, device=query.device)
    positions = (columns.unsqueeze(-1) * block_size + offsets).reshape(-1, num_columns * block_size)
    unseen = (positions >= context_lens.unsqueeze(1)) | (positions < first.unsqueeze(1))
    # [rows, columns, 2, Hkv, block_size, D] to [2, rows, Hkv, tokens, D], a copy either way.
    gathered = kv_layer[blocks].permute(2, 0, 3, 1, 4, 5).reshape(2, rows, num_kv_heads, -1, head_dim).float()
    key, value = gathered.unbind(0)
    # Scores are masked below, values here: a weight of zero times a NaN in an unused slot would be NaN.
    value.masked_fill_(unseen[:, None, :, None], 0.0)
    grouped = query.reshape(rows, num_kv_heads, num_heads // num_kv_heads, head_dim).float()
    scores = _capped(torch.matmul(grouped, key.transpose(-1, -2)) * scale, soft_cap)
    scores.masked_fill_(unseen[:, None, None, :], float("-inf"))
    attended = torch.matmul(torch.softmax(scores, dim=-1), value)
    return attended.reshape(rows, num_heads, head_dim).to(query.dtype)


def paged_attention_prefill(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of S chunks over their sequences' contexts; the chunks' own tokens are in the cache already.

    query is [T, Hq, D], the chunks one after another: chunk s is rows query_start[s] to query_start[s + 1], and its
    tokens are the last of the context_lens[s] tokens in the cache. kv_layer is a layer view [num_blocks, 2, Hkv,
    block_size, D]; block_tables int32 [S, M]; context_lens int32 [S], this chunk included; query_start int32 [S + 1].
    scale, sliding_window and soft_cap as in `paged_attention_decode`. Returns [T, Hq, D] of query's dtype, in
    `out` if given; rows before the first chunk and behind the last stay what they are.
    """
    block_size, head_dim = kv_layer.shape[3:]
    starts, lengths = query_start.tolist(), context_lens.tolist()
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    for row, context in enumerate(lengths):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        first_position = context - (end - start)
        lowest = 0 if sliding_window is None else max(0, first_position - sliding_window + 1)
        first_column = lowest // block_size
        blocks = block_tables[row, first_column : -(-context // block_size)].long()
        gathered = kv_layer[blocks].permute(1, 2, 0, 3, 4).reshape(2, -1, blocks.numel() * block_size, head_dim)
        seen = gathered[:, :, : context - first_column * block_size]
        output[start:end] = _prefill_one(
            query[start:end], seen, first_position - first_column * block_size, scale, sliding_window, soft_cap
        )
    return output


def _prefill_one(
    query: torch.Tensor,
    key_value: torch.Tensor,
    first_position: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """One chunk: query [Tq, Hq, D] at positions first_position.. of key_value [2, Hkv, context, D]."""
    key, value = key_value.unbind(0)
    num_tokens, num_heads, _ = query.shape
    context = key.shape[1]
    if soft_cap is None and sliding_window is None and first_position == 0:
        # torch's fused attention is exactly this case, and does not store the scores.
        return _fused_causal(query, key, value, scale)
    repeats = num_heads // key.shape[0]
    key_positions = torch.arange(context, device=query.device)
    wide_key, wide_value = key.float().unsqueeze(1), value.float().unsqueeze(1)
    output = torch.empty_like(query)
    piece = max(1, _SCORE_ELEMENTS // (context * num_heads))
    for start in range(0, num_tokens, piece):
        part = query[start : start + piece]
        positions = torch.arange(start, start + part.shape[0], device=query.device).unsqueeze(1) + first_position
        unseen = key_positions > positions
        if sliding_window is not None:
            unseen = unseen | (key_positions <= positions - sliding_window)
        grouped = part.transpose(0, 1).reshape(-1, repeats, *part.shape[0::2]).float()
        scores = _capped(torch.matmul(grouped, wide_key.transpose(-1, -2)) * scale, soft_cap)
        scores.masked_fill_(unseen, float("-inf"))
        attended = torch.matmul(torch.softmax(scores, dim=-1), wide_value)
        output[start : start + piece] = attended.reshape(num_heads, *part.shape[0::2]).transpose(0, 1).to(query.dtype)
    return output


def _fused_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention from position 0: query [T, Hq, D], key and value [Hkv, T, D]."""
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[0],
    )
    return attended[0].transpose(0, 1)


def _capped(scores: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """Gemma 2's soft-cap: scores stay within -soft_cap..soft_cap."""
    return scores if soft_cap is None else torch.tanh(scores / soft_cap) * soft_cap
