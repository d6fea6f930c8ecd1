"""What the sampler keeps per slot: parameters, the key of the random draws, and which tokens have occurred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from worker.step import Fork, NewSequence, Sampling
from worker.upload import Placed, Upload

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0 (public API)."""
NO_LOGPROBS = -1

SEED, INDEX, TOP_K = 0, 1, 2
"""Rows of `SamplingState.numbers`."""
TEMPERATURE, TOP_P, MIN_P = 0, 1, 2
"""Rows of `SamplingState.shares`."""

Slots = npt.NDArray[np.int64]


class SamplingState:
    """Sampling parameters of `max_slots` rows, and of one more that pads: it is greedy.

    Numbers that kernels read are tensors on the device, indexed by slot. What decides which kernels run (is any row
    random, penalised, biased?) is kept on the host, so that asking costs no synchronisation.
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.max_slots = max_slots
        self.vocab_size = vocab_size
        self.device = device
        self.numbers = torch.zeros((3, max_slots + 1), dtype=torch.int64, device=device)
        """By SEED: the bits of the unsigned seed; by INDEX: the sequence's index in its request; by TOP_K."""
        self.shares = torch.zeros((3, max_slots + 1), dtype=torch.float32, device=device)
        """By TEMPERATURE, 0 for greedy rows; by TOP_P; by MIN_P."""
        self.penalties = torch.ones((3, max_slots + 1), dtype=torch.float32, device=device)
        """Repetition, presence, frequency."""
        self.random = np.zeros(max_slots, dtype=np.bool_)
        self.penalised = np.zeros(max_slots, dtype=np.bool_)
        self.biased = np.zeros(max_slots, dtype=np.bool_)
        self.min_tokens = np.zeros(max_slots, dtype=np.int64)
        self.logprobs = np.full(max_slots, NO_LOGPROBS, dtype=np.int64)
        self.bias: dict[int, tuple[Slots, npt.NDArray[np.float32]]] = {}
        """Token ids and biases of the rows with a logit bias."""
        self.stop_ids: dict[int, Slots] = {}
        """Token ids that rows with min_tokens must not sample yet."""
        self.prompt_seen: torch.Tensor | None = None
        """bool [max_slots + 1, vocab]: token is in the prompt. Allocated when the first row needs it, like the next."""
        self.output_counts: torch.Tensor | None = None
        """int32 [max_slots + 1, vocab]: occurrences in the output. Only rows of `penalised` are kept up to date."""

    def fill(self, sequences: Sequence[NewSequence], upload: Upload) -> None:
        """Sets the rows of new sequences, whole."""
        if not sequences:
            return
        count = len(sequences)
        samplings = [new.sampling for new in sequences]
        numbers = [(_signed(s.seed), new.index, s.top_k) for s, new in zip(samplings, sequences, strict=True)]
        shares = [(_temperature(s), s.top_p, s.min_p) for s in samplings]
        penalties = [(s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for s in samplings]
        slots = upload.put([new.slot for new in sequences])
        for table, rows, dtype in (
            (self.numbers, numbers, np.int64),
            (self.shares, shares, np.float32),
            (self.penalties, penalties, np.float32),
        ):
            _set_columns(table, slots, upload.put(np.array(rows, dtype=dtype).T, dtype), count, upload)
        for new in sequences:
            slot, sampling = new.slot, new.sampling
            self.random[slot] = sampling.temperature >= GREEDY_BELOW
            self.penalised[slot] = _is_penalised(sampling)
            self.biased[slot] = bool(sampling.logit_bias)
            self.min_tokens[slot] = new.min_tokens if new.stop_token_ids else 0
            self.logprobs[slot] = NO_LOGPROBS if new.logprobs is None else new.logprobs
            if sampling.logit_bias:
                ids, values = zip(*sampling.logit_bias, strict=True)
                self.bias[slot] = (np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32))
            if self.min_tokens[slot]:
                self.stop_ids[slot] = np.unique(np.array(new.stop_token_ids, dtype=np.int64))
            if self.penalised[slot]:
                self._count(new, upload)

    def fork(self, forks: Sequence[Fork], sources: Placed, targets: Placed, upload: Upload) -> None:
        """Copies rows of parents; sources and targets are the forks' parents and slots. Each gets its own index."""
        self.copy([fork.parent_slot for fork in forks], [fork.slot for fork in forks], sources, targets, upload)
        indices = upload.put([fork.index for fork in forks])
        upload.then(lambda: self.numbers[INDEX].index_copy_(0, targets.tensor, indices.tensor))

    def copy(
        self, parents: Sequence[int], slots: Sequence[int], sources: Placed, targets: Placed, upload: Upload
    ) -> None:
        """Makes rows copies of their parents, which are all read before; sources and targets are the same, placed."""
        parents, slots = list(parents), list(slots)
        for array in (self.random, self.penalised, self.biased, self.min_tokens, self.logprobs):
            array[slots] = array[parents]
        for parent, slot in zip(parents, slots, strict=True):
            if parent in self.bias:
                self.bias[slot] = self.bias[parent]
            if parent in self.stop_ids:
                self.stop_ids[slot] = self.stop_ids[parent]
        counted = [self.prompt_seen, self.output_counts] if self.penalised[slots].any() else []

        def copy_rows() -> None:
            source, target = sources.tensor, targets.tensor
            for table in (self.numbers, self.shares, self.penalties):
                table.index_copy_(1, target, table.index_select(1, source))
            for rows in counted:
                assert rows is not None
                rows.index_copy_(0, target, rows.index_select(0, source))

        upload.then(copy_rows)

    def _count(self, new: NewSequence, upload: Upload) -> None:
        """Fills the occurrence rows of a penalised sequence."""
        if self.prompt_seen is None or self.output_counts is None:
            shape = (self.max_slots + 1, self.vocab_size)
            self.prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        seen, counts = self.prompt_seen[new.slot], self.output_counts[new.slot]
        prompt = upload.put(np.unique(np.array(new.token_ids[: new.prompt_tokens], dtype=np.int64)))
        ids, numbers = np.unique(np.array(new.token_ids[new.prompt_tokens :], dtype=np.int64), return_counts=True)
        output_ids, output_counts = upload.put(ids), upload.put(numbers, np.int32)

        def count() -> None:
            seen.zero_()
            counts.zero_()
            seen.index_fill_(0, prompt.tensor, True)
            counts.index_copy_(0, output_ids.tensor, output_counts.tensor)

        upload.then(count)


def _set_columns(table: torch.Tensor, slots: Placed, values: Placed, count: int, upload: Upload) -> None:
    upload.then(lambda: table.index_copy_(1, slots.tensor, values.tensor.view(-1, count)))


def _temperature(sampling: Sampling) -> float:
    return sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0


def _is_penalised(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def _signed(seed: int) -> int:
    """The 64 bits of an unsigned number, read as signed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
