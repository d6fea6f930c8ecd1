"""What a step begins and ends with, on CUDA devices: `csrc/step.cu`. Twins: `kernels.reference.step`."""

from __future__ import annotations

import torch

from kernels import compile as kernel_compile
from kernels.cache import check_index, copying_device
from kernels.reference.step import DecodeInputs

_THREADS = 128


def _check(rows: int, tokens: torch.Tensor, **vectors: torch.Tensor) -> None:
    """Raises ValueError: what is no contiguous int64 [rows], or no int64 [3, slots], on one device."""
    for name, vector in vectors.items():
        check_index(name, vector, rows, tokens.device)
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != 3 or tokens.stride(1) != 1:
        raise ValueError(f"tokens must be int64 [3, slots] with contiguous rows: {tokens.dtype} {tuple(tokens.shape)}")


def decode_inputs(
    slots: torch.Tensor, tokens: torch.Tensor, block_tables: torch.Tensor, columns: int, block_size: int
) -> DecodeInputs:
    """As the twin, in one launch. Raises ValueError, KernelError."""
    rows = slots.shape[0]
    _check(rows, tokens, slots=slots)
    if block_tables.dtype != torch.int32 or block_tables.dim() != 2 or block_tables.stride(1) != 1:
        raise ValueError(f"block_tables must be int32 [slots, blocks]: {block_tables.dtype}")
    if columns > block_tables.shape[1] or block_size & (block_size - 1):
        raise ValueError(f"{columns} columns of {block_tables.shape[1]}, blocks of {block_size} tokens")
    longs = torch.empty((5, rows), dtype=torch.int64, device=slots.device)
    tables = torch.empty((rows, columns), dtype=torch.int32, device=slots.device)
    context_lens = torch.empty(rows, dtype=torch.int32, device=slots.device)
    known, output_lens, token_ids, positions, slot_mapping = longs
    found = DecodeInputs(known, output_lens, token_ids, positions, slot_mapping, tables, context_lens)
    if rows:
        kernel = kernel_compile.kernel("step.cu", "decode_inputs", slots.device, BLOCK_SIZE=block_size)
        kernel(
            (rows, 1, 1), _THREADS, 0,
            *(tensor.data_ptr() for tensor in found),
            slots.data_ptr(), tokens.data_ptr(), block_tables.data_ptr(),
            tokens.stride(0), block_tables.stride(0), columns,
        )  # fmt: skip
    return found


def move_on(
    tokens: torch.Tensor, slots: torch.Tensor, known: torch.Tensor, encoded: torch.Tensor, out: torch.Tensor
) -> None:
    """As the twin, in one launch. Raises ValueError, KernelError."""
    rows = slots.shape[0]
    _check(rows, tokens, slots=slots, known=known, encoded=encoded, out=out)
    if rows:
        kernel = kernel_compile.kernel("step.cu", "move_on", slots.device, BLOCK_SIZE=1)
        kernel(
            (-(-rows // _THREADS), 1, 1), _THREADS, 0,
            out.data_ptr(), tokens.data_ptr(), slots.data_ptr(), known.data_ptr(), encoded.data_ptr(),
            tokens.stride(0), rows,
        )  # fmt: skip


def copy_words(source: torch.Tensor, destination: torch.Tensor) -> None:
    """As the twin, in one launch on the device of one of them; the other may be pinned memory of the host, which the
    kernel reads or writes across the bus. Unlike a copy engine's copy it is not queued behind swaps. Raises ValueError,
    KernelError.
    """
    size = source.numel() * source.element_size()
    if source.dtype != destination.dtype or source.shape != destination.shape:
        raise ValueError(f"{source.dtype} {tuple(source.shape)}, {destination.dtype} {tuple(destination.shape)} differ")
    if size % 4 or not (source.is_contiguous() and destination.is_contiguous()):
        raise ValueError("both must be contiguous and whole words of 4 bytes")
    if not size:
        return
    device = copying_device(source, destination)
    kernel = kernel_compile.kernel("step.cu", "copy_words", device, BLOCK_SIZE=1)
    kernel((-(-size // 1024), 1, 1), 256, 0, destination.data_ptr(), source.data_ptr(), size // 4)
