"""Choosing the next token from logits, row by row: nothing here lets one row's result depend on another row.

Likelier means: of larger logit; of equal logits, of lower id. This total order decides the greedy token, who is among
the top k, where the nucleus ends, ranks and the order of top log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.reference.philox import token_uniforms, vocabulary_uniforms

_CANDIDATES = 1024
"""Tokens per row sorted first. A row whose kept set is larger is sorted whole: slower, the same result."""
_NOISE_CHUNK = 32_768
"""Tokens whose noise is computed at once, so that what lies between stays in the processor's cache."""


@dataclass(frozen=True)
class TokenLogprobRows:
    """Log-probabilities of R rows, of the raw distribution."""

    logprobs: torch.Tensor
    """float32 [R]: of the chosen token."""
    ranks: torch.Tensor
    """int64 [R]: of the chosen token, 1 = likeliest."""
    top_ids: torch.Tensor
    """int64 [R, N]: the N likeliest tokens, likeliest first."""
    top_logprobs: torch.Tensor
    """float32 [R, N]: theirs."""


def order_keys(logits: torch.Tensor) -> torch.Tensor:
    """int64 keys, all different within a row, that order tokens as "likelier" says: [R, V] to [R, V].

    A float's bits, its sign folded, order like the float; the inverted token id in the low half breaks ties.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    folded = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return (folded << 32) | (0xFFFFFFFF - ids)


def _ids_of(keys: torch.Tensor) -> torch.Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row: floating [R, V] to int64 [R]; of equal logits the lowest id.

    Encoded: the id of a row whose logits are not all finite has all its bits turned, which makes it negative.
    """
    return encode_finite(logits.argmax(dim=-1), logits)


def decode_ids(encoded: torch.Tensor) -> torch.Tensor:
    """The ids, int64 [R], within the vocabulary, of encoded ones: also of rows that are not finite."""
    return encoded ^ (encoded >> 63)


