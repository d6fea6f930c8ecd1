"""Torch twins of every kernel: same names, same signatures, any device. They define what the kernels must compute.

All twins accumulate in float32 or wider and never let the content of an unused cache slot reach a result, not even as
0 * NaN. Ids of blocks that lie behind a sequence's last block in its block table row are never dereferenced.
"""

from kernels.reference.attention import Settled, SharedPrefix, paged_attention_decode, paged_attention_prefill
from kernels.reference.cache import copy_blocks, rope_and_cache, swap_blocks, write_kv
from kernels.reference.layers import add_rms_norm, rms_norm, rope, silu_and_mul
from kernels.reference.linear import (
    Product,
    linear,
    linear_gated,
    linear_parts,
    linear_rotated,
    takes_rotation,
    takes_tokens,
)
from kernels.reference.philox import philox4x32
from kernels.reference.sampling import (
    TokenLogprobRows,
    add_logit_bias,
    apply_penalties,
    argmax,
    mask_tokens,
    sample,
    token_logprobs,
)
from kernels.reference.step import DecodeInputs, copy_words, decode_inputs, move_on

__all__ = [
    "DecodeInputs",
    "Product",
    "Settled",
    "SharedPrefix",
    "TokenLogprobRows",
    "add_logit_bias",
    "add_rms_norm",
    "apply_penalties",
    "argmax",
    "copy_blocks",
    "copy_words",
    "decode_inputs",
    "linear",
    "linear_gated",
    "linear_parts",
    "linear_rotated",
    "mask_tokens",
    "move_on",
    "paged_attention_decode",
    "paged_attention_prefill",
    "philox4x32",
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
