from __future__ import annotations

import numpy as np
import torch

from worker.device import CpuRuntime, Words
from worker.upload import Upload


class CountingRuntime(CpuRuntime):
    """Says what was uploaded."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def upload(self, words: Words) -> torch.Tensor:
        self.sizes.append(words.size)
        return super().upload(words)


def test_numbers_of_all_types_travel_in_one_copy_and_keep_their_bits() -> None:
    runtime = CountingRuntime()
    upload = Upload(runtime)
    placed = [
        upload.put([2**62, -1]),
        upload.put([0.5, -0.0, float("nan")], np.float32),
        upload.put([7, -(2**31), 9], np.int32),
        upload.put(np.array([[1, 2], [3, 4]]).T),
        upload.put([], np.float32),
    ]
    upload.send()
    assert runtime.sizes == [2 + 2 + 2 + 4]
    assert placed[0].tensor.tolist() == [2**62, -1]
    assert placed[1].tensor.view(torch.int32).tolist() == [0x3F000000, -(2**31), 0x7FC00000]
    assert placed[2].tensor.tolist() == [7, -(2**31), 9]
    assert placed[2].tensor.dtype == torch.int32
    assert placed[3].tensor.tolist() == [1, 3, 2, 4]
    assert placed[4].tensor.tolist() == []


def test_a_step_without_changes_sends_nothing() -> None:
    runtime = CountingRuntime()
    upload = Upload(runtime)
    upload.send()
    upload.apply()
    assert runtime.sizes == []


def test_actions_are_done_in_their_order_and_see_what_was_sent() -> None:
    upload = Upload(CpuRuntime())
    seen: list[int] = []
    for number in (5, 3):
        placed = upload.put([number])
        upload.then(lambda placed=placed: seen.append(int(placed.tensor[0])))
    upload.send()
    assert seen == []
    upload.apply()
    assert seen == [5, 3]
