"""Rotary embedding, writes to the KV cache and block copies on CUDA devices: `csrc/cache.cu`.

Twins: `kernels.reference.cache` and `kernels.reference.layers.rope`.
"""

from __future__ import annotations

import torch

from kernels import compile as kernel_compile

_THREADS, _MANY_THREADS = 128, 512
_FEW_TOKENS = 264
"""Up to so many a token's heads are turned all at once: a few CTAs leave a multiprocessor room for more threads."""
_COPY_WORDS = 256 * 4


def _vector(head_dim: int, rotary_dim: int, element_size: int, tensors: list[torch.Tensor], strides: list[int]) -> int:
    """Elements of one access: as many as 16 bytes, sizes and places allow."""
    vector = 16 // element_size
    while vector > 1 and (
        head_dim % vector
        or (rotary_dim // 2) % vector
        or any(stride % vector for stride in strides)
        or any(tensor.data_ptr() % (vector * element_size) for tensor in tensors)
    ):
        vector //= 2
    return vector


def _check_heads(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.dim() != 3 or tensor.stride()[1:] != (tensor.shape[2], 1):
        raise ValueError(
            f"{name} must be [T, heads, head_dim], heads contiguous: {tuple(tensor.shape)} {tensor.stride()}"
        )
    if (tensor.shape[0], tensor.shape[2]) != (like.shape[0], like.shape[2]):
        raise ValueError(f"{name} {tuple(tensor.shape)} does not fit {tuple(like.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device or tensor.dtype not in kernel_compile.CUDA_NAMES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32 on one device: {tensor.dtype}")


def _check_layer(kv_layer: torch.Tensor, key: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    num_kv_heads, head_dim = key.shape[1:]
    if kv_layer.dim() != 5 or kv_layer.shape[1:3] != (2, num_kv_heads) or kv_layer.shape[4] != head_dim:
        raise ValueError(f"kv_layer {tuple(kv_layer.shape)} does not fit key {tuple(key.shape)}")
    check_stored(kv_layer, key, slot_mapping)


def check_stored(kv_layer: torch.Tensor, tokens: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless slot_mapping is of the tokens [T, ...], and kv_layer of their dtype, on
    their device, contiguous inside a block."""
    block_size, head_dim = kv_layer.shape[3:]
    if kv_layer.stride()[2:] != (block_size * head_dim, head_dim, 1):
        raise ValueError(f"kv_layer must be contiguous inside a block: strides {kv_layer.stride()}")
    if kv_layer.dtype != tokens.dtype or kv_layer.device != tokens.device:
        raise TypeError(f"kv_layer must be {tokens.dtype} on {tokens.device}: {kv_layer.dtype} on {kv_layer.device}")
    check_index("slot_mapping", slot_mapping, tokens.shape[0], tokens.device)


def check_index(name: str, index: torch.Tensor, count: int, device: torch.device) -> None:
    """Raises ValueError for what is not contiguous int64 [count] on `device`."""
    if index.dtype != torch.int64 or index.shape != (count,) or not index.is_contiguous():
        raise ValueError(f"{name} must be contiguous int64 [{count}]: {tuple(index.shape)} {index.dtype}")
    if index.device != device:
        raise ValueError(f"{name} must be on {device}")


def copying_device(source: torch.Tensor, destination: torch.Tensor) -> torch.device:
    """The device of one of them, which copies. Raises ValueError if the other is host memory that is not pinned."""
    device = destination.device if source.device.type == "cpu" else source.device
    if device.type == "cuda" and not all(t.device == device or t.is_pinned() for t in (source, destination)):
        raise ValueError("the host's memory must be pinned")
    return device


def _launch(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    kv_layer: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    *,
    interleaved: bool,
    return_key: bool,
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated queries, rotated keys); empty tensors where not asked for."""
    head_dim = key.shape[2]
    rotary_dim = 0
    if cos_sin is not None:
        assert positions is not None
        check_index("positions", positions, key.shape[0], key.device)
        rotary_dim = cos_sin.shape[1]
        if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous() or rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"cos_sin must be contiguous float32 [positions, even]: {tuple(cos_sin.shape)}")
    block_size, block_stride, value_offset = 1, 0, 0
    if kv_layer is not None:
        assert slot_mapping is not None
        _check_layer(kv_layer, key, slot_mapping)
        block_size, block_stride, value_offset = kv_layer.shape[3], kv_layer.stride(0), kv_layer.stride(1)
    tensors = [t for t in (query, key, value, kv_layer) if t is not None]
    strides = [t.stride(0) for t in tensors] + [value_offset]
    kernel = kernel_compile.kernel(
        "cache.cu",
        "rope_and_cache",
        key.device,
        DTYPE=kernel_compile.CUDA_NAMES[key.dtype],
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_SIZE=block_size,
        INTERLEAVED=int(interleaved),
        VECTOR=_vector(head_dim, rotary_dim, key.element_size(), tensors, strides),
    )
    query_heads = 0 if query is None else query.shape[1]
    query_out = torch.empty((key.shape[0], query_heads, head_dim), dtype=key.dtype, device=key.device)
    key_out = torch.empty(key.shape if return_key else (0,), dtype=key.dtype, device=key.device)
    kernel(
        (key.shape[0], 1, 1),
        _MANY_THREADS if key.shape[0] <= _FEW_TOKENS else _THREADS,
        0,
        query_out.data_ptr(),
        key_out.data_ptr() if return_key else 0,
        0 if kv_layer is None else kv_layer.data_ptr(),
        0 if query is None else query.data_ptr(),
        key.data_ptr(),
        0 if value is None else value.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        0 if cos_sin is None else cos_sin.data_ptr(),
        0 if slot_mapping is None else slot_mapping.data_ptr(),
        query_heads,
        key.shape[1],
        0 if query is None else query.stride(0),
        key.stride(0),
        0 if value is None else value.stride(0),
        block_stride,
        value_offset,
        int(settled),
    )
    return query_out, key_out


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """As the twin; key and value may be slices of a fused projection. Raises ValueError, TypeError, KernelError."""
    _check_heads("key", key, key)
    _check_heads("value", value, key)
    _launch(None, key, value, None, None, kv_layer, slot_mapping, interleaved=False, return_key=False)


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin; positions are not checked against cos_sin's rows. Raises ValueError, TypeError, KernelError."""
    _check_heads("key", key, key)
    _check_heads("query", query, key)
    return _launch(query, key, None, positions, cos_sin, None, None, interleaved=interleaved, return_key=True)


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    interleaved: bool = False,
    settled: bool = False,
) -> torch.Tensor:
    """As the twin, in one launch; query, key and value may be slices of a fused projection.

    settled: positions and slot_mapping were written before an earlier launch of this kernel that was not told so. It
    reads them before the kernel ahead of it is done (`Settled`). Raises ValueError, TypeError, KernelError.
    """
    _check_heads("key", key, key)
    _check_heads("query", query, key)
    _check_heads("value", value, key)
    rotated, _ = _launch(
        query, key, value, positions, cos_sin, kv_layer, slot_mapping,
        interleaved=interleaved, return_key=False, settled=settled,
    )  # fmt: skip
    return rotated


def copy_blocks(pool: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """As the twin. Raises ValueError, KernelError."""
    launch_copies(pool, pool, sources, destinations)


def launch_copies(
    source: torch.Tensor, destination: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor
) -> None:
    """`destination[destination_ids[i]] = source[source_ids[i]]` by a kernel on the ids' device.

    source and destination are contiguous [blocks, ...] of one block shape and dtype, each in that device's memory or in
    pinned host memory, which the kernel reads and writes across the bus. Raises ValueError, KernelError.
    """
    if source.shape[1:] != destination.shape[1:] or source.dtype != destination.dtype:
        raise ValueError(f"blocks differ: {source.shape} {source.dtype}, {destination.shape} {destination.dtype}")
    if not (source.is_contiguous() and destination.is_contiguous()):
        raise ValueError("pools must be contiguous")
    count = source_ids.numel()
    for ids in (source_ids, destination_ids):
        same_device = ids.device == source_ids.device
        if ids.dtype != torch.int64 or ids.shape != (count,) or not ids.is_contiguous() or not same_device:
            raise ValueError(f"ids must be contiguous int64 [{count}] on one device: {tuple(ids.shape)} {ids.dtype}")
    block_bytes = source[0].numel() * source.element_size()
    if block_bytes % 16 or source.data_ptr() % 16 or destination.data_ptr() % 16:
        raise ValueError(f"blocks must be a multiple of 16 bytes and aligned to them, not {block_bytes} bytes")
    kernel = kernel_compile.kernel(
        "cache.cu", "copy_blocks", source_ids.device,
        DTYPE="bfloat16", HEAD_DIM=8, ROTARY_DIM=0, BLOCK_SIZE=1, INTERLEAVED=0, VECTOR=8,
    )  # fmt: skip
    words = block_bytes // 16
    for first in range(0, count, 65535):  # the grid's second dimension
        kernel(
            (-(-words // _COPY_WORDS), min(count - first, 65535), 1),
            256,
            0,
            destination.data_ptr(),
            source.data_ptr(),
            destination_ids.data_ptr() + first * 8,
            source_ids.data_ptr() + first * 8,
            words,
        )
