"""What every test shares: one CPU thread per process, GPU tests that skip with a reason where there is no GPU, and the
tests that stay together when `make test` runs several processes of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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


SPREAD_FILES = {"test_compile.py", "test_equality.py", "test_greedy_equality.py", "test_simulation.py"}
"""Long files whose tests share nothing, so that processes may divide them. The tests of any other file run in one
process, because a service or a kernel that one of them has made serves the next."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of a file together. Not by marks and `--dist loadgroup`: pytest 9.2 ignores what pytest-xdist 3.8
    writes into the names of grouped tests, and deals them out one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class LoadFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return nodeid if Path(path).name in SPREAD_FILES else path

    return LoadFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))
