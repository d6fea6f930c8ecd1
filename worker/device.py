"""What differs between devices in driving them: uploads, read-backs, marks in time.

A launch only hands work to the device. Nothing in it may wait: no value is read back, and what the host wrote for the
device stays untouched until the device has fetched it. On the CPU everything has happened when a call returns.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels import step

Words = npt.NDArray[np.int64]

_MOST_WORD_BYTES = 1 << 18
"""Copied by a kernel, as it does not wait for swaps; with more, copy engines use the bus better."""
_SMALLEST_STAGING = 4096
"""Words of the smallest staging buffer: a decode step never asks for a larger one."""


class DeviceRuntime(Protocol):
    """How the executor drives a device."""

    @property
    def runs_ahead(self) -> bool:
        """Whether calls return before their work is done."""
        ...

    def upload(self, words: Words) -> torch.Tensor:
        """The words on the device, int64; `words` may be changed afterwards."""
        ...

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, complete once a later mark has passed."""
        ...

    def mark(self) -> Any:
        """A point in the current stream's work."""
        ...

    def wait(self, mark: Any) -> None:
        """Returns when the device has passed the mark. The only call that may wait."""
        ...

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """Time between two marks that have been passed."""
        ...


class CpuRuntime:
    """Work is done when its call returns."""

    runs_ahead = False

    def upload(self, words: Words) -> torch.Tensor:
        """As in DeviceRuntime."""
        return torch.from_numpy(words.copy())

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """As in DeviceRuntime: the step's buffers are used again, so this copies."""
        return tensor.clone()

    def mark(self) -> int:
        """As in DeviceRuntime."""
        return time.perf_counter_ns()

    def wait(self, mark: int) -> None:
        """As in DeviceRuntime."""

    def elapsed_ns(self, start: int, end: int) -> int:
        """As in DeviceRuntime."""
        return max(0, end - start)


class CudaRuntime:
    """One CUDA device and its current stream; marks are events."""

    runs_ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._staging: deque[tuple[torch.cuda.Event, torch.Tensor, Words]] = deque()
        """Pinned buffers, the least recently used first, each with the event after its last copy. No more than plans
        in flight: one is used again as soon as its copy is over."""
        self._read: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        """What is being written to, until it is: torch gives memory that nobody holds to the next who asks."""

    def upload(self, words: Words) -> torch.Tensor:
        """As in DeviceRuntime, by one copy that nobody waits for."""
        event, pinned, view = self._take_staging(words.size)
        view[: words.size] = words
        on_device = torch.empty(words.size, dtype=torch.int64, device=self.device)
        _copy(pinned[: words.size], on_device)
        event.record()
        self._staging.append((event, pinned, view))
        return on_device

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """As in DeviceRuntime."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        _copy(tensor.contiguous(), pinned)
        while self._read and self._read[0][0].query():
            self._read.popleft()
        event = torch.cuda.Event()
        event.record()
        self._read.append((event, pinned))
        return pinned

    def mark(self) -> torch.cuda.Event:
        """As in DeviceRuntime."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """As in DeviceRuntime. Raises what the device's work has raised."""
        mark.synchronize()

    def elapsed_ns(self, start: torch.cuda.Event, end: torch.cuda.Event) -> int:
        """As in DeviceRuntime."""
        return max(0, int(start.elapsed_time(end) * 1e6))

    def _take_staging(self, size: int) -> tuple[torch.cuda.Event, torch.Tensor, Words]:
        if self._staging and self._staging[0][0].query():
            event, pinned, view = self._staging.popleft()
            if view.size >= size:
                return event, pinned, view
        words = max(_SMALLEST_STAGING, 1 << size.bit_length())
        pinned = torch.empty(words, dtype=torch.int64, pin_memory=True)
        return torch.cuda.Event(), pinned, pinned.numpy()


def _copy(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Between the device and pinned memory, in the current stream's order."""
    if source.numel() * source.element_size() <= _MOST_WORD_BYTES:
        step.copy_words(source, destination)
    else:
        destination.copy_(source, non_blocking=True)


def runtime_for(device: torch.device) -> DeviceRuntime:
    """How to drive `device`."""
    return CudaRuntime(device) if device.type == "cuda" else CpuRuntime()
