"""A launch hands the device its work and waits for nothing: run on a device that has no values to wait for.

Tensors on torch's meta device have shapes, dtypes and strides, and nothing else. Whatever asks one for a value, or
brings it together with a tensor of the host, fails here as it would stall or fail on a GPU. The CUDA wrappers run, too,
up to the launch: their checks see what the executor really passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import compile as kernel_compile
from kernels.backend import CudaKernels
from kernels.kv_layout import KvLayout
from tests import tiny_models
from tests.worker.toy import MAX_MODEL_LEN
from worker.decode import bucket_sizes
from worker.device import Words
from worker.executor import Executor, LaunchedStep
from worker.kv_pool import KvPool
from worker.models import llama, ops
from worker.models.loader import load_model
from worker.step import BlockMoves, Fork, NewSequence, Sampling, StepPlan

META = torch.device("meta")


class Launches:
    """A backend for kernels that notes launches and makes none."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def load(self, text: str, name: str, device: torch.device) -> Any:
        launches = self.names

        class Loaded:
            def launch(self, *_: object) -> None:
                launches.append(name)

        return Loaded()

    def limits(self, device: torch.device) -> kernel_compile.DeviceLimits:
        return kernel_compile.DeviceLimits(132, 227 * 1024, 228 * 1024)


