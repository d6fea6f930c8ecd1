"""What every test shares: one CPU thread per process, GPU tests that skip with a reason where there is no GPU, and the
tests that stay together when `make test` runs several processes of them.
"""

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


SPREAD_FILES = {"test_compile.py", "test_simulation.py"}
"""Long files whose tests share nothing, so that processes may divide them. The tests of any other file run in one
process, because a service or a kernel that one of them has made serves the next."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no GPU, and keeps the tests of a file together."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.name not in SPREAD_FILES:
                item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))
