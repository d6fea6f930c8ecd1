"""benchmarks.reading reads what it says, every word once."""

from __future__ import annotations

import pytest
import torch

from benchmarks import reading


def total(words: torch.Tensor) -> int:
    return int(words.long().sum()) % 2**32


@pytest.mark.parametrize("piece", [512, 4096, 65536])
def test_pieces_are_read_once_each(device: torch.device, piece: int) -> None:
    data = torch.randint(-(2**31), 2**31, (1 << 17,), dtype=torch.int32).to(device)
    launch, found = reading.read_pieces(data, piece, check=True)
    launch()
    assert total(found) == total(data)


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("name", reading.READERS)
def test_a_layer_is_read_once(device: torch.device, name: str, boxes: bool) -> None:
    words = torch.randint(-(2**31), 2**31, (12, 2, 8, 16, 64), dtype=torch.int32).to(device)
    launch, found = reading.read_layer(words.view(torch.bfloat16), 4, reading.READERS[name], boxes=boxes, check=True)
    launch()
    assert total(found) == total(words)