class MetaRuntime:
    """Counts what goes to and from the device."""

    runs_ahead = True

    def __init__(self) -> None:
        self.uploads: list[int] = []
        self.read_backs: list[torch.Size] = []
        self.allowed = False

    def upload(self, words: Words) -> torch.Tensor:
        self.uploads.append(words.size)
        return torch.empty(words.size, dtype=torch.int64, device=META)

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == META
        self.read_backs.append(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def mark(self) -> int:
        return 0

    def wait(self, mark: int) -> None:
        raise AssertionError("a launch waits")

    def elapsed_ns(self, start: int, end: int) -> int:
        raise AssertionError("a launch asks for a time")


class NoHostTensors(TorchDispatchMode):
    """No operation may take tensors of the host and of the device together, nor leave the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:  # what an operation is made of is looked at, too: a number given to `where` becomes a tensor
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        tensors = [item for item in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) <= 1, f"{func} takes tensors on {devices}"
        result = func(*args, **(kwargs or {}))
        if "meta" in devices:
            results = torch.utils._pytree.tree_leaves(result)
            assert all(item.device == META for item in results if isinstance(item, torch.Tensor)), f"{func} leaves"
        return result


@pytest.fixture
def launches() -> Iterator[Launches]:
    backend = Launches()
    kernel_compile.register_backend("meta", backend)
    yield backend
    kernel_compile.register_backend("meta", None)


class MetaDevice:
    """An executor on the meta device, and the launches of its steps."""

    def __init__(self, folder: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
        config = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": MAX_MODEL_LEN}
        path = tiny_models.make_tiny_model("llama", folder, **config)
        monkeypatch.setattr(llama, "ops_for", lambda device: ops.CudaOps())
        model = load_model(str(path), device=torch.device("cpu"), dtype="bfloat16", load_format="dummy")
        self.model: Any = on_meta(model)
        spec = model.spec
        layout = KvLayout(spec.num_layers, spec.num_kv_heads, 4, spec.head_dim, spec.dtype)
        pool = KvPool(
            layout,
            torch.empty(layout.pool_shape(40), dtype=layout.dtype, device=META),
            torch.empty(layout.pool_shape(20), dtype=layout.dtype),
        )
        self.kernels = CudaKernels(layout)
        assert self.kernels.twins == {}
        self.swaps: list[tuple[int, str, str]] = []
        monkeypatch.setattr(self.kernels, "swap_blocks", self.note_swap)
        self.runtime = MetaRuntime()
        self.executor = Executor(
            self.model,
            pool,
            max_slots=8,
            max_step_tokens=64,
            max_model_len=MAX_MODEL_LEN,
            buckets=bucket_sizes(8),
            kernels=self.kernels,
            runtime=self.runtime,
        )
        self.launches = launches
        self.step = 0

    def note_swap(
        self, source: torch.Tensor, destination: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor
    ) -> None:
        assert source_ids.device.type == destination_ids.device.type == "cpu"
        self.swaps.append((source_ids.numel(), source.device.type, destination.device.type))

    def launch(self, **fields: Any) -> LaunchedStep:
        self.step += 1
        self.launches.names.clear()
        self.runtime.uploads.clear()
        self.runtime.read_backs.clear()
        with NoHostTensors():
            return self.executor.launch(StepPlan(epoch=1, step=self.step, **fields))


def on_meta(model: Any) -> Any:
    """The same model, its weights without values."""

    def move(item: Any) -> Any:
        return item.to(META) if isinstance(item, torch.Tensor) else item

    weights = model._weights
    model._weights = llama.LlamaWeights(
        move(weights.embedding),
        tuple(
            llama.LlamaLayer(**{name: move(value) for name, value in vars(layer).items()}) for layer in weights.layers
        ),
        move(weights.norm),
        move(weights.head),
    )
    model._cos_sin = model._cos_sin.to(META)
    return model


@pytest.fixture
def device(tmp_path: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> MetaDevice:
    return MetaDevice(tmp_path / "model", launches, monkeypatch)


def new(slot: int, tokens: int, blocks: list[int], **fields: Any) -> NewSequence:
    fields = {"sampling": Sampling(temperature=0.0), "computed_tokens": 0, **fields}
    return NewSequence(slot=slot, token_ids=[5] * tokens, prompt_tokens=tokens, blocks=blocks, **fields)


def test_the_meta_device_notices_a_wait() -> None:
    tensor = torch.zeros(3, device=META)
    for wait in (tensor.tolist, tensor.sum().item, tensor.cpu, tensor.numpy, lambda: bool(tensor.sum() > 0)):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            wait()
    with NoHostTensors(), pytest.raises(AssertionError, match="takes tensors"):
        tensor.index_select(0, torch.tensor([1]))


def test_prefill_and_greedy_decode_wait_for_nothing_and_a_steady_step_uploads_nothing(device: MetaDevice) -> None:
    device.launch(
        new_sequences=[new(0, 10, [0, 1, 2, 3]), new(3, 5, [4, 5, 6])], chunk_slots=[0, 3], chunk_tokens=[10, 5]
    )
    assert len(device.runtime.uploads) == 1
    assert device.runtime.read_backs == [(2,)]
    device.launch(decode_add=[0, 3])
    assert device.runtime.uploads == [2], "the slots of the decode set"
    steady = device.launch()
    assert device.runtime.uploads == []
    assert device.runtime.read_backs == [(2,)]
    assert steady.encoded is not None
    layers = device.model.spec.num_layers
    assert device.launches.names.count("paged_attention_decode") == layers
    assert device.launches.names.count("rope_and_cache") == layers
    assert device.launches.names.count("argmax") == 1
    # A block for one of them, a third row whose chunk runs beside them.
    device.launch(
        append_slots=[0], append_blocks=[9], new_sequences=[new(1, 6, [7, 8])], chunk_slots=[1], chunk_tokens=[6]
    )
    assert len(device.runtime.uploads) == 1
    assert {"paged_attention_decode", "paged_attention_prefill"} <= set(device.launches.names)
    device.launch(decode_add=[1])
    assert device.runtime.read_backs == [(3,)]
    assert device.executor.decode.step.encoded.shape == (8,)


def test_everything_a_sampler_can_be_asked_for_waits_for_nothing(device: MetaDevice) -> None:
    everything = Sampling(
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.1,
        seed=2**64 - 1,
        logit_bias=((3, 1.0), (9, -2.0)),
    )
    device.launch(
        new_sequences=[
            new(0, 10, [0, 1, 2], sampling=everything, logprobs=3, prompt_logprobs=2, min_tokens=4, stop_token_ids=[2]),
            new(5, 9, [3, 4, 5], sampling=Sampling(temperature=1.0, seed=4)),
        ],
        chunk_slots=[0, 5],
        chunk_tokens=[10, 9],
        forks=[Fork(0, 2, 1)],
    )
    names = device.launches.names
    assert {"sample", "apply_penalties", "adjust_tokens", "token_logprobs"} <= set(names)
    assert len(device.runtime.uploads) == 1
    device.launch(
        copies=BlockMoves([2, 1], [12, 13]),
        replace_slots=[2],
        replace_indices=[2],
        replace_blocks=[12],
        decode_add=[0, 2, 5],
    )
    assert {"copy_blocks", "sample", "token_logprobs"} <= set(device.launches.names)
    assert len(device.runtime.uploads) == 1
    device.launch(release_slots=[0, 2])
    assert device.launches.names.count("sample") == 1
    assert "apply_penalties" not in device.launches.names


def test_swaps_are_handed_over_with_ids_on_the_host(device: MetaDevice) -> None:
    device.launch(new_sequences=[new(0, 10, [0, 1, 2])], chunk_slots=[0], chunk_tokens=[10])
    device.launch(release_slots=[0], swap_out=BlockMoves([0, 1, 2], [4, 5, 6]))
    assert device.swaps == [(3, "meta", "cpu")]
    device.launch(
        swap_in=BlockMoves([4, 5, 6], [7, 8, 9]),
        new_sequences=[new(1, 11, [7, 8, 9], computed_tokens=10)],
        decode_add=[1],
    )
    assert device.swaps[1:] == [(3, "cpu", "meta")]
