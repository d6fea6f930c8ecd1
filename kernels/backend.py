"""Which implementation of the operations a device gets.

CPU tensors get the torch twins of `kernels.reference`, CUDA tensors the kernels of `csrc/`:

    operation                                  CUDA kernel for                                       else
    write_kv                                   every size                                            -
    paged_attention_decode, .._prefill         bfloat16, float16: head sizes in steps of 16 to 256;  torch twin, eager
                                               float32: every head size to 256, simple kernel
    copy_blocks, swap_blocks                   blocks of a multiple of 16 bytes                      torch twin
    argmax, sample                             logits of every size                                  -
    token_logprobs                             up to 2048 likeliest tokens                           -
    penalties, bias                            float32 logits                                        -

The operations between matrix products are chosen in `worker.models.ops`, by the same rule.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kernels import attention, cache, linear_wgmma, reference, sampling, step, swap
from kernels import compile as kernel_compile
from kernels.kv_layout import KvLayout
from kernels.reference import DecodeInputs, Settled, SharedPrefix, TokenLogprobRows


class PagedKernels(Protocol):
    """The operations on KV blocks. `kernels.reference` documents each: shapes, dtypes and meaning are the same."""

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Stores keys and values of T tokens in their cache slots."""

    def rope_and_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_layer: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        settled: bool = False,
    ) -> torch.Tensor:
        """Rotates queries and keys, stores keys and values, returns the queries."""
        ...

    def takes_rotation(self, num_tokens: int, qkv: torch.Tensor, cos_sin: torch.Tensor, kv_layer: torch.Tensor) -> bool:
        """Whether `linear_rotated` takes num_tokens rows, and is better than a product and `rope_and_cache`."""
        ...

    def linear_rotated(
        self,
        x: torch.Tensor,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_layer: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        settled: bool = False,
    ) -> torch.Tensor:
        """A product, then `rope_and_cache`."""
        ...

    def paged_attention_decode(
        self,
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
    ) -> torch.Tensor:
        """Attention of one new token per sequence."""
        ...

    def paged_attention_prefill(
        self,
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
        """Causal attention of chunks."""
        ...

    def copy_blocks(self, pool: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copies blocks within a pool."""

    def swap_blocks(
        self, source: torch.Tensor, destination: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor
    ) -> None:
        """Copies blocks between two pools."""


class StepKernels(Protocol):
    """What a decode step begins and ends with. `kernels.reference` documents both."""

    def decode_inputs(
        self, slots: torch.Tensor, tokens: torch.Tensor, block_tables: torch.Tensor, columns: int, block_size: int
    ) -> DecodeInputs:
        """Inputs of the rows in these slots."""
        ...

    def move_on(
        self, tokens: torch.Tensor, slots: torch.Tensor, known: torch.Tensor, encoded: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Notes what rows have sampled."""


class SamplingKernels(Protocol):
    """The operations on logits. `kernels.reference` documents each."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row, encoded."""
        ...

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seeds: torch.Tensor,
        indices: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Draws a token per row; the likeliest where the temperature is 0. Encoded."""
        ...

    def apply_penalties(
        self,
        logits: torch.Tensor,
        prompt_seen: torch.Tensor,
        output_counts: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> torch.Tensor:
        """Lowers the logits of tokens that have occurred."""
        ...

    def add_logit_bias(
        self, logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor
    ) -> None:
        """Adds a bias to single logits."""

    def mask_tokens(self, logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Makes single tokens impossible."""

    def token_logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobRows:
        """Log-probabilities of chosen and of likeliest tokens."""
        ...


class Kernels(PagedKernels, SamplingKernels, StepKernels, Protocol):
    """All of them."""


class CudaKernels:
    """The kernels of `csrc/`, and torch twins where the layout or dtype has none."""

    def __init__(self, layout: KvLayout | None = None) -> None:
        self.write_kv = cache.write_kv
        self.rope_and_cache = cache.rope_and_cache
        self.takes_rotation = linear_wgmma.takes_rotation
        self.linear_rotated = linear_wgmma.linear_rotated
        self.decode_inputs = step.decode_inputs
        self.move_on = step.move_on
        self.argmax = sampling.argmax
        self.sample = sampling.sample
        self.apply_penalties = sampling.apply_penalties
        self.add_logit_bias = sampling.add_logit_bias
        self.mask_tokens = sampling.mask_tokens
        self.token_logprobs = sampling.token_logprobs
        self.twins = twins_for(layout) if layout is not None else {}
        """Operations that run as torch twins, and why; for the log."""
        attends = "attention" not in self.twins
        self.paged_attention_decode = attention.paged_attention_decode if attends else reference.paged_attention_decode
        self.paged_attention_prefill = (
            attention.paged_attention_prefill if attends else reference.paged_attention_prefill
        )
        copies = "block copies" not in self.twins
        self.copy_blocks = cache.copy_blocks if copies else reference.copy_blocks
        self.swap_blocks = swap.swap_blocks


def twins_for(layout: KvLayout) -> dict[str, str]:
    """Operations that have no CUDA kernel for this layout, and why."""
    found = {}
    head_dim, dtype = layout.head_dim, layout.dtype
    if head_dim > 256 or (dtype != torch.float32 and head_dim % 16):
        found["attention"] = f"heads of {head_dim} elements of {dtype}; kernels take steps of 16 to 256"
    if layout.block_bytes % 16:
        found["block copies"] = f"blocks of {layout.block_bytes} bytes are no multiple of 16"
    return found


def shares_prefixes(kernels: PagedKernels, layout: KvLayout, device: torch.device) -> bool:
    """Whether decode attention reads what rows have in common once for all of them."""
    ours = kernels.paged_attention_decode is attention.paged_attention_decode
    return ours and attention.shares_prefixes(layout.head_dim, layout.block_size, layout.dtype, device)


def check_device(device: torch.device) -> None:
    """Raises KernelError, one line with the mend, if the kernels cannot run: CuPy, the GPU, NVRTC or the driver."""
    kernel_compile.architecture(torch.cuda.get_device_capability(device))
    kernel_compile.limits(device)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    # Compiles, loads and launches nothing: what is wrong with NVRTC or the driver shows now, not in the first step.
    cache.copy_blocks(torch.empty(1, 16, dtype=torch.uint8, device=device), ids, ids)


def kernels_for(device: torch.device, layout: KvLayout | None = None) -> Kernels:
    """The operations for tensors on `device`, for a pool of `layout`."""
    return CudaKernels(layout) if device.type == "cuda" else reference