def encode_finite(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """int64 [R]: the ids, with all bits turned where a row of logits, floating [R, V], is not all finite."""
    lowest, highest = logits.aminmax(dim=-1)
    return torch.where(highest.float() - lowest.float() < float("inf"), token_ids, ~token_ids)


def apply_penalties(
    logits: torch.Tensor,
    prompt_seen: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Lowers the logits of tokens that have occurred; returns new float32 [R, V].

    prompt_seen is bool [R, V], output_counts int32 [R, V]; the three penalties float32 [R]. Tokens of prompt or output:
    positive logits are divided by repetition, the others multiplied (Keskar et al. 2019). Then, of output tokens only,
    presence is subtracted once and frequency per occurrence. 1, 0 and 0 change nothing.
    """
    in_output = output_counts > 0
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    penalised = torch.where(prompt_seen | in_output, repeated, logits)
    return penalised - frequency.unsqueeze(1) * output_counts - presence.unsqueeze(1) * in_output


def add_logit_bias(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, bias: torch.Tensor) -> None:
    """Adds bias[i] to logits[rows[i], token_ids[i]], in place; int64, int64 and float32 [K], no pair twice."""
    logits[rows, token_ids] += bias


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Makes the tokens impossible: logits[rows[i], token_ids[i]] = -inf, in place; int64 [K] each."""
    logits[rows, token_ids] = float("-inf")


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
    """Chooses one token per row: floating logits [R, V] to int64 [R], encoded as in `argmax`.

    temperature float32 [R]; rows of temperature 0 take their likeliest token, others draw. top_k int64 [R], 0 = all;
    top_p float32 [R] in (0, 1]; min_p float32 [R] in [0, 1]. Probabilities are softmax(logits / temperature). Kept are,
    one after another: the top_k likeliest; of these, renormalised, the shortest likeliest-first prefix whose sum
    reaches top_p (Holtzman et al. 2020); of these, those at least min_p times as probable as the likeliest.

    The token is the kept one of largest logit / temperature - log(-log(u)), of equal ones the lowest id ("Gumbel-max";
    Maddison et al. 2014), where u is the token's number by `philox.token_uniforms` of seeds, indices and
    positions, int64 [R] each. A change of the logits by e changes the token only if the two largest sums are within 2e
    of one another, however large the vocabulary. Computed in float64.
    """
    drawing = (temperature > 0.0).nonzero().squeeze(1)
    if drawing.numel() < temperature.numel():
        token_ids = argmax(logits)
        if drawing.numel():
            settings = (column[drawing] for column in (temperature, top_k, top_p, min_p, seeds, indices, positions))
            token_ids[drawing] = sample(logits[drawing], *settings)
        return token_ids
    given, logits = logits, logits.float()
    scores = logits.double() / temperature.double().unsqueeze(1)
    vocab_size = logits.shape[1]
    restricted = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)
    many = torch.ones_like(restricted)
    token_ids = torch.empty_like(top_k)
    rows = restricted.nonzero().squeeze(1)
    if rows.numel():
        probabilities = torch.softmax(scores[rows], dim=-1)
        kept = _keep_likeliest(logits[rows], probabilities, top_k[rows], top_p[rows], min_p[rows])
        scores[rows] = scores[rows].masked_fill(~kept, float("-inf"))
        # Four numbers for the price of one to those who want all, one at a time to those who name their tokens.
        is_few = kept.sum(dim=-1) * 4 < vocab_size
        few = rows[is_few]
        many[few] = False
        if few.numel():
            token_ids[few] = _draw_of_few(scores[few], kept[is_few], seeds[few], indices[few], positions[few])
    rows = many.nonzero().squeeze(1)
    if rows.numel():
        token_ids[rows] = _draw_of_many(scores[rows], seeds[rows], indices[rows], positions[rows])
    return encode_finite(token_ids, given)


def _gumbel(uniforms: torch.Tensor) -> torch.Tensor:
    """-log(-log(u)), in place."""
    return uniforms.log_().neg_().log_().neg_()


def _draw_of_many(
    scores: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The token of largest score after noise, int64 [R]; float64 scores [R, V] are changed, -inf is never drawn."""
    rows, vocab_size = scores.shape
    width = max(_NOISE_CHUNK // rows // 4 * 4, 4)
    for begin in range(0, vocab_size, width):
        end = min(begin + width, vocab_size)
        scores[:, begin:end] += _gumbel(vocabulary_uniforms(seeds, indices, positions, begin, end))
    return scores.argmax(dim=-1)


def _draw_of_few(
    scores: torch.Tensor,
    kept: torch.Tensor,
    seeds: torch.Tensor,
    indices: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """As _draw_of_many, with noise for the tokens of bool `kept` [R, V] alone."""
    rows, ids = kept.nonzero().unbind(-1)
    noisy = scores[rows, ids]
    for begin in range(0, ids.numel(), _NOISE_CHUNK // 4):
        some = slice(begin, begin + _NOISE_CHUNK // 4)
        row = rows[some]
        noisy[some] += _gumbel(token_uniforms(seeds[row], indices[row], positions[row], ids[some]))
    best = scores.new_full((scores.shape[0],), float("-inf")).scatter_reduce_(0, rows, noisy, "amax")
    winners = noisy == best[rows]
    # An id always, even where a sum is not finite: then nothing equals the largest.
    lowest = torch.full_like(seeds, scores.shape[1] - 1)
    return lowest.scatter_reduce_(0, rows[winners], ids[winners], "amin")


def _keep_likeliest(
    logits: torch.Tensor, probabilities: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """bool [R, V]: the tokens that top_k, top_p and min_p keep."""
    keys = order_keys(logits)
    vocab_size = logits.shape[1]
    limits = torch.where(top_k > 0, top_k, vocab_size).clamp_(max=vocab_size)
    thresholds = torch.empty_like(limits)
    pending = torch.arange(limits.numel(), device=logits.device)
    for width in (min(_CANDIDATES, vocab_size), vocab_size):
        top_keys = keys[pending].topk(width, dim=-1).values
        likeliest = probabilities[pending].gather(1, _ids_of(top_keys))
        lengths = _kept_length(likeliest, limits[pending], top_p[pending], min_p[pending])
        thresholds[pending] = top_keys.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
        # Settled: the top k are all sorted, or the kept tokens of an unlimited row end inside the sorted ones.
        unlimited = limits[pending] == vocab_size
        pending = pending[(limits[pending] > width) & ~(unlimited & (lengths < width))]
        if not pending.numel():
            break
    return keys >= thresholds.unsqueeze(1)


def _kept_length(
    likeliest: torch.Tensor, limits: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """How many of each row's W likeliest tokens are kept, int64 [R], at least 1; W if more may be.

    likeliest is float64 [R, W], probabilities in descending order; limits int64 [R] is top_k.
    """
    width = likeliest.shape[1]
    ranks = torch.arange(width, device=likeliest.device)
    inside = ranks < limits.unsqueeze(1)
    before = functional.pad(likeliest.cumsum(dim=-1)[:, :-1], (1, 0))
    # An unlimited row's mass is 1. One with top_k beyond the width is not settled by this pass.
    mass = torch.where(limits <= width, likeliest.masked_fill(~inside, 0.0).sum(dim=-1), 1.0)
    inside &= (before < (top_p.double() * mass).unsqueeze(1)) | (top_p >= 1.0).unsqueeze(1)
    inside &= likeliest >= min_p.double().unsqueeze(1) * likeliest[:, :1]
    return inside.sum(dim=-1).clamp_(min=1)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobRows:
    """Log-probability and rank of a chosen token per row, and the `num_top` likeliest with theirs.

    logits is floating [R, V], raw: before penalties, bias and temperature; token_ids int64 [R].
    """
    logits = logits.float()
    keys = order_keys(logits)
    chosen = keys.gather(1, token_ids.unsqueeze(1))
    normaliser = torch.logsumexp(logits.double(), dim=-1, keepdim=True)
    top_ids = _ids_of(keys.topk(min(num_top, logits.shape[1]), dim=-1).values)
    return TokenLogprobRows(
        logprobs=(logits.gather(1, token_ids.unsqueeze(1)) - normaliser).squeeze(1).float(),
        ranks=(keys >= chosen).sum(dim=-1),
        top_ids=top_ids,
        top_logprobs=(logits.gather(1, top_ids) - normaliser).float(),
    )
