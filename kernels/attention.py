"""PagedAttention on CUDA devices: checks and launches for `csrc/attention_*.cu`. Twins: `kernels.reference.attention`.

bfloat16 and float16 run on tensor cores; float32, which only comparisons need, on a simple kernel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from kernels import compile as kernel_compile
from kernels.compile import TensorMap
from kernels.kv_layout import MAX_BLOCK_SIZE
from kernels.reference import Settled, SharedPrefix

TILE = 16
"""Tokens that one warp of the decode kernel takes at a time."""
MAX_SEQUENCES = 2048
"""Sequences of one decode launch: their prefix sums lie in shared memory."""
_MAX_ROWS, _MAX_HEAD_DIM = 16, 256
_MAX_UNITS = 1 << 18
_MOST_CTAS = 8
_SWIZZLE_ATOM = 1024
"""Bytes of shared memory; stages that boxes are copied to begin at one."""
_RESERVED_SHARED = 1024
"""Shared memory that the system takes of every resident CTA."""
_UNCUT, _UNCUT_OF_MANY, _MANY_UNITS = 32, 16, 1024
"""Tiles of a unit that one team reads, of up to so many units and of more. To put parts together takes 2 to 5 us; of
very many units the shares then differ by more."""


@dataclass(frozen=True)
class DecodeConfig:
    """The compiled shape of one decode kernel."""

    query_tiles: int
    """Groups of eight (query token, query head) rows that share one pass over the keys."""
    warps: int
    """Warps of a CTA, each with its own pipeline."""
    team: int
    """Warps that share a unit where a CTA's do not stand side by side."""
    stages: int
    """Tiles of a warp's pipeline: one read, the others in flight."""
    ctas: int
    """CTAs resident on a multiprocessor."""
    boxes: bool = False
    """Whether keys and values are copied as boxes of a tensor map."""
    uncut: int = _UNCUT_OF_MANY
    """Tiles of a unit up to which one team reads it all."""

    @property
    def defines(self) -> dict[str, int]:
        """What the kernel is compiled with, besides types and layout."""
        return {
            "QUERY_TILES": self.query_tiles,
            "WARPS": self.warps,
            "TEAM": self.team,
            "STAGES": self.stages,
            "MIN_CTAS": self.ctas,
            "BOXES": int(self.boxes),
            "UNCUT": self.uncut,
        }

    def shared_bytes(self, head_dim: int, num_seqs: int) -> int:
        """Dynamic shared memory of a launch."""
        stages = self.warps * self.stages * _stage_bytes(head_dim, self.query_tiles, boxes=self.boxes)
        fixed = self.boxes * _SWIZZLE_ATOM
        return fixed + stages + self.warps * 8 * self.query_tiles * 8 + (2 * self.warps + num_seqs + 1) * 4


