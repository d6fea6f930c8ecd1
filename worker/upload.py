"""One step's numbers for the device, packed into one buffer and copied at once.

Whoever has something for the device puts it here while the plan is worked through on the host, together with what the
device is to do with it; `send` copies everything, `apply` starts the actions in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.device import DeviceRuntime, Words

_TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


@dataclass(frozen=True)
class Placed:
    """Numbers in an upload. `tensor` is on the device, once the upload is sent."""

    upload: Upload
    start: int
    """First of its words."""
    count: int
    dtype: torch.dtype

    @property
    def tensor(self) -> torch.Tensor:
        """[count], contiguous, of the dtype that was put."""
        num_words = -(-self.count * self.dtype.itemsize // 8)
        words = self.upload.words[self.start : self.start + num_words]
        return words if self.dtype == torch.int64 else words.view(self.dtype)[: self.count]


class Upload:
    """What one step brings to the device."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._parts: list[Words] = []
        self._actions: list[Callable[[], object]] = []
        self._size = 0
        self._words: torch.Tensor | None = None

    @property
    def words(self) -> torch.Tensor:
        """int64: everything, on the device."""
        assert self._words is not None, "not sent yet"
        return self._words

    def put(self, numbers: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> Placed:
        """Takes numbers along, as int64, int32 or float32; arrays are flattened row by row."""
        array = np.asarray(numbers, dtype=dtype).reshape(-1)
        count = array.size
        if array.dtype != np.int64:
            padded = np.zeros(-(-count * array.itemsize // 8) * 8 // array.itemsize, dtype=array.dtype)
            padded[:count] = array
            array = padded
        self._parts.append(array.view(np.int64))
        start, self._size = self._size, self._size + self._parts[-1].size
        return Placed(self, start, count, _TORCH_TYPES[np.dtype(dtype)])

    def then(self, action: Callable[[], object]) -> None:
        """Has `action` done by `apply`; it may use whatever was put before it."""
        self._actions.append(action)

    def send(self) -> None:
        """Copies everything. A step without changes sends nothing."""
        if self._parts:
            self._words = self._runtime.upload(np.concatenate(self._parts))

    def apply(self) -> None:
        """Starts the actions."""
        for action in self._actions:
            action()
