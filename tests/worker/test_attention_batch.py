"""What attention is told to be settled: kernels that start early read it before those in front of them are done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import reference
from kernels.kv_layout import KvLayout
from kernels.reference import Settled
from worker.attention_batch import AttentionBatch


class Told:
    """The twins; notes what rotation and decode attention are told."""

    def __init__(self) -> None:
        self.rotations: list[bool] = []
        self.decodes: list[Settled] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def rope_and_cache(self, *given: Any, settled: bool = False) -> torch.Tensor:
        self.rotations.append(settled)
        return reference.rope_and_cache(*given)

    def paged_attention_decode(self, *given: Any, settled: Settled = Settled.NOTHING, **named: Any) -> torch.Tensor:
        self.decodes.append(settled)
        return reference.paged_attention_decode(*given, **named)


@pytest.mark.parametrize(
    ("chunk", "later"),
    [
        pytest.param(0, Settled.CONTEXT, id="decode alone"),
        pytest.param(3, Settled.LENGTHS, id="beside a chunk, which may store what a row sees"),
    ],
)
def test_the_first_layer_waits_for_all_and_later_ones_only_for_what_the_step_stores(chunk: int, later: Settled) -> None:
    layout, told, tokens = KvLayout(3, 1, 4, 8, torch.float32), Told(), 1 + chunk
    batch = AttentionBatch(
        layout=layout,
        pool=torch.zeros(layout.pool_shape(4)),
        kernels=told,
        slot_mapping=torch.arange(tokens) + 4,
        num_decode=1,
        decode_block_tables=torch.tensor([[1]], dtype=torch.int32),
        decode_context_lens=torch.tensor([1], dtype=torch.int32),
        chunk_block_tables=torch.tensor([[1]] if chunk else [], dtype=torch.int32).reshape(-1, 1),
        chunk_context_lens=torch.tensor([tokens] if chunk else [], dtype=torch.int32),
        chunk_query_start=torch.tensor([0, chunk] if chunk else [0], dtype=torch.int32),
        chunks_from=1,
        on_progress=lambda: None,
    )
    heads = torch.rand(3, tokens, 1, 8)
    for layer in range(3):
        batch.rotate_and_attend(layer, *heads, torch.arange(tokens), torch.rand(tokens, 8), scale=1.0)
    assert told.rotations == [False, True, True]
    assert told.decodes == [Settled.NOTHING, later, later]
