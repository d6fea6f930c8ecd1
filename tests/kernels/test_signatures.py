"""The CUDA wrappers can stand in for the torch twins."""

from __future__ import annotations

import inspect

import pytest

from kernels import cuda, reference


@pytest.mark.parametrize("name", sorted(set(cuda.__all__) & set(reference.__all__)))
def test_a_wrapper_takes_what_its_twin_takes(name: str) -> None:
    twin = inspect.signature(getattr(reference, name)).parameters
    wrapper = inspect.signature(getattr(cuda, name)).parameters
    assert [(p.name, p.kind, p.default) for p in twin.values()] == [
        (p.name, p.kind, p.default) for p in list(wrapper.values())[: len(twin)]
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(wrapper.values())[len(twin) :])


def test_every_twin_the_worker_uses_has_a_kernel() -> None:
    others = {"DecodeInputs", "Product", "Settled", "SharedPrefix", "TokenLogprobRows", "philox4x32"}
    assert set(reference.__all__) - set(cuda.__all__) <= others
