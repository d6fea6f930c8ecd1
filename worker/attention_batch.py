"""One step's attention: where its tokens are written and what they see. Models call it once per layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.backend import PagedKernels
from kernels.kv_layout import KvLayout
from kernels.reference import Settled, SharedPrefix


@dataclass(frozen=True)
class AttentionBatch:
    """The metadata of one step's T tokens: `num_decode` decode rows first, one token each, then S chunks. Decode rows
    of length 0 at the end of theirs may be chunks' or padding.

    All tensors are on the pool's device. Block table rows are as wide as the longest needs; what lies behind a row's
    last block is not read.
    """

    layout: KvLayout
    """Layout of the pool."""
    pool: torch.Tensor
    """The KV pool, [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""
    kernels: PagedKernels
    """The paged operations for the pool's device."""
    slot_mapping: torch.Tensor
    """int64 [T]: block * block_size + offset at which each token's key and value are stored; negative: nowhere."""
    num_decode: int
    """D, the number of decode rows."""
    decode_block_tables: torch.Tensor
    """int32 [D, M]."""
    decode_context_lens: torch.Tensor
    """int32 [D]: tokens in the cache, the step's own included; 0: a row of padding."""
    chunk_block_tables: torch.Tensor
    """int32 [S, M]."""
    chunk_context_lens: torch.Tensor
    """int32 [S]: tokens in the cache, the chunk's own included."""
    chunk_query_start: torch.Tensor
    """int32 [S + 1]: chunk s is rows chunk_query_start[s] to chunk_query_start[s + 1] behind row `chunks_from`."""
    chunks_from: int
    """A row before which no chunk begins."""
    on_progress: Callable[[], None]
    """Called once per layer; feeds the heartbeat."""
    decode_shared: SharedPrefix | None = None
    """What decode rows have in common at their beginning."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Stores the tokens' keys and values in `layer`, then attends causally over each sequence's whole context.

        query is [T, Hq, D], key and value [T, Hkv, D], of the pool's dtype. Scores are `scale * q.k`, soft-capped to
        `soft_cap * tanh(score / soft_cap)` if given; with sliding_window = w position p sees p-w+1..p.
        Returns [T, Hq, D].
        """
        kv_layer = self.layout.layer_view(self.pool, layer)
        self.kernels.write_kv(_with_whole_heads(key), _with_whole_heads(value), kv_layer, self.slot_mapping)
        return self._attend(layer, _with_whole_heads(query), kv_layer, scale, sliding_window, soft_cap)

    def rotate_and_attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """`attend` with queries and keys that are still to be rotated: positions int64 [T], cos_sin as in `rope`."""
        kv_layer = self.layout.layer_view(self.pool, layer)
        rotated = self.kernels.rope_and_cache(
            query, key, value, positions, cos_sin, kv_layer, self.slot_mapping, settled=layer > 0
        )
        return self._attend(layer, rotated, kv_layer, scale, sliding_window, soft_cap)

    def project_and_attend(
        self,
        layer: int,
        hidden: torch.Tensor,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """`rotate_and_attend` with queries, keys and values that are still to be projected: hidden [T, K], qkv
        [(Hq + 2 Hkv) D, K]. None: there is no kernel that does both, or it would take longer."""
        kv_layer = self.layout.layer_view(self.pool, layer)
        if not self.kernels.takes_rotation(len(hidden), qkv, cos_sin, kv_layer):
            return None
        query = self.kernels.linear_rotated(
            hidden, qkv, positions, cos_sin, kv_layer, self.slot_mapping, settled=layer > 0
        )
        return self._attend(layer, query, kv_layer, scale, sliding_window, None)

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        kv_layer: torch.Tensor,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """Attention of all rows, their keys and values being in the cache."""
        num_decode, chunks_from, has_chunks = self.num_decode, self.chunks_from, len(self.chunk_context_lens) > 0
        # Both kinds of rows write their part of one tensor: nothing is put together afterwards.
        attended = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if num_decode:
            # The first layer's launch waits for what made this step's metadata. A chunk may store what a row sees.
            later = Settled.LENGTHS if has_chunks else Settled.CONTEXT
            self.kernels.paged_attention_decode(
                query[:num_decode],
                kv_layer,
                self.decode_block_tables,
                self.decode_context_lens,
                scale,
                sliding_window,
                soft_cap,
                out=attended[:num_decode],
                shared=self.decode_shared,
                settled=later if layer > 0 else Settled.NOTHING,
            )
        if has_chunks:  # after decode attention, which makes zeros of rows of length 0
            self.kernels.paged_attention_prefill(
                query[chunks_from:],
                kv_layer,
                self.chunk_block_tables,
                self.chunk_context_lens,
                self.chunk_query_start,
                scale,
                sliding_window,
                soft_cap,
                out=attended[chunks_from:],
            )
        self.on_progress()
        return attended


def _with_whole_heads(heads: torch.Tensor) -> torch.Tensor:
    """The same [T, heads, D] with elements and heads of a token contiguous, as kernels read them; tokens may stride."""
    tokens, num_heads, head_dim = heads.shape
    if heads.stride()[1:] == (head_dim, 1):
        return heads
    if num_heads == 1 and heads.stride(2) == 1:
        # The stride of a dimension of one means nothing, and contiguous() would keep that of a single token.
        return heads.as_strided((tokens, 1, head_dim), (heads.stride(0), head_dim, 1))
    return heads.contiguous()
