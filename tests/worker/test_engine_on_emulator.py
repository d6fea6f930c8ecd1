"""The engine on the CUDA kernels themselves, run by the emulator: padding, lengths, slots and sampling state as the
executor passes them, with values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import attention, reference
from kernels import compile as kernel_compile
from kernels.backend import CudaKernels
from kernels.kv_layout import KvLayout
from tests import tiny_models
from tests.kernels.emulator import EmulatorBackend
from tests.worker.test_engine import GREEDY, HOT, PENALISED, PROMPTS, Steps, new
from worker.attention_batch import AttentionBatch
from worker.executor import Executor
from worker.kv_pool import KvPool
from worker.models import llama, ops
from worker.models.loader import load_model
from worker.step import BlockMoves

CPU = torch.device("cpu")


@pytest.fixture
def emulator(pytestconfig: pytest.Config) -> Iterator[EmulatorBackend]:
    """CPU tensors go to the emulator while the test runs."""
    if reason := EmulatorBackend.missing():
        pytest.skip(reason)
    backend = EmulatorBackend(pytestconfig.cache.mkdir("kernel-emulator"))
    kernel_compile.register_backend("cpu", backend)
    attention.forget_workspaces()
    yield backend
    kernel_compile.register_backend("cpu", None)
    attention.forget_workspaces()


def play(path: Path, dtype: str, *, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens of steps with chunks, padded decode sets, draws, a swap and a copy."""
    with monkeypatch.context() as patch:
        if emulated:
            patch.setattr(llama, "ops_for", lambda device: ops.CudaOps())
        model = load_model(str(path), device=CPU, dtype=dtype)
    spec = model.spec
    layout = KvLayout(spec.num_layers, spec.num_kv_heads, 4, spec.head_dim, spec.dtype)
    pools = [torch.full(layout.pool_shape(count), float("nan"), dtype=layout.dtype) for count in (120, 8)]
    executor = Executor(
        model,
        KvPool(layout, *pools),
        max_slots=6,
        max_step_tokens=64,
        max_model_len=spec.max_model_len,
        buckets=(1, 4, 8),
        kernels=CudaKernels(layout) if emulated else None,
    )
    steps = Steps(executor)
    lengths = [len(prompt) for prompt in PROMPTS]
    steps.run(
        new_sequences=[new(0, PROMPTS[0]), new(3, PROMPTS[3], sampling=HOT if dtype == "float32" else GREEDY)],
        chunk_slots=[0, 3],
        chunk_tokens=[lengths[0], lengths[3]],
    )
    steps.run(decode_add=[0], new_sequences=[new(1, PROMPTS[1])], chunk_slots=[1], chunk_tokens=[lengths[1]])
    if dtype == "float32":  # twins compute with other roundings: in bfloat16 a draw could fall to a neighbour
        rich = new(2, PROMPTS[2], sampling=PENALISED, logprobs=2, min_tokens=9, stop_token_ids=[1, 2])
        steps.run(decode_add=[1, 3], new_sequences=[rich], chunk_slots=[2], chunk_tokens=[lengths[2]])
        steps.run(decode_add=[2])
        steps.run(release_slots=[2])
    else:
        steps.run(decode_add=[1, 3])
    steps.run(swap_out=BlockMoves([60], [5]))  # full: nobody writes to it any more
    steps.run(
        swap_in=BlockMoves([5], [110]),
        copies=BlockMoves([20], [112]),
        replace_slots=[3, 1],
        replace_indices=[0, 0],
        replace_blocks=[110, 112],
    )
    steps.run()
    results = steps.finish()
    assert not any(result.nonfinite_rows for result in results)
    return [list(result.token_ids) for result in results]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "float32"), ("gpt2", "float32")]
)
def test_kernels_give_the_tokens_of_their_twins(
    tmp_path: Path, emulator: EmulatorBackend, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    sizes = {"head_dim": 16} if kind == "llama" else {}
    path = tiny_models.make_tiny_model(kind, tmp_path / "model", max_position_embeddings=128, **sizes)
    emulated = play(path, dtype, emulated=True, monkeypatch=monkeypatch)
    assert emulated == play(path, dtype, emulated=False, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("wgmma", "products"),
    [
        (True, 4),  # qkv; output and down projection, which differ in their width; gate and up
        (False, 0),  # before compute capability 9.0
    ],
)
def test_steps_take_the_products_by_boxes_where_there_is_wgmma_and_give_the_same_tokens(
    tmp_path: Path, emulator: EmulatorBackend, monkeypatch: pytest.MonkeyPatch, wgmma: bool, products: int
) -> None:
    emulator.wgmma = wgmma
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    path = tiny_models.make_tiny_model("llama", tmp_path / "model", max_position_embeddings=128, **sizes, **heads)
    emulated = play(path, "bfloat16", emulated=True, monkeypatch=monkeypatch)
    assert sum("linear_wgmma" in library._name for library in emulator.libraries) == products
    assert emulated == play(path, "bfloat16", emulated=False, monkeypatch=monkeypatch)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_single_kv_head_is_taken_with_the_strides_of_the_projection_that_it_was_cut_from(
    emulator: EmulatorBackend, tokens: int
) -> None:
    layout = KvLayout(1, 1, 4, 16, torch.float32)
    fused = torch.randn(1, tokens, (4 + 2) * 16)
    query = fused[0, :, :64].view(tokens, 4, 16)
    # What transformers' GPTBigCode hands over; of one token, torch calls it contiguous as it is.
    key, value = (part.unsqueeze(1)[0].transpose(0, 1) for part in fused[..., 64:].split(16, dim=-1))
    outs = []
    for kernels in (CudaKernels(layout), reference):
        batch = AttentionBatch(
            layout=layout,
            pool=torch.full(layout.pool_shape(2), float("nan")),
            kernels=kernels,
            slot_mapping=torch.arange(4, 4 + tokens),
            num_decode=0,
            decode_block_tables=torch.zeros(0, 1, dtype=torch.int32),
            decode_context_lens=torch.zeros(0, dtype=torch.int32),
            chunk_block_tables=torch.ones(1, 1, dtype=torch.int32),
            chunk_context_lens=torch.tensor([tokens], dtype=torch.int32),
            chunk_query_start=torch.tensor([0, tokens], dtype=torch.int32),
            chunks_from=0,
            on_progress=lambda: None,
        )
        outs.append(batch.attend(0, query, key, value, scale=0.25))
    torch.testing.assert_close(*outs)
