"""The CUDA kernels under the names of their torch twins, `kernels.reference`; a `kernels.backend.PagedKernels`.

Differences are said at each: `add_rms_norm` writes over its residual, `swap_blocks` does not wait for its copies.
"""

from kernels.activation import gather_rows, silu_and_mul
from kernels.attention import paged_attention_decode, paged_attention_prefill
from kernels.cache import copy_blocks, rope, rope_and_cache, write_kv
from kernels.linear_wgmma import linear, linear_gated, linear_parts, linear_rotated, takes_rotation, takes_tokens
from kernels.norm import add_rms_norm, rms_norm
from kernels.sampling import (
    add_logit_bias,
    apply_penalties,
    argmax,
    mask_tokens,
    sample,
    token_logprobs,
)
from kernels.step import copy_words, decode_inputs, move_on
from kernels.swap import swap_blocks

__all__ = [
    "add_logit_bias",
    "add_rms_norm",
    "apply_penalties",
    "argmax",
    "copy_blocks",
    "copy_words",
    "decode_inputs",
    "gather_rows",
    "linear",
    "linear_gated",
    "linear_parts",
    "linear_rotated",
    "mask_tokens",
    "move_on",
    "paged_attention_decode",
    "paged_attention_prefill",
    "rms_norm",
    "rope",
    "rope_and_cache",
    "sample",
    "silu_and_mul",
    "swap_blocks",
    "takes_rotation",
    "takes_tokens",
    "token_logprobs",
    "write_kv",
]
