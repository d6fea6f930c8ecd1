"""Choosing the next token from logits, row by row: nothing here lets one row's result depend on another row.

Likelier means: of larger logit; of equal logits, of lower id. This total order decides the greedy token, who is among
the top k, where the nucleus ends, ranks and the order of top log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

_CANDIDATES = 1024
"""Tokens per row sorted first. A row whose kept set is larger is sorted whole: slower, the same result."""


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
    """The likeliest token of each row: float32 [R, V] to int64 [R]; of equal logits the lowest id."""
    return logits.argmax(dim=-1)


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
    draws: torch.Tensor,
) -> torch.Tensor:
    """Chooses one token per row: float32 logits [R, V] to int64 [R].

    temperature float32 [R]; rows of temperature 0 take their likeliest token, others draw. top_k int64 [R], 0 = all;
    top_p float32 [R] in (0, 1]; min_p float32 [R] in [0, 1]; draws float64 [R] in (0, 1). Probabilities are
    softmax(logits / temperature). Kept are, one after another: the top_k likeliest; of these, renormalised, the
    shortest likeliest-first prefix whose sum reaches top_p (Holtzman et al. 2020); of these, those at least min_p times
    as probable as the likeliest. The token is the first, by id, at which the cumulative kept probability exceeds draw
    times its total. Computed in float64.
    """
    drawing = (temperature > 0.0).nonzero().squeeze(1)
    if drawing.numel() < temperature.numel():
        token_ids = argmax(logits)
        if drawing.numel():
            settings = (column[drawing] for column in (temperature, top_k, top_p, min_p, draws))
            token_ids[drawing] = sample(logits[drawing], *settings)
        return token_ids
    probabilities = torch.softmax(logits.double() / temperature.double().unsqueeze(1), dim=-1)
    vocab_size = logits.shape[1]
    restricted = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)
    rows = restricted.nonzero().squeeze(1)
    if rows.numel():
        kept = _keep_likeliest(logits[rows], probabilities[rows], top_k[rows], top_p[rows], min_p[rows])
        probabilities[rows] = probabilities[rows].masked_fill(~kept, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    totals = cumulative[:, -1:].contiguous()
    token_ids = torch.searchsorted(cumulative, draws.unsqueeze(1) * totals, right=True).squeeze(1)
    # Rounding can put draw * total at the total itself: take the last token that has any probability.
    last = torch.searchsorted(cumulative, totals, right=False).squeeze(1)
    return token_ids.minimum(last).clamp_(max=vocab_size - 1)  # an id always, even of parameters that are not finite


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

    logits is float32 [R, V], raw: before penalties, bias and temperature; token_ids int64 [R].
    """
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
