"""What a step costs, learned from the steps themselves, as two lines:

    without chunks   fixed + decode tokens * per decode token
    with chunks      fixed + decode tokens * per decode token + chunk tokens * per chunk token

The last coefficient is the marginal cost of prefill: what a chunk adds to a step that runs anyway. A rate that divides
whole steps by their tokens would put decode time, weights and launches on the prompt's bill. The two fixed parts differ
where a step with a chunk is launched in another way: kernel by kernel and not as a graph, for instance.

Fitted by least squares of the relative error, so that one slow step (a first launch, a stall) weighs little. The two
are forgotten separately: hours of pure decode do not wear away what is known about prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.chunk_sizes import ChunkSizes
from scheduler.policy import ChunkStep

MEMORY = 0.98
"""How much of the past each observation of a kind leaves: about 50 steps."""
RIDGE = 1e-9
"""A pull towards what was known before, as a share of what the steps weigh: it decides only what no step tells."""
# Units in which it pulls. Where steps never vary, time counts as fixed before decode's, and as a chunk's before fixed.
DECODE_UNIT = 256.0
CHUNK_UNIT = 16.0
WEIGHT_UNIT = 32.0
"""Chunk tokens with which a step weighs as much as one without."""
NS_PER_MS = 1e6

LEAST_CHUNK = 64
"""Chunk tokens that a step may compute whatever it takes."""

Coefficients = tuple[float, float, float]


class StepTime:
    """Both lines. Times in nanoseconds."""

    __slots__ = ("_chunk_sizes", "_mixed", "_mixed_fit", "_plain", "_plain_fit", "_start")

    def __init__(self, prefill_tokens_per_second: float = 0.0, chunk_steps: Sequence[ChunkStep] = ()) -> None:
        """As the worker measured them at its start. `prefill_tokens_per_second`: 0: unknown. `chunk_steps`: sizes that
        it pads steps with chunks to."""
        self._chunk_sizes = ChunkSizes(chunk_steps)
        rate = prefill_tokens_per_second
        self._start = CHUNK_UNIT * 1e3 / rate if rate > 0 else 0.0  # milliseconds per unit of chunk tokens
        # Decaying sums of the products 11, 1d, 1c, dd, dc, cc, and of 1, d, c; each row divided by its time.
        self._plain = [0.0] * 9
        self._mixed = [0.0] * 9
        self._plain_fit: Coefficients | None = None  # None: to be computed
        self._mixed_fit: Coefficients | None = None

    def observe(self, decode_tokens: int, chunk_tokens: int, nanoseconds: int) -> None:
        """A step has taken that long. Nothing is learned from one without work or without a time."""
        if nanoseconds <= 0 or decode_tokens + chunk_tokens <= 0:
            return
        one = NS_PER_MS / nanoseconds
        d, c = decode_tokens / DECODE_UNIT * one, chunk_tokens / CHUNK_UNIT * one
        row = (one * one, one * d, one * c, d * d, d * c, c * c, one, d, c)
        if chunk_tokens:
            self._chunk_sizes.observe(decode_tokens, chunk_tokens, nanoseconds)
            # Weights hide the first tokens of a chunk on most machines: what counts is where many are computed.
            weight = chunk_tokens / WEIGHT_UNIT
            self._mixed = [MEMORY * old + weight * new for old, new in zip(self._mixed, row, strict=True)]
        else:
            self._plain = [MEMORY * old + new for old, new in zip(self._plain, row, strict=True)]
            self._plain_fit = None
        self._mixed_fit = None

    def ns(self, decode_tokens: int, chunk_tokens: int) -> float:
        """Predicted time of a step; 0 while nothing is known."""
        fixed, per_decode, per_chunk = self._with_chunks() if chunk_tokens else self._without_chunks()
        units = fixed + per_decode * decode_tokens / DECODE_UNIT + per_chunk * chunk_tokens / CHUNK_UNIT
        return max(0.0, units) * NS_PER_MS

    def first_chunk_ns(self, decode_tokens: int) -> float:
        """What the smallest chunk adds to a step, beyond its tokens."""
        with_chunks, without = self._with_chunks(), self._without_chunks()
        per_decode = (with_chunks[1] - without[1]) / DECODE_UNIT
        return max(0.0, with_chunks[0] - without[0] + per_decode * decode_tokens) * NS_PER_MS

    @property
    def prefill_tokens_per_second(self) -> float:
        """The marginal rate: how many tokens a second more of a step computes. 0: unknown."""
        per_chunk = self._with_chunks()[2]
        return CHUNK_UNIT * 1e3 / per_chunk if per_chunk > 0 else 0.0

    def chunk_budget(self, most: int, target_ns: int, decode_tokens: int) -> int:
        """Chunk tokens of a step that should take `target_ns` beside its decodes: at most `most`, and never none, so
        that prompts go on where decoding alone takes longer. Nobody decodes, or nothing is known: `most`.

        Where the smallest chunk is dear, cutting it further gives more dear steps and hardly shorter ones: as many
        tokens as cost that much again are always taken. Where steps are padded, their sizes decide."""
        if decode_tokens == 0:
            return most
        if (fitting := self._chunk_sizes.budget(target_ns, decode_tokens)) is not None:
            return min(most, fitting)
        fixed, per_decode, per_chunk = self._with_chunks()
        if per_chunk <= 0:
            return most
        left = target_ns / NS_PER_MS - fixed - per_decode * decode_tokens / DECODE_UNIT
        again = self.first_chunk_ns(decode_tokens) / NS_PER_MS
        return min(most, max(int(max(left, again) / per_chunk * CHUNK_UNIT), LEAST_CHUNK))

    def _without_chunks(self) -> Coefficients:
        """Milliseconds: fixed, per unit of decode tokens, 0. While none was seen, what the other line leaves: under a
        load that fills every step none ever is."""
        if self._plain[0] or not self._mixed[0]:
            return self._seen_without_chunks()
        fixed, per_decode, _ = self._with_chunks()
        return max(0.0, fixed), per_decode, 0.0

    def _seen_without_chunks(self) -> Coefficients:
        """The same of steps without chunks alone: zeros while none was seen."""
        if self._plain_fit is None:
            self._plain_fit = fit(self._plain, (0.0, 0.0, 0.0))
        return self._plain_fit

    def _with_chunks(self) -> Coefficients:
        """Milliseconds: fixed (perhaps negative: the line counts where chunks are large), per unit of decode tokens,
        per unit of chunk tokens. While few were seen, it is close to the other line."""
        if self._mixed_fit is None:
            fixed, per_decode, _ = self._seen_without_chunks()
            self._mixed_fit = fit(self._mixed, (fixed, per_decode, self._start))
        return self._mixed_fit


def fit(sums: list[float], before: Coefficients) -> Coefficients:
    """Solves the normal equations, pulled towards what was known before. A rate that comes out negative is left as it
    was before, and the others are fitted once more."""
    a11, a1d, a1c, add, adc, acc, y1, yd, yc = sums
    if not a11:
        return before
    ridge = RIDGE * a11
    a11, add, acc = a11 + ridge, add + ridge, acc + ridge
    y1, yd, yc = y1 + ridge * before[0], yd + ridge * before[1], yc + ridge * before[2]
    fixed, per_decode, per_chunk = solve(a11, a1d, a1c, add, adc, acc, y1, yd, yc)
    if per_decode < 0:
        per_decode = before[1]
        fixed, per_chunk = solve_two(a11, a1c, acc, y1 - a1d * per_decode, yc - adc * per_decode)
    if per_chunk < 0:  # noise of chunks too small to matter
        per_chunk = before[2]
        fixed, per_decode = solve_two(a11, a1d, add, y1 - a1c * per_chunk, yd - adc * per_chunk)
        per_decode = max(0.0, per_decode)
    return fixed, per_decode, per_chunk


def solve_two(a11: float, a12: float, a22: float, y1: float, y2: float) -> tuple[float, float]:
    """Cramer's rule for a symmetric, positive definite system of two."""
    determinant = a11 * a22 - a12 * a12
    return (a22 * y1 - a12 * y2) / determinant, (a11 * y2 - a12 * y1) / determinant


def solve(
    a11: float, a12: float, a13: float, a22: float, a23: float, a33: float, y1: float, y2: float, y3: float
) -> tuple[float, float, float]:
    """Cramer's rule for a symmetric, positive definite system of three."""
    c11, c12, c13 = a22 * a33 - a23 * a23, a13 * a23 - a12 * a33, a12 * a23 - a13 * a22
    c22, c23, c33 = a11 * a33 - a13 * a13, a12 * a13 - a11 * a23, a11 * a22 - a12 * a12
    determinant = a11 * c11 + a12 * c12 + a13 * c13
    return (
        (c11 * y1 + c12 * y2 + c13 * y3) / determinant,
        (c12 * y1 + c22 * y2 + c23 * y3) / determinant,
        (c13 * y1 + c23 * y2 + c33 * y3) / determinant,
    )
