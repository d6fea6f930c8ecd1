"""Says where the wgmma prefill kernel is wrong, if it is: `python -m benchmarks.prefill_probe` (on a Hopper GPU).

Three questions, from the instruction up: is each wrapped product right; is the S path right (V the identity, one tile,
so that the output is P itself); is the PV path right (queries of zero, so that P is uniform)? Then whole problems.
"""

from __future__ import annotations

import sys

import torch

from kernels import attention
from kernels import compile as kernel_compile
from tests.kernels import test_wgmma


def pattern(name: str, actual: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-2) -> bool:
    """Prints which rows and columns differ, also modulo the sizes that fragments and swizzles have."""
    actual, wanted = actual.double().cpu(), wanted.double().cpu()
    wrong = ~((actual - wanted).abs() <= tolerance * max(float(wanted.abs().max()), 1e-6))
    error = float((actual - wanted).norm() / wanted.norm())
    verdict = "WRONG" if wrong.any() else "right"
    print(f"{verdict}  {name}: relative error {error:.2e}, {int(wrong.sum())} of {wrong.numel()}", flush=True)
    if not wrong.any():
        return True
    print(f"   NaN {int(actual.isnan().sum())}, zero {int((actual == 0).sum())}")
    rows, columns = (x.tolist() for x in wrong.nonzero(as_tuple=True))
    for label, values, moduli in (("rows", rows, (8, 16, 64, 128)), ("columns", columns, (2, 8, 16, 64, 128))):
        for modulus in moduli:
            seen = sorted({v % modulus for v in values})
            if len(seen) < modulus:
                print(f"   {label} mod {modulus}: {seen}")
    first = (rows[0], columns[0])
    print(f"   first at {first}: {float(actual[first]):.5f} for {float(wanted[first]):.5f}")
    # Is a row of what came out somewhere else in what was wanted?
    row = actual[rows[0]]
    distance = (wanted - row).norm(dim=1) / (row.norm() + 1e-9)
    print(f"   row {rows[0]} is nearest to wanted row {int(distance.argmin())} (distance {float(distance.min()):.3f})")
    return False


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, float64) for query [T, Hq, D], key and value [C, Hkv, D]; one sequence, blocks in reversed order."""
    context, kv_heads, dim = key.shape
    blocks = -(-context // block)
    pool = torch.zeros(blocks, 2, kv_heads, block, dim, dtype=query.dtype, device=query.device)
    for i in range(blocks):
        part = slice(i * block, min((i + 1) * block, context))
        for which, x in enumerate((key, value)):
            pool[blocks - 1 - i, which, :, : part.stop - part.start] = x[part].transpose(0, 1)
    table = torch.arange(blocks - 1, -1, -1, dtype=torch.int32, device=query.device)[None].contiguous()
    length = torch.tensor([context], dtype=torch.int32, device=query.device)
    start = torch.tensor([0, len(query)], dtype=torch.int32, device=query.device)
    out = attention.paged_attention_prefill(query, pool, table, length, start, dim**-0.5)
    group = query.shape[1] // kv_heads
    wide_key, wide_value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,thd->hqt", query.double(), wide_key) * dim**-0.5
    positions = torch.arange(context, device=query.device)
    ends = context - len(query) + torch.arange(len(query), device=query.device)
    scores.masked_fill_(positions[None] > ends[:, None], float("-inf"))
    return out, torch.einsum("hqt,thd->qhd", scores.softmax(-1), wide_value)


def main() -> None:
    """Prints one line a question and the pattern of what is wrong."""
    attention.SPECIALISED_PREFILL = True
    device = torch.device("cuda", 0)
    if not kernel_compile.limits(device).wgmma:
        sys.exit("benchmarks.prefill_probe needs a GPU of compute capability 9.0")
    torch.manual_seed(0)
    a, b = test_wgmma.operands(device)
    pattern(
        "wgmma, both in shared memory", test_wgmma.run(device, test_wgmma.BOTH_SHARED, a, b), a.float() @ b.float().T
    )
    pattern(
        "wgmma, left in registers", test_wgmma.run(device, test_wgmma.LEFT_IN_REGISTERS, a, b), a.float() @ b.float()
    )

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    for dim in (128, 64, 256):
        identity = torch.eye(128, dim, device=device, dtype=torch.bfloat16)[:, None]
        # Rows are (token, head): with 4 heads the last 32 tokens are the 128 rows of one CTA.
        for group in (4, 1):
            tokens = 128 // group
            pairs = attend(randn(tokens, group, dim), randn(128, 1, dim), identity)
            pattern(f"S path, {dim} elements, group {group}", *(x.reshape(128, dim) for x in pairs))
        pairs = attend(
            torch.zeros(32, 4, dim, device=device, dtype=torch.bfloat16), randn(128, 1, dim), randn(128, 1, dim)
        )
        pattern(f"PV path, {dim} elements, one tile", *(x.reshape(128, dim) for x in pairs))
        pairs = attend(
            torch.zeros(32, 4, dim, device=device, dtype=torch.bfloat16), randn(512, 1, dim), randn(512, 1, dim)
        )
        pattern(f"PV path, {dim} elements, several tiles", *(x.reshape(128, dim) for x in pairs))
        for tokens, context, kv_heads in ((32, 40, 1), (32, 600, 1), (32, 2048, 1), (100, 2048, 2), (512, 512, 8)):
            pairs = attend(
                randn(tokens, 4 * kv_heads, dim), randn(context, kv_heads, dim), randn(context, kv_heads, dim)
            )
            pattern(
                f"{tokens} tokens of {context}, {kv_heads} KV heads, {dim} elements", *(x.flatten(0, 1) for x in pairs)
            )


if __name__ == "__main__":
    main()
