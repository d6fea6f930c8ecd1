"""A kernel that is launched early reads nothing that the kernel before it writes until it has waited for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch

from kernels import activation, attention, cache, linear_tall, linear_wgmma, norm, sampling, step
from kernels import compile as kernel_compile
from kernels.linear_tall import TallConfig
from kernels.linear_wgmma import WgmmaConfig
from kernels.reference import Settled
from tests.kernels import tensors
from tests.kernels.attention_cases import make_case
from tests.kernels.emulator import EmulatorBackend

Run = Callable[[], torch.Tensor]


rand = functools.partial(tensors.rand, dtype=torch.bfloat16, device=torch.device("cpu"))


def decode() -> tuple[Run, Sequence[torch.Tensor]]:
    case = make_case([40, 333, 5], head_dim=64)
    keys = [case.kv_layer[block, part] for block in case.block_tables[1, :20].tolist() for part in (0, 1)]
    inputs = (case.query, case.kv_layer, case.block_tables, case.context_lens)
    late = [case.query, case.block_tables, case.context_lens, *keys]
    return lambda: attention.paged_attention_decode(*inputs, case.scale), late


def settled_decode(
    block_size: int, query_len: int = 1, settled: Settled = Settled.CONTEXT
) -> tuple[Run, Sequence[torch.Tensor]]:
    """Late are queries and, unless more is, the query tokens' keys and values; behind it is a row of padding."""
    lengths = [40, 333, query_len, 64, 0]
    case = make_case(lengths, new_lens=[query_len] * len(lengths), block_size=block_size)
    late = [case.query]
    for row, length in zip(case.block_tables, lengths, strict=True):
        for token in range(max(0, length - query_len) if settled is Settled.CONTEXT else 0, length):
            slots = case.kv_layer[row[token // block_size], :, :, token % block_size]
            late += [slots[part, head] for part in (0, 1) for head in range(2)]
    query = case.query.unflatten(0, (-1, query_len))
    inputs = (query[:, 0] if query_len == 1 else query, case.kv_layer, case.block_tables, case.context_lens)
    return lambda: attention.paged_attention_decode(*inputs, case.scale, settled=settled), late


def decode_after_the_first_layer() -> tuple[Run, Sequence[torch.Tensor]]:
    return settled_decode(16)


def decode_of_small_blocks_after_the_first_layer() -> tuple[Run, Sequence[torch.Tensor]]:
    return settled_decode(4)


def decode_of_three_tokens_after_the_first_layer() -> tuple[Run, Sequence[torch.Tensor]]:
    return settled_decode(16, query_len=3)


def decode_beside_chunks_after_the_first_layer() -> tuple[Run, Sequence[torch.Tensor]]:
    return settled_decode(16, settled=Settled.LENGTHS)


def rotation(settled: bool = False) -> tuple[Run, Sequence[torch.Tensor]]:
    fused, positions, slots = rand(4, 10, 64), torch.tensor([0, 7, 31, 2]), torch.tensor([5, 0, -1, 30])
    cos_sin, pool = torch.rand(32, 64), torch.zeros(4, 2, 2, 8, 64, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        query, key, value = fused.split((6, 2, 2), dim=1)
        rotated = cache.rope_and_cache(query, key, value, positions, cos_sin, pool, slots, settled=settled)
        return torch.cat((rotated.flatten(), pool.flatten()))

    return run, [fused] if settled else [fused, positions, slots]


def rotation_after_the_first_layer() -> tuple[Run, Sequence[torch.Tensor]]:
    return rotation(settled=True)


def rotated_product(settled: bool = False) -> tuple[Run, Sequence[torch.Tensor]]:
    tokens, qkv = rand(4, 192), rand(384, 192, seed=1)
    positions, slots = torch.tensor([0, 7, 31, 2]), torch.tensor([5, 0, -1, 30])
    cos_sin, pool = torch.rand(32, 64), torch.zeros(4, 2, 1, 8, 64, dtype=torch.bfloat16)
    config = WgmmaConfig(64, 1, 3, 4, rows=64)

    def run() -> torch.Tensor:
        query = linear_wgmma.linear_rotated(
            tokens, qkv, positions, cos_sin, pool, slots, settled=settled, config=config
        )
        return torch.cat((query.flatten(), pool.flatten()))

    return run, [tokens] if settled else [tokens, positions, slots]


def rotated_product_after_the_first_layer() -> tuple[Run, Sequence[torch.Tensor]]:
    return rotated_product(settled=True)


def step_inputs() -> tuple[Run, Sequence[torch.Tensor]]:
    tokens, tables = torch.arange(1, 16).view(3, 5), torch.arange(20, dtype=torch.int32).view(5, 4)
    slots = torch.tensor([2, 0, 4])

    def run() -> torch.Tensor:
        return torch.cat([x.flatten().long() for x in step.decode_inputs(slots, tokens, tables, 4, 16)])

    return run, [slots, tokens, tables]


def step_end() -> tuple[Run, Sequence[torch.Tensor]]:
    slots, known, encoded = torch.tensor([2, 0, 4]), torch.tensor([5, 0, 7]), torch.tensor([70, 71, ~72])

    def run() -> torch.Tensor:
        tokens, out = torch.zeros((3, 5), dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        step.move_on(tokens, slots, known, encoded, out)
        return torch.cat((tokens.flatten(), out))

    return run, [slots, known, encoded]


def words() -> tuple[Run, Sequence[torch.Tensor]]:
    source = torch.arange(300)

    def run() -> torch.Tensor:
        destination = torch.zeros_like(source)
        step.copy_words(source, destination)
        return destination

    return run, [source]


def norms() -> tuple[Run, Sequence[torch.Tensor]]:
    hidden, residual, weight = rand(3, 2048), rand(3, 2048, seed=1), rand(2048, seed=2)

    def run() -> torch.Tensor:
        return torch.cat(
            (norm.add_rms_norm(hidden, residual.clone(), weight, 1e-5)[0], norm.rms_norm(hidden, weight, 1e-5))
        )

    return run, [hidden]


def products() -> tuple[Run, Sequence[torch.Tensor]]:
    tokens, weight = rand(96, 192), rand(512, 192, seed=1)
    return lambda: linear_wgmma.linear(tokens, weight, config=WgmmaConfig(96, 2, 4, 2)), [tokens]


def tall_tiles() -> tuple[Run, Sequence[torch.Tensor]]:
    tokens, gate_up = rand(256, 192), rand(448, 192, seed=1)
    return lambda: linear_tall.linear_gated(tokens, gate_up, config=TallConfig(2)), [tokens]


def likeliest() -> tuple[Run, Sequence[torch.Tensor]]:
    logits = rand(2, 3000)
    return lambda: sampling.argmax(logits), [logits]


def gating() -> tuple[Run, Sequence[torch.Tensor]]:
    gate_up = rand(3, 4112)
    return lambda: activation.silu_and_mul(gate_up), [gate_up]


@pytest.mark.parametrize(
    "kernel",
    [
        decode,
        decode_after_the_first_layer,
        decode_of_small_blocks_after_the_first_layer,
        decode_of_three_tokens_after_the_first_layer,
        decode_beside_chunks_after_the_first_layer,
        rotation,
        rotation_after_the_first_layer,
        step_inputs,
        step_end,
        words,
        norms,
        products,
        rotated_product,
        rotated_product_after_the_first_layer,
        tall_tiles,
        likeliest,
        gating,
    ],
    ids=lambda k: k.__name__,
)
def test_what_comes_late_is_waited_for(
    emulator: EmulatorBackend, kernel: Callable[[], tuple[Run, Sequence[torch.Tensor]]]
) -> None:
    run, late = kernel()
    wanted = run()
    emulator.late += late
    for _ in range(3):  # in other orders of threads
        assert torch.equal(run(), wanted)


def test_a_copy_of_what_comes_late_is_noticed(emulator: EmulatorBackend) -> None:
    case = make_case([40, 333, 5], head_dim=64)
    inputs = (case.query, case.kv_layer, case.block_tables, case.context_lens)
    emulator.late.append(case.kv_layer[case.block_tables[1, 0], 0])  # copied before the wait, as if it were settled
    with pytest.raises(kernel_compile.KernelError, match="the kernel before has yet to write"):
        attention.paged_attention_decode(*inputs, case.scale, settled=Settled.CONTEXT)
    tokens, weight = rand(96, 192), rand(512, 192, seed=1)  # weights are too: no kernel writes them
    emulator.late[:] = [weight]
    with pytest.raises(kernel_compile.KernelError, match="the kernel before has yet to write"):
        linear_wgmma.linear(tokens, weight, config=WgmmaConfig(96, 2, 4, 2))
