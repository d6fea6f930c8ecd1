"""Every kernel test runs twice: on the emulator, and on a CUDA device where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import attention
from kernels import compile as kernel_compile
from tests.kernels.emulator import EmulatorBackend


def cuda_missing() -> str | None:
    """Why kernels cannot run on a GPU here, if they cannot."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "needs CuPy"
    return None


@pytest.fixture
def emulator(pytestconfig: pytest.Config) -> Iterator[EmulatorBackend]:
    """CPU tensors go to the emulator while the test runs."""
    reason = EmulatorBackend.missing()
    if reason:
        pytest.skip(reason)
    backend = EmulatorBackend(pytestconfig.cache.mkdir("kernel-emulator"))
    kernel_compile.register_backend("cpu", backend)
    attention.forget_workspaces()
    yield backend
    kernel_compile.register_backend("cpu", None)
    attention.forget_workspaces()


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors lie."""
    if request.param == "emulator":
        request.getfixturevalue("emulator")
        return torch.device("cpu")
    reason = cuda_missing()
    if reason:
        pytest.skip(reason)
    return torch.device("cuda", 0)


@pytest.fixture
def cuda() -> torch.device:
    """For tests of what only a GPU has."""
    reason = cuda_missing()
    if reason:
        pytest.skip(reason)
    return torch.device("cuda", 0)