def _stage_bytes(head_dim: int, query_tiles: int, *, boxes: bool) -> int:
    """Of shared memory: a stage and its barrier."""
    if not boxes:
        return 2 * TILE * (2 * head_dim + 16)
    merged = 8 * query_tiles * (head_dim + 4) * 4
    return max(2 * TILE * 2 * head_dim, -(-merged // _SWIZZLE_ATOM) * _SWIZZLE_ATOM) + 8


_FEW_SEQUENCES = 256
_PROCESSOR_WARPS = 8
_WIDE_SHAPE = (_PROCESSOR_WARPS, _PROCESSOR_WARPS, 1, 3)
_ANY_SHAPES = ((4, 4, 2, 3), (4, 4, 1, 2), (2, 2, 1, 2))
"""Warps, warps of a team, CTAs, fewest stages, best first."""


@functools.cache
def decode_config(
    head_dim: int,
    rows: int,
    limits: kernel_compile.DeviceLimits,
    num_seqs: int = 1,
    num_kv_heads: int = 1,
    *,
    boxes: bool = False,
) -> DecodeConfig:
    """Tuned for 16 to 64 tokens a block; `rows` is query tokens times query heads of a KV head. Raises ValueError.

    Of few units (sequence, KV head) each has a multiprocessor, or half of one. Of more a CTA has as many warps side by
    side as heads allow, so that it reads long pieces of memory, and teams of two for short contexts: warps of a team
    meet at a unit's end (docs/kernels/decode.md).
    """
    # O of 16 rows of 256 elements does not fit the registers: two passes over the keys there.
    query_tiles = 2 if rows > 8 and head_dim <= 128 else 1
    shapes: tuple[tuple[int, int, int, int], ...] = _ANY_SHAPES
    units = num_seqs * num_kv_heads
    if units <= limits.processors:
        shapes = (_WIDE_SHAPE, *shapes)
    elif units > limits.processors * _ANY_SHAPES[0][2]:
        side = math.gcd(_PROCESSOR_WARPS, num_kv_heads * math.ceil(rows / (8 * query_tiles)))
        shapes = ((side, min(max(side // 2, 1), 2), _PROCESSOR_WARPS // side, 3), *shapes)
    # A power of two: few kernels to compile, and room for the prefix sums of no more sequences than there may be.
    sequences = max(_FEW_SEQUENCES, 1 << (num_seqs - 1).bit_length())
    for warps, team, ctas, fewest_stages in shapes:
        room = min(limits.shared_bytes, limits.processor_shared_bytes // ctas - _RESERVED_SHARED)
        room -= (sequences + 128) * 4 + boxes * _SWIZZLE_ATOM
        stages = room // (warps * _stage_bytes(head_dim, query_tiles, boxes=boxes))
        if stages >= fewest_stages:
            uncut = _UNCUT if units <= _MANY_UNITS else _UNCUT_OF_MANY
            return DecodeConfig(query_tiles, warps, team, min(stages, 6), ctas, boxes, uncut)
    raise ValueError(f"head_dim {head_dim} needs more shared memory than this GPU has; use dtype float32")


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of decode launches that follow one another. Launches that may overlap need one each."""

    partial_out: torch.Tensor
    """float32: what CTAs hold of sequences that they share."""
    partial_stats: torch.Tensor
    """float32: their maxima and sums."""
    arrivals: torch.Tensor
    """int32: how many CTAs have delivered; zero between launches."""

    @staticmethod
    def allocate(device: torch.device) -> DecodeWorkspace:
        """About 35 MB on an H200. Not inside a graph capture: a replay would find other contents in its place."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise kernel_compile.KernelError("allocate a DecodeWorkspace (or run decode once) before capturing a graph")
        slots = 2 * _MOST_CTAS * kernel_compile.limits(device).processors  # a CTA shares at most two units
        return DecodeWorkspace(
            partial_out=torch.empty(slots * _MAX_ROWS * _MAX_HEAD_DIM, dtype=torch.float32, device=device),
            partial_stats=torch.empty(slots * _MAX_ROWS * 2, dtype=torch.float32, device=device),
            arrivals=torch.zeros(_MAX_UNITS, dtype=torch.int32, device=device),
        )


_workspaces: dict[torch.device, DecodeWorkspace] = {}


def _workspace(device: torch.device) -> DecodeWorkspace:
    if device not in _workspaces:
        _workspaces[device] = DecodeWorkspace.allocate(device)
    return _workspaces[device]


def forget_workspaces() -> None:
    """Drops the scratch memory that launches without a workspace share; captured graphs that use it must be gone."""
    _workspaces.clear()


def _check(
    query: torch.Tensor, kv_layer: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor
) -> tuple[int, int]:
    """(query heads per KV head, block size). Raises ValueError or TypeError for what the kernels cannot take."""
    if query.dtype not in kernel_compile.CUDA_NAMES or kv_layer.dtype != query.dtype:
        raise TypeError(
            f"query and kv_layer must both be bfloat16, float16 or float32: {query.dtype}, {kv_layer.dtype}"
        )
    if block_tables.dtype != torch.int32 or context_lens.dtype != torch.int32:
        raise TypeError(f"block_tables and context_lens must be int32: {block_tables.dtype}, {context_lens.dtype}")
    if any(t.device != query.device for t in (kv_layer, block_tables, context_lens)):
        raise ValueError("query, kv_layer, block_tables and context_lens must be on one device")
    if kv_layer.dim() != 5 or kv_layer.shape[1] != 2 or kv_layer.shape[4] != query.shape[-1]:
        raise ValueError(f"kv_layer {tuple(kv_layer.shape)} does not fit query {tuple(query.shape)}")
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    if kv_layer.stride()[2:] != (block_size * head_dim, head_dim, 1):
        raise ValueError(f"kv_layer must be contiguous inside a block: strides {kv_layer.stride()}")
    if not (1 <= block_size <= MAX_BLOCK_SIZE and block_size & (block_size - 1) == 0):
        raise ValueError(f"block_size must be a power of two in 1..{MAX_BLOCK_SIZE}, not {block_size}")
    num_heads = query.shape[-2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    if query.stride()[-2:] != (head_dim, 1):
        raise ValueError(f"query heads must be contiguous: strides {query.stride()}")
    if block_tables.dim() != 2 or block_tables.stride(1) != 1 or not context_lens.is_contiguous():
        raise ValueError("block_tables must be [S, M] with contiguous rows, context_lens contiguous")
    if block_tables.shape[0] != context_lens.shape[0]:
        raise ValueError(f"{block_tables.shape[0]} block tables but {context_lens.shape[0]} context lengths")
    if head_dim > _MAX_HEAD_DIM or (query.dtype != torch.float32 and head_dim % 16):
        raise ValueError(f"head_dim must be a multiple of 16, at most {_MAX_HEAD_DIM}, not {head_dim}")
    if query.dtype != torch.float32:
        # 16-byte copies: all places must be multiples of 8 elements; head_dim is.
        strides = (kv_layer.stride(0), kv_layer.stride(1), query.stride(0))
        if any(stride % 8 for stride in strides) or kv_layer.data_ptr() % 16 or query.data_ptr() % 16:
            raise ValueError(f"kv_layer and query must be aligned to 16 bytes: strides {strides}")
    return num_heads // num_kv_heads, block_size


def paged_attention_decode(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    *,
    out: torch.Tensor | None = None,
    shared: SharedPrefix | None = None,
    settled: Settled = Settled.NOTHING,
    workspace: DecodeWorkspace | None = None,
) -> torch.Tensor:
    """As the twin; and query may be [B, Q, Hq, D], the last Q tokens of each sequence, each seeing up to itself.

    context_lens is read on the device, so a captured graph serves any lengths, shared ones too; a row of length 0 gives
    zeros. What is `shared` is read once for all rows where `shares_prefixes` and there is no window. `out` is written
    in place of a new tensor. Raises ValueError, TypeError, KernelError.
    """
    group, block_size = _check(query, kv_layer, block_tables, context_lens)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    elif out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and like query: {tuple(out.shape)} {out.dtype}")
    num_seqs = block_tables.shape[0]
    if query.shape[0] != num_seqs:
        raise ValueError(f"{query.shape[0]} queries but {num_seqs} block tables")
    query_len = query.shape[1] if query.dim() == 4 else 1
    if query.dim() == 4 and query.stride(0) != query_len * query.stride(1):
        raise ValueError(f"query tokens must be evenly spaced: strides {query.stride()}")
    if query.dtype == torch.float32:
        _simple(query, out, kv_layer, block_tables, context_lens, None, query_len, scale, sliding_window, soft_cap)
        return out
    if num_seqs > MAX_SEQUENCES:
        for first in range(0, num_seqs, MAX_SEQUENCES):
            part = slice(first, first + MAX_SEQUENCES)
            paged_attention_decode(
                query[part], kv_layer, block_tables[part], context_lens[part], scale, sliding_window, soft_cap,
                workspace=workspace, out=out[part], settled=settled,
            )  # fmt: skip
        return out
    device, head_dim, num_kv_heads = query.device, query.shape[-1], kv_layer.shape[2]
    limits = kernel_compile.limits(device)
    rows = query_len * group
    boxes = kv_boxes(kv_layer, head_dim // 64, 2) if limits.wgmma else None
    config = decode_config(head_dim, rows, limits, num_seqs, num_kv_heads, boxes=boxes is not None)
    units = num_seqs * num_kv_heads * -(-rows // (8 * config.query_tiles))
    if units > _MAX_UNITS:
        raise ValueError(f"{units} pairs of sequence and head in one launch; at most {_MAX_UNITS}")
    workspace = workspace or _workspace(device)
    found = None
    if shared is not None and query.dim() == 3 and not sliding_window and scale > 0:
        found = _attend_to_shared(query, kv_layer, shared, scale, soft_cap)
    shared_addresses = (0, 0, 0)
    if shared is not None and found is not None:
        shared_addresses = (shared.row_lens.data_ptr(), found[0].data_ptr(), found[1].data_ptr())
    kernel = kernel_compile.kernel(
        "attention_decode.cu",
        "paged_attention_decode",
        device,
        DTYPE=kernel_compile.CUDA_NAMES[query.dtype],
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SHARED_PREFIX=int(found is not None),
        **config.defines,
    )
    kernel(
        (limits.processors * config.ctas, 1, 1),
        config.warps * 32,
        config.shared_bytes(head_dim, num_seqs),
        out.data_ptr(),
        query.data_ptr(),
        kv_layer.data_ptr(),
        _NO_MAP if boxes is None else _encoded(device, boxes),
        _NO_MAP if boxes is None else _encoded(device, replace(boxes, box=(64, TILE // 2, 1, 1, 1))),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        workspace.partial_out.data_ptr(),
        workspace.partial_stats.data_ptr(),
        workspace.arrivals.data_ptr(),
        num_seqs,
        query_len,
        num_kv_heads,
        group,
        block_tables.stride(0),
        kv_layer.stride(0),
        kv_layer.stride(1),
        query.stride(-3),
        out.stride(-3),
        scale,
        sliding_window or 0,
        soft_cap or 0.0,
        int(settled),
        *shared_addresses,
    )
    return out


_NO_MAP = bytes(128)
_encoded = functools.lru_cache(maxsize=4096)(kernel_compile.tensor_map)


def kv_boxes(kv_layer: torch.Tensor, panels: int, kinds: int) -> TensorMap | None:
    """Boxes of 16 tokens of a head: of so many times 64 elements, of keys or values (1 of 2 kinds) or both. None: the
    layer is not laid out for them."""
    blocks, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    head = block_size * head_dim
    block_stride, value_offset = kv_layer.stride()[:2]
    if head_dim % 64 or block_size < TILE or not blocks or block_stride % head or value_offset % 8:
        return None
    if kv_layer.data_ptr() % 16:
        return None
    sizes = (64, block_size, head_dim // 64, 2, (blocks - 1) * (block_stride // head) + num_kv_heads)
    strides = tuple(2 * elements for elements in (head_dim, 64, value_offset, head))
    return TensorMap(kv_layer.data_ptr(), kv_layer.dtype, sizes, strides, (64, TILE, panels, kinds, 1))


def _specialised(kv_layer: torch.Tensor) -> tuple[HopperConfig, TensorMap] | None:
    """How specialised warpgroups attend to chunks, and the boxes that they copy. None: there is no kernel of them for
    this layer."""
    block_size, head_dim = kv_layer.shape[3:]
    config = hopper_config(head_dim, block_size, kernel_compile.limits(kv_layer.device))
    boxes = None if config is None else kv_boxes(kv_layer, 1, 1)
    return None if config is None or boxes is None else (config, boxes)


def shares_prefixes(head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel that attends to a prefix once for many rows. Raises KernelError."""
    limits = kernel_compile.limits(device)
    return dtype in (torch.bfloat16, torch.float16) and hopper_config(head_dim, block_size, limits) is not None


def _attend_to_shared(
    query: torch.Tensor, kv_layer: torch.Tensor, shared: SharedPrefix, scale: float, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All rows' attention to the shared prefix alone: float32 [B, Hq, D] and the base-2 logarithms of what its weights
    sum up to, float32 [B, Hq]. None: there is no kernel for these sizes. Raises ValueError."""
    num_rows, num_heads = query.shape[:2]
    num_kv_heads = kv_layer.shape[2]
    found = _specialised(kv_layer)
    if found is None:
        return None
    config, boxes = found
    for name, tensor, shape in (
        ("block_table", shared.block_table, (1, shared.block_table.shape[-1])),
        ("length", shared.length, (1,)),
        ("row_lens", shared.row_lens, (num_rows,)),
        ("query_start", shared.query_start, (2,)),
    ):
        if tensor.dtype != torch.int32 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"shared {name} must be contiguous int32 {shape}: {tensor.dtype} {tuple(tensor.shape)}")
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    sums = torch.empty((num_rows, num_heads), dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    _launch_prefill(
        config, out, query, kv_layer, shared.block_table, shared.length, shared.query_start, scale, None, soft_cap,
        tiles=-(-num_rows * group // config.rows),
        boxes=boxes,
        sums=sums,
    )  # fmt: skip
    return out, sums


def paged_attention_prefill(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As the twin. No length is read on the host. Raises ValueError, TypeError, KernelError."""
    group, _ = _check(query, kv_layer, block_tables, context_lens)
    num_seqs = block_tables.shape[0]
    if query.dim() != 3 or query_start.dtype != torch.int32 or query_start.shape != (num_seqs + 1,):
        raise ValueError(f"query must be [T, Hq, D] and query_start int32 [{num_seqs + 1}]: {tuple(query_start.shape)}")
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    elif out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and like query: {tuple(out.shape)} {out.dtype}")
    if query.dtype == torch.float32:
        _simple(query, out, kv_layer, block_tables, context_lens, query_start, 0, scale, sliding_window, soft_cap)
        return out
    head_dim = query.shape[-1]
    limits = kernel_compile.limits(query.device)
    found = _specialised(kv_layer) if SPECIALISED_PREFILL and scale > 0 else None
    config, boxes = found or (prefill_config(head_dim, limits), None)
    # A sequence's last tile may be part empty: one more per sequence than the rows fill.
    tiles = query.shape[0] * group // config.rows + num_seqs
    _launch_prefill(
        config, out, query, kv_layer, block_tables, context_lens, query_start, scale, sliding_window, soft_cap,
        tiles=tiles, boxes=boxes,
    )  # fmt: skip
    return out


def _launch_prefill(
    config: HopperConfig | PrefillConfig,
    out: torch.Tensor,
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    *,
    tiles: int,
    boxes: TensorMap | None = None,
    sums: torch.Tensor | None = None,
) -> None:
    """Launches one prefill kernel; that of specialised warpgroups with `boxes`, and with `sums` as for a shared
    prefix."""
    head_dim, (num_kv_heads, block_size) = query.shape[-1], kv_layer.shape[2:4]
    defines = {"DTYPE": kernel_compile.CUDA_NAMES[query.dtype], "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}
    own: tuple[int | bytes, ...] = ()
    if boxes is not None:
        defines["SHARED_PREFIX"] = int(sums is not None)
        own = (_encoded(query.device, boxes), 0 if sums is None else sums.data_ptr())
    kernel = kernel_compile.kernel(config.file, config.kernel, query.device, **defines, **config.defines(soft_cap))
    kernel(
        (num_kv_heads, tiles, 1),
        config.threads,
        config.shared_bytes(head_dim),
        out.data_ptr(),
        query.data_ptr(),
        kv_layer.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        query_start.data_ptr(),
        block_tables.shape[0],
        query.shape[1] // num_kv_heads,
        block_tables.stride(0),
        kv_layer.stride(0),
        kv_layer.stride(1),
        query.stride(0),
        out.stride(0),
        scale,
        sliding_window or 0,
        soft_cap or 0.0,
        *own,
    )


@dataclass(frozen=True)
class PrefillConfig:
    """The compiled shape of one prefill kernel."""

    warps: int
    """Warps of a CTA."""
    row_tiles: int
    """Tiles of 16 (query token, query head) rows of one warp."""
    kv_tile: int
    """Tokens of keys and values read at a time."""
    ctas: int
    """CTAs resident on a multiprocessor."""
    wgmma: bool = False
    """Warpgroup products (Hopper) instead of those of single warps."""

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return self.warps * self.row_tiles * 16

    @property
    def kernel(self) -> str:
        """Its name."""
        return "paged_attention_prefill_wgmma" if self.wgmma else "paged_attention_prefill"

    @property
    def file(self) -> str:
        """Where it is, in csrc."""
        return self.kernel.removeprefix("paged_") + ".cu"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * 32

    def defines(self, soft_cap: float | None) -> dict[str, object]:
        """What it is compiled with, besides types and layout."""
        shape: dict[str, object] = {"WARPS": self.warps, "KV_TILE": self.kv_tile, "MIN_CTAS": self.ctas}
        return shape if self.wgmma else {**shape, "ROW_TILES": self.row_tiles}

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: queries, two stages of keys and of values, three of block ids, a small scan."""
        small = 3 * self.kv_tile * 4 + (self.warps + 4) * 4
        rows = self.rows + 4 * self.kv_tile
        return rows * 2 * head_dim + 1024 + small if self.wgmma else rows * (2 * head_dim + 16) + small


WGMMA_HEAD_DIMS = (64, 128)


@functools.cache
def prefill_config(head_dim: int, limits: kernel_compile.DeviceLimits) -> PrefillConfig:
    """Raises ValueError."""
    if limits.wgmma and head_dim in WGMMA_HEAD_DIMS:
        return PrefillConfig(warps=12, row_tiles=1, kv_tile=64, ctas=1, wgmma=True)
    # 32 rows a warp halve the reads of keys and values from shared memory; O of 256 elements leaves registers for 16.
    # Scores of 64 tokens fit beside O without spills only for 64 elements.
    row_tiles = 2 if head_dim <= 128 else 1
    for kv_tile in (64, 32, 16) if head_dim <= 64 else (32, 16):
        config = PrefillConfig(warps=4, row_tiles=row_tiles, kv_tile=kv_tile, ctas=2)
        if config.shared_bytes(head_dim) <= limits.shared_bytes:
            return config
    raise ValueError(f"head_dim {head_dim} needs more shared memory than this GPU has; use dtype float32")


@dataclass(frozen=True)
class HopperConfig:
    """The compiled shape of one prefill kernel of specialised warpgroups."""

    file = "attention_prefill_hopper.cu"
    kernel = "paged_attention_prefill_hopper"

    kv_tile: int
    """Tokens of keys or of values in a slot of the ring."""
    stages: int
    """Slots of the ring."""
    consumers: int = 2
    """Warpgroups that compute, 64 rows each; one more copies."""
    ping_pong: bool = True
    """Whether two consumers take turns at issuing products."""
    producer_registers: int = 56
    """Of a thread of the warpgroup that copies."""
    consumer_registers: int = 224
    """Of a thread of those that compute."""

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return self.consumers * 64

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return (self.consumers + 1) * 128

    def defines(self, soft_cap: float | None) -> dict[str, object]:
        """What the kernel is compiled with, beside its types."""
        return {
            "CONSUMERS": self.consumers,
            "KV_TILE": self.kv_tile,
            "STAGES": self.stages,
            "PING_PONG": int(self.ping_pong),
            "SOFT_CAP": int(bool(soft_cap)),
            "PRODUCER_REGISTERS": self.producer_registers,
            "CONSUMER_REGISTERS": self.consumer_registers,
        }

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: queries and ring, at most 1023 bytes to align them, barriers, a small scan."""
        tiles = 2 * head_dim * (self.rows + self.stages * self.kv_tile)
        return 1024 + tiles + self.stages * 16 + (4 * self.consumers + 8) * 4


SPECIALISED_PREFILL = True
"""Whether prefill takes the kernel of specialised warpgroups where there is one; tests and benchmarks compare both."""


@functools.cache
def hopper_config(head_dim: int, block_size: int, limits: kernel_compile.DeviceLimits) -> HopperConfig | None:
    """None where there is no wgmma, or no kernel of it for these sizes."""
    if not limits.wgmma or block_size < 16 or head_dim not in (64, 128, 256):
        return None
    # O of 256 elements leaves registers for scores of 64 tokens.
    kv_tile = 128 if head_dim <= 128 else 64
    config = HopperConfig(kv_tile=kv_tile, stages=4 if head_dim == 256 else 6)
    return config if config.shared_bytes(head_dim) <= limits.shared_bytes else None


def _simple(
    query: torch.Tensor,
    out: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor | None,
    query_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """Any dtype, slowly: for float32 models and as a second opinion in tests."""
    num_heads, head_dim = query.shape[-2:]
    kernel = kernel_compile.kernel(
        "attention_simple.cu",
        "paged_attention_simple",
        query.device,
        DTYPE=kernel_compile.CUDA_NAMES[query.dtype],
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_layer.shape[3],
    )
    tokens = query.numel() // (num_heads * head_dim)
    for first in range(0, tokens, 65535) if query_start is None and query_len == 1 else (0,):
        count = min(tokens - first, 65535)
        kernel(
            (num_heads, count, 1),
            128,
            0,
            out.data_ptr() + first * out.stride(-3) * out.element_size(),
            query.data_ptr() + first * query.stride(-3) * query.element_size(),
            kv_layer.data_ptr(),
            block_tables.data_ptr() + first * block_tables.stride(0) * 4,
            context_lens.data_ptr() + first * 4,
            0 if query_start is None else query_start.data_ptr(),
            block_tables.shape[0],
            query_len,
            num_heads // kv_layer.shape[2],
            block_tables.stride(0),
            kv_layer.stride(0),
            kv_layer.stride(1),
            query.stride(-3),
            out.stride(-3),
            scale,
            sliding_window or 0,
            soft_cap or 0.0,
        )
