"""What every test shares: one CPU thread per process, and GPU tests that skip with a reason where there is no GPU."""

from __future__ import annotations

import os

import pytest

# The suite runs many processes side by side; torch would start a thread per core in each of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _why_no_gpu() -> str:
    """Why GPU tests cannot run here; empty if they can. Imports torch and CuPy, so it is asked only when needed."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU: {error}"
    return "" if count else "no GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))
