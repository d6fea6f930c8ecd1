"""Sampling on CUDA devices: `csrc/sampling.cu`. Twins: `kernels.reference.sampling` and `kernels.reference.philox`.

Sums of logit and noise are float32 here and float64 in the twins: where the two largest are within rounding of one
another, or a nucleus ends within rounding of its share, the token may differ. The same logits on the same device always
give the same token.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch

from kernels import compile as kernel_compile
from kernels.reference.sampling import TokenLogprobRows

_THREADS = 1024
_BINS = _CANDIDATES = 2048
_SHARED_BYTES = 3 * _BINS * 4 + 2 * _CANDIDATES * 8 + 2 * 32 * 8 + 4 * 8 + 2 * 4
"""sizeof(Workspace)."""
_MOST_PARTS = 8
"""Of a row, for CTAs that look for its likeliest token."""
MAX_TOP = _CANDIDATES
"""Most top log-probabilities of a row."""


def _check_logits(logits: torch.Tensor, dtypes: Collection[torch.dtype] = (torch.float32,)) -> None:
    if logits.dim() != 2 or logits.dtype not in dtypes or logits.stride(1) != 1 or not logits.shape[1]:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"logits must be {wanted} [R, V] with contiguous rows: {tuple(logits.shape)} {logits.dtype}")


def _check_column(name: str, column: torch.Tensor, dtype: torch.dtype, count: int, device: torch.device) -> None:
    if column.dtype != dtype or column.shape != (count,) or not column.is_contiguous() or column.device != device:
        raise ValueError(f"{name} must be contiguous {dtype} [{count}] on {device}: {column.shape} {column.dtype}")


def _kernel(name: str, logits: torch.Tensor) -> kernel_compile.Kernel:
    vector = 16 // logits.element_size()
    aligned = not (logits.shape[1] % vector or logits.stride(0) % vector or logits.data_ptr() % 16)
    return kernel_compile.kernel(
        "sampling.cu",
        name,
        logits.device,
        DTYPE=kernel_compile.CUDA_NAMES[logits.dtype],
        VECTOR=vector if aligned else 1,
    )


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """As the twin. Raises ValueError, KernelError."""
    _check_logits(logits, kernel_compile.CUDA_NAMES)
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    parts = min(_MOST_PARTS, kernel_compile.limits(logits.device).processors // max(1, rows)) or 1
    best, least, arrived = _shared_among_parts(logits.device)
    _kernel("argmax", logits)(
        (rows, parts, 1),
        _THREADS,
        _SHARED_BYTES,
        out.data_ptr(),
        logits.data_ptr(),
        best.data_ptr(),
        least.data_ptr(),
        arrived.data_ptr(),
        size,
        logits.stride(0),
    )
    return out


@functools.cache
def _shared_among_parts(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one launch at a time, which leaves them zero: as many rows as can have several parts."""
    rows = kernel_compile.limits(device).processors
    return (
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    indices: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """As the twin; and rows of temperature 0 take their likeliest token, so one launch serves a mixed batch.

    Raises ValueError, KernelError.
    """
    _check_logits(logits, kernel_compile.CUDA_NAMES)
    rows, size = logits.shape
    for name, column, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("indices", indices, torch.int64),
        ("positions", positions, torch.int64),
    ):
        _check_column(name, column, dtype, rows, logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _kernel("sample", logits)(
        (rows, 1, 1),
        _THREADS,
        _SHARED_BYTES,
        out.data_ptr(),
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        seeds.data_ptr(),
        indices.data_ptr(),
        positions.data_ptr(),
        size,
        logits.stride(0),
    )
    return out


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobRows:
    """As the twin; token_ids must lie in the vocabulary. Raises ValueError, KernelError."""
    _check_logits(logits, kernel_compile.CUDA_NAMES)
    rows, size = logits.shape
    _check_column("token_ids", token_ids, torch.int64, rows, logits.device)
    num_top = min(num_top, size)
    if not 0 <= num_top <= MAX_TOP:
        raise ValueError(f"num_top must be in 0..{MAX_TOP}, not {num_top}")
    device = logits.device
    result = TokenLogprobRows(
        logprobs=torch.empty(rows, dtype=torch.float32, device=device),
        ranks=torch.empty(rows, dtype=torch.int64, device=device),
        top_ids=torch.empty((rows, num_top), dtype=torch.int64, device=device),
        top_logprobs=torch.empty((rows, num_top), dtype=torch.float32, device=device),
    )
    _kernel("token_logprobs", logits)(
        (rows, 1, 1),
        _THREADS,
        _SHARED_BYTES,
        result.logprobs.data_ptr(),
        result.ranks.data_ptr(),
        result.top_ids.data_ptr(),
        result.top_logprobs.data_ptr(),
        logits.data_ptr(),
        token_ids.data_ptr(),
        num_top,
        size,
        logits.stride(0),
    )
    return result


def apply_penalties(
    logits: torch.Tensor,
    prompt_seen: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """As the twin; with int64 `slots` [R] the other tensors are indexed by slot and row r uses row slots[r] of them.

    Raises ValueError, KernelError.
    """
    _check_logits(logits)
    rows, size = logits.shape
    state_rows = prompt_seen.shape[0]
    if slots is None and state_rows != rows:
        raise ValueError(f"{rows} rows of logits but {state_rows} of state; say which by slots")
    if slots is not None:
        _check_column("slots", slots, torch.int64, rows, logits.device)
    for name, table, dtype in (("prompt_seen", prompt_seen, torch.bool), ("output_counts", output_counts, torch.int32)):
        if table.dtype != dtype or table.shape != (state_rows, size) or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} [{state_rows}, {size}]: {table.shape} {table.dtype}")
    for name, column in (("repetition", repetition), ("presence", presence), ("frequency", frequency)):
        _check_column(name, column, torch.float32, state_rows, logits.device)
    out = logits if in_place else torch.empty_strided(logits.shape, logits.stride(), device=logits.device)
    _kernel("apply_penalties", logits)(
        (-(-size // 1024), rows, 1),
        256,
        0,
        out.data_ptr(),
        logits.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        prompt_seen.data_ptr(),
        output_counts.data_ptr(),
        repetition.data_ptr(),
        presence.data_ptr(),
        frequency.data_ptr(),
        size,
        logits.stride(0),
    )
    return out


def _adjust(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor | None) -> None:
    _check_logits(logits)
    count = rows.numel()
    for name, column, dtype in (("rows", rows, torch.int64), ("token_ids", token_ids, torch.int64)):
        _check_column(name, column, dtype, count, logits.device)
    if bias is not None:
        _check_column("bias", bias, torch.float32, count, logits.device)
    _kernel("adjust_tokens", logits)(
        (-(-count // 256), 1, 1),
        256,
        0,
        logits.data_ptr(),
        rows.data_ptr(),
        token_ids.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        count,
        logits.stride(0),
    )


def add_logit_bias(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor) -> None:
    """As the twin. Raises ValueError, KernelError."""
    _adjust(logits, rows, token_ids, bias)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """As the twin; a pair may appear twice. Raises ValueError, KernelError."""
    _adjust(logits, rows, token_ids, None)
