"""What the sampler keeps per slot: parameters, the key of the random draws, and which tokens have occurred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from worker.step import NewSequence, Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0 (public API)."""
NO_LOGPROBS = -1

Slots = npt.NDArray[np.int64]


class SamplingState:
    """Sampling parameters of `max_slots` rows.

    Numbers that kernels read are tensors on the device, indexed by slot. What decides which kernels run (is any row
    random, penalised, biased?) is kept on the host, so that asking costs no synchronisation.
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.max_slots = max_slots
        self.vocab_size = vocab_size
        self.device = device
        self.temperature = torch.ones(max_slots, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self.top_p = torch.ones(max_slots, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(max_slots, dtype=torch.float32, device=device)
        self.repetition = torch.ones(max_slots, dtype=torch.float32, device=device)
        self.presence = torch.zeros(max_slots, dtype=torch.float32, device=device)
        self.frequency = torch.zeros(max_slots, dtype=torch.float32, device=device)
        self.seed = torch.zeros(max_slots, dtype=torch.int64, device=device)
        """The bits of the unsigned seed."""
        self.index = torch.zeros(max_slots, dtype=torch.int64, device=device)
        """The sequence's index in its request."""
        self.random = np.zeros(max_slots, dtype=np.bool_)
        self.penalised = np.zeros(max_slots, dtype=np.bool_)
        self.biased = np.zeros(max_slots, dtype=np.bool_)
        self.min_tokens = np.zeros(max_slots, dtype=np.int64)
        self.logprobs = np.full(max_slots, NO_LOGPROBS, dtype=np.int64)
        self.bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Token ids int64 and biases float32 of the rows with a logit bias."""
        self.stop_ids: dict[int, torch.Tensor] = {}
        """Token ids int64 that rows with min_tokens must not sample yet."""
        self.prompt_seen: torch.Tensor | None = None
        """bool [max_slots, vocab]: token is in the prompt. Allocated when the first row needs it, like the next."""
        self.output_counts: torch.Tensor | None = None
        """int32 [max_slots, vocab]: occurrences in the output. Only rows of `penalised` are kept up to date."""

    def fill(self, sequences: Sequence[NewSequence]) -> None:
        """Sets the rows of new sequences, whole."""
        if not sequences:
            return
        slots = torch.tensor([new.slot for new in sequences], device=self.device)
        samplings = [new.sampling for new in sequences]
        self._put(self.temperature, slots, [max(s.temperature, GREEDY_BELOW) for s in samplings])
        self._put(self.top_k, slots, [s.top_k for s in samplings])
        self._put(self.top_p, slots, [s.top_p for s in samplings])
        self._put(self.min_p, slots, [s.min_p for s in samplings])
        self._put(self.repetition, slots, [s.repetition_penalty for s in samplings])
        self._put(self.presence, slots, [s.presence_penalty for s in samplings])
        self._put(self.frequency, slots, [s.frequency_penalty for s in samplings])
        self._put(self.seed, slots, [_signed(s.seed) for s in samplings])
        self._put(self.index, slots, [new.index for new in sequences])
        for new in sequences:
            slot, sampling = new.slot, new.sampling
            self.random[slot] = sampling.temperature >= GREEDY_BELOW
            self.penalised[slot] = _is_penalised(sampling)
            self.biased[slot] = bool(sampling.logit_bias)
            self.min_tokens[slot] = new.min_tokens if new.stop_token_ids else 0
            self.logprobs[slot] = NO_LOGPROBS if new.logprobs is None else new.logprobs
            self.bias.pop(slot, None)
            self.stop_ids.pop(slot, None)
            if sampling.logit_bias:
                ids, values = zip(*sampling.logit_bias, strict=True)
                self.bias[slot] = (
                    torch.tensor(ids, dtype=torch.int64, device=self.device),
                    torch.tensor(values, dtype=torch.float32, device=self.device),
                )
            if self.min_tokens[slot]:
                self.stop_ids[slot] = torch.tensor(new.stop_token_ids, dtype=torch.int64, device=self.device)
            if self.penalised[slot]:
                self._count(new)

    def fork(self, parents: Sequence[int], slots: Sequence[int], indices: Sequence[int]) -> None:
        """Copies the rows `parents` to `slots`, which get their own sequence indices."""
        if not slots:
            return
        source = torch.tensor(parents, device=self.device)
        target = torch.tensor(slots, device=self.device)
        for tensor in (
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition,
            self.presence,
            self.frequency,
            self.seed,
        ):
            tensor[target] = tensor[source]
        self._put(self.index, target, indices)
        for array in (self.random, self.penalised, self.biased, self.min_tokens, self.logprobs):
            array[list(slots)] = array[list(parents)]
        for parent, slot in zip(parents, slots, strict=True):
            self.bias.pop(slot, None)
            self.stop_ids.pop(slot, None)
            if parent in self.bias:
                self.bias[slot] = self.bias[parent]
            if parent in self.stop_ids:
                self.stop_ids[slot] = self.stop_ids[parent]
        if self.prompt_seen is not None and self.output_counts is not None and self.penalised[list(slots)].any():
            self.prompt_seen[target] = self.prompt_seen[source]
            self.output_counts[target] = self.output_counts[source]

    def note_sampled(self, slots: Slots, token_ids: torch.Tensor) -> None:
        """Counts the tokens just sampled, int64 [R], in the rows that need it."""
        rows = np.flatnonzero(self.penalised[slots])
        if rows.size and self.output_counts is not None:
            self.output_counts[self.tensor(slots[rows]), token_ids[self.tensor(rows)]] += 1

    def tensor(self, array: Slots) -> torch.Tensor:
        """A host array of indices on the device."""
        return torch.from_numpy(array).to(self.device)

    def _count(self, new: NewSequence) -> None:
        """Fills the occurrence rows of a penalised sequence."""
        if self.prompt_seen is None or self.output_counts is None:
            shape = (self.max_slots, self.vocab_size)
            self.prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        tokens = torch.tensor(new.token_ids, dtype=torch.int64, device=self.device)
        self.prompt_seen[new.slot] = False
        self.prompt_seen[new.slot, tokens[: new.prompt_tokens]] = True
        counts = torch.bincount(tokens[new.prompt_tokens :], minlength=self.vocab_size)
        self.output_counts[new.slot] = counts.to(torch.int32)

    def _put(self, tensor: torch.Tensor, slots: torch.Tensor, values: Sequence[float]) -> None:
        tensor[slots] = torch.tensor(values, dtype=tensor.dtype, device=self.device)


def _is_penalised(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def _signed(seed: int) -> int:
    """The 64 bits of an unsigned number, read as signed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
