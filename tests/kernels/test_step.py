"""What a step begins and ends with, against the twins."""

from __future__ import annotations

import pytest
import torch

from kernels import reference, step
from tests.kernels.emulator import EmulatorBackend

PADDING = 6
SLOTS = [3, 0, 5, PADDING, 1, PADDING]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of seven slots, the last one's none, and their block tables."""
    known = [4, 17, 0, 33, 1, 16, 0]
    tokens = torch.tensor([[7, 8, 9, 10, 11, 12, 13], known, [2, 17, 0, 20, 1, 16, 0]])
    return tokens, torch.randperm(7 * 12, generator=torch.Generator().manual_seed(0)).int().view(7, 12)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_inputs_of_decode_rows_equal_the_twins(device: torch.device, block_size: int) -> None:
    tokens, tables = (tensor.to(device) for tensor in batch())
    slots, columns = torch.tensor(SLOTS, device=device), 10 if block_size > 1 else 12
    if block_size == 1:
        tokens[1] = tokens[1].clamp(max=12)
    found = step.decode_inputs(slots, tokens, tables, columns, block_size)
    wanted = reference.decode_inputs(slots, tokens, tables, columns, block_size)
    for name, one, other in zip(found._fields, found, wanted, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_rows_move_on_as_with_the_twin_and_padding_stays(device: torch.device) -> None:
    slots, encoded = torch.tensor(SLOTS, device=device), torch.tensor([50, ~51, 52, 53, 54, ~55], device=device)
    moved = []
    for move_on in (step.move_on, reference.move_on):
        tokens = batch()[0].to(device)
        out = torch.zeros(8, dtype=torch.int64, device=device)
        move_on(tokens, slots, tokens[1, slots], encoded, out[:6])
        assert torch.equal(out[:6], encoded)
        moved.append(tokens)
    assert torch.equal(*moved)
    assert moved[0][:, PADDING].tolist() == [13, 0, 0]
    assert moved[0][:2, 0].tolist() == [51, 5]


def test_what_rows_have_sampled_may_stay_in_its_place(device: torch.device) -> None:
    slots, tokens = torch.tensor([3, 1], device=device), batch()[0].to(device)
    encoded = torch.tensor([50, ~51], device=device)
    step.move_on(tokens, slots, tokens[1, slots], encoded, encoded)
    assert encoded.tolist() == [50, ~51]
    assert tokens[:2, [3, 1]].tolist() == [[50, 51], [34, 18]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 255, 1000])
def test_words_go_from_the_host_to_the_device_and_back(device: torch.device, dtype: torch.dtype, count: int) -> None:
    there = torch.arange(count).to(dtype)
    pinned = [tensor.pin_memory() if device.type == "cuda" else tensor for tensor in (there, torch.zeros_like(there))]
    on_device = torch.zeros(count, dtype=dtype, device=device)
    step.copy_words(pinned[0], on_device)
    step.copy_words(on_device, pinned[1])
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(pinned[1], there)


def test_words_that_do_not_fit_are_refused(emulator: EmulatorBackend) -> None:
    with pytest.raises(ValueError, match="differ"):
        step.copy_words(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="contiguous and whole words"):
        step.copy_words(torch.zeros(6)[::2], torch.zeros(3))
    with pytest.raises(ValueError, match="contiguous and whole words"):
        step.copy_words(torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))


def test_what_does_not_fit_is_refused_before_the_launch(emulator: EmulatorBackend) -> None:
    tokens, tables = batch()
    slots = torch.tensor(SLOTS)
    with pytest.raises(ValueError, match="13 columns of 12"):
        step.decode_inputs(slots, tokens, tables, 13, 16)
    with pytest.raises(ValueError, match="slots must be contiguous int64"):
        step.decode_inputs(slots.int(), tokens, tables, 12, 16)
    with pytest.raises(ValueError, match="known must be contiguous int64"):
        step.move_on(tokens, slots, slots[:2], slots, slots)
