"""The persistent batch: one row per slot, changed by the deltas of step plans.

A row's tokens, half-open ranges:

    0 ........ computed ........ known            known == computed + 1 in the decode set
    |  have KV  |  given, or the   |              (the one token sampled last)
    |           |  last sampled    |

Lengths live on the host, where they follow from the plans alone; values (block ids, last tokens) live on the device,
where the next step reads them without the host having seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.kv_layout import KvLayout
from worker.sampling_state import SamplingState, Slots
from worker.step import Fork, NewSequence, PlanError

NO_PROMPT_LOGPROBS = -1

_NO_SLOTS: Slots = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Chunk:
    """Part of a row's known tokens that this step computes: positions start..start + num_tokens."""

    slot: int
    start: int
    num_tokens: int
    first_row: int
    """Where the chunk begins in the step's flat row of tokens."""
    samples: bool
    """It reaches the end of the known tokens."""


@dataclass(frozen=True)
class StepInputs:
    """What one forward pass computes: T tokens, the decode rows first, then the chunks."""

    token_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T]."""
    slot_mapping: torch.Tensor
    """int64 [T]."""
    decode_slots: Slots
    """[D], in the order of the decode set."""
    decode_block_tables: torch.Tensor
    """int32 [D, M]."""
    decode_context_lens: torch.Tensor
    """int32 [D]."""
    chunks: Sequence[Chunk]
    """S of them."""
    chunk_block_tables: torch.Tensor
    """int32 [S, M]."""
    chunk_context_lens: torch.Tensor
    """int32 [S]."""
    chunk_query_start: torch.Tensor
    """int32 [S + 1]."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]


class Batch:
    """Rows 0..max_slots-1. Every method raises PlanError where a plan contradicts the rows; the batch is then void."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        num_blocks: int,
        max_slots: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.max_slots = max_slots
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.device = device
        self.sampling = SamplingState(max_slots, vocab_size, device)
        columns = layout.blocks_for(max_model_len)
        self.block_tables = torch.zeros((max_slots, columns), dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_slots, dtype=torch.int64, device=device)
        """The token each row sampled last, or its last known token."""
        self.known = np.zeros(max_slots, dtype=np.int64)
        """Tokens a row has, the last sampled one included. 0: the row is empty."""
        self.computed = np.zeros(max_slots, dtype=np.int64)
        """Tokens of a row whose KV is in its blocks."""
        self.prompt_tokens = np.zeros(max_slots, dtype=np.int64)
        self.table_lens = np.zeros(max_slots, dtype=np.int64)
        """Blocks in a row's block table."""
        self.in_decode = np.zeros(max_slots, dtype=np.bool_)
        self.prompt_logprobs = np.full(max_slots, NO_PROMPT_LOGPROBS, dtype=np.int64)
        self.decode_slots: Slots = _NO_SLOTS
        """The decode set, in its order."""
        self._given: dict[int, torch.Tensor] = {}
        """int64, on the host: the tokens a row was given, until all of them are computed."""

    def clear(self) -> None:
        """Empties every row: the stream to the scheduler has ended, and with it everything that was known."""
        self.release(np.flatnonzero(self.known).tolist())

    def release(self, slots: Sequence[int]) -> None:
        """Empties rows. One in the decode set leaves it."""
        if not slots:
            return
        rows = self._occupied(slots, "release_slots")
        if self.in_decode[rows].any():
            self._leave_decode(rows)
        self.known[rows] = self.computed[rows] = self.table_lens[rows] = 0
        for slot in slots:
            self._given.pop(slot, None)

    def add(self, sequences: Sequence[NewSequence]) -> None:
        """Fills empty rows."""
        for new in sequences:
            self._check_new(new)
            slot, num_tokens = new.slot, len(new.token_ids)
            tokens = torch.tensor(new.token_ids, dtype=torch.int64)
            if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
                raise PlanError(f"slot {slot}: a token id beyond the vocabulary of {self.vocab_size}")
            self.known[slot] = num_tokens
            self.computed[slot] = new.computed_tokens
            self.prompt_tokens[slot] = new.prompt_tokens
            self.table_lens[slot] = len(new.blocks)
            wanted = new.prompt_logprobs
            self.prompt_logprobs[slot] = NO_PROMPT_LOGPROBS if wanted is None else wanted
            self._given[slot] = tokens
            if new.blocks:
                blocks = torch.tensor(new.blocks, dtype=torch.int32)
                self.block_tables[slot, : len(new.blocks)] = blocks.to(self.device)
        if sequences:
            slots = torch.tensor([new.slot for new in sequences], device=self.device)
            self.last_tokens[slots] = torch.tensor([new.token_ids[-1] for new in sequences], device=self.device)
        self.sampling.fill(sequences)

    def append_blocks(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Appends blocks[i] to the block table of row slots[i], in order; a row may occur several times."""
        _check_pairs("append", slots, blocks)
        if not slots:
            return
        rows = self._occupied(slots, "append_slots")
        new_blocks = self._blocks(blocks, "append_blocks")
        # The i-th occurrence of a row goes i columns behind the row's end.
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        counts = np.diff(np.append(starts, rows.size))
        columns = self.table_lens[ordered] + np.arange(rows.size) - np.repeat(starts, counts)
        if (columns >= self.block_tables.shape[1]).any():
            raise PlanError("append_slots: a block table grows beyond max_model_len")
        self.table_lens[ordered[starts]] += counts
        self.block_tables[self._tensor(ordered), self._tensor(columns)] = self._tensor(new_blocks[order]).int()

    def replace_blocks(self, slots: Sequence[int], indices: Sequence[int], blocks: Sequence[int]) -> None:
        """Makes blocks[i] the entry indices[i] of row slots[i]'s block table."""
        _check_pairs("replace", slots, blocks)
        _check_pairs("replace", slots, indices)
        if not slots:
            return
        rows = self._occupied(slots, "replace_slots")
        columns = np.asarray(indices, dtype=np.int64)
        if (columns >= self.table_lens[rows]).any() or (columns < 0).any():
            raise PlanError("replace_indices: beyond the row's block table")
        new_blocks = self._blocks(blocks, "replace_blocks")
        self.block_tables[self._tensor(rows), self._tensor(columns)] = self._tensor(new_blocks).int()

    def change_decode_set(self, remove: Sequence[int], add: Sequence[int]) -> None:
        """Takes rows out of the decode set, then appends rows to it."""
        if remove:
            rows = self._occupied(remove, "decode_remove")
            if not self.in_decode[rows].all():
                raise PlanError(f"decode_remove: not all of {list(remove)} are in the decode set")
            self._leave_decode(rows)
        if add:
            rows = self._occupied(add, "decode_add")
            if self.in_decode[rows].any() or len(set(add)) != len(add):
                raise PlanError(f"decode_add: one of {list(add)} is in the decode set already")
            if (self.known[rows] != self.computed[rows] + 1).any():
                raise PlanError(f"decode_add: one of {list(add)} has tokens that are not computed yet")
            self.in_decode[rows] = True
            self.decode_slots = np.concatenate((self.decode_slots, rows))

    def step_inputs(self, chunk_slots: Sequence[int], chunk_tokens: Sequence[int], max_tokens: int) -> StepInputs:
        """Lays out the tokens that this step computes, at most `max_tokens`."""
        chunks = self._chunks(chunk_slots, chunk_tokens)
        decode = self.decode_slots
        num_decode = decode.size
        counts = np.fromiter((chunk.num_tokens for chunk in chunks), dtype=np.int64, count=len(chunks))
        total = num_decode + int(counts.sum())
        if total > max_tokens:
            raise PlanError(f"a step of {total} tokens; at most {max_tokens} were announced")
        chunk_rows = np.fromiter((chunk.slot for chunk in chunks), dtype=np.int64, count=len(chunks))
        decode_lens, chunk_lens = self.known[decode], self.computed[chunk_rows] + counts
        self._check_room(decode, decode_lens)
        self._check_room(chunk_rows, chunk_lens)
        query_start = np.concatenate(([0], counts.cumsum()))
        # Positions of the chunks: a running number, shifted so that every chunk begins at its row's computed tokens.
        shifts = np.repeat(self.computed[chunk_rows] - query_start[:-1], counts)
        positions = np.concatenate((decode_lens - 1, np.arange(total - num_decode) + shifts))
        token_slots = np.concatenate((decode, np.repeat(chunk_rows, counts)))
        given = [self._given[chunk.slot][chunk.start : chunk.start + chunk.num_tokens] for chunk in chunks]
        decode_tokens = self.last_tokens[self._tensor(decode)]
        if num_decode == total:
            token_ids = decode_tokens
        else:
            token_ids = torch.cat((decode_tokens, torch.cat(given).to(self.device)))
        position_tensor = self._tensor(positions)
        block_size = self.layout.block_size
        blocks = self.block_tables[self._tensor(token_slots), position_tensor // block_size].long()
        return StepInputs(
            token_ids=token_ids,
            positions=position_tensor,
            slot_mapping=blocks * block_size + position_tensor % block_size,
            decode_slots=decode,
            decode_block_tables=self._tables(decode, decode_lens),
            decode_context_lens=self._tensor(decode_lens).int(),
            chunks=chunks,
            chunk_block_tables=self._tables(chunk_rows, chunk_lens),
            chunk_context_lens=self._tensor(chunk_lens).int(),
            chunk_query_start=self._tensor(query_start).int(),
        )

    def fork(self, forks: Sequence[Fork], sampling_chunks: Sequence[Chunk]) -> None:
        """Copies rows for parallel samples. Parents are rows whose last chunk this step has computed."""
        if not forks:
            return
        parents = {chunk.slot for chunk in sampling_chunks}
        for fork in forks:
            if fork.parent_slot not in parents:
                raise PlanError(f"fork of slot {fork.parent_slot}, whose last chunk is not in this plan")
            self._check_empty(fork.slot)
            for array in (self.known, self.computed, self.prompt_tokens, self.table_lens):
                array[fork.slot] = array[fork.parent_slot]
            self.prompt_logprobs[fork.slot] = NO_PROMPT_LOGPROBS
        sources, slots = [fork.parent_slot for fork in forks], [fork.slot for fork in forks]
        self.block_tables[torch.tensor(slots, device=self.device)] = self.block_tables[
            torch.tensor(sources, device=self.device)
        ]
        self.sampling.fork(sources, slots, [fork.index for fork in forks])

    def note_computed(self, inputs: StepInputs) -> None:
        """The forward pass has written the KV of these tokens."""
        self.computed[inputs.decode_slots] += 1
        for chunk in inputs.chunks:
            self.computed[chunk.slot] += chunk.num_tokens
            if chunk.samples:
                self._given.pop(chunk.slot, None)

    def note_sampled(self, slots: Slots, token_ids: torch.Tensor) -> None:
        """Rows `slots` have sampled `token_ids`, int64 [R]."""
        self.known[slots] += 1
        self.last_tokens[self._tensor(slots)] = token_ids

    def given_tokens(self, slot: int) -> torch.Tensor:
        """int64, on the host: the tokens the row was given. Only until its last chunk is computed."""
        return self._given[slot]

    def output_lens(self, slots: Slots) -> Slots:
        """Output tokens that the rows have so far."""
        lens: Slots = self.known[slots] - self.prompt_tokens[slots]
        return lens

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        assert np.array_equal(np.sort(self.decode_slots), np.flatnonzero(self.in_decode))
        assert (self.known[self.in_decode] == self.computed[self.in_decode] + 1).all()
        used = self.known > 0
        assert (self.computed[used] < self.known[used]).all()
        assert (self.table_lens[used] * self.layout.block_size >= self.computed[used]).all()
        assert not self.table_lens[~used].any()

    def _chunks(self, slots: Sequence[int], tokens: Sequence[int]) -> list[Chunk]:
        _check_pairs("chunk", slots, tokens)
        if not slots:
            return []
        if len(set(slots)) != len(slots) or self.in_decode[self._occupied(slots, "chunk_slots")].any():
            raise PlanError(f"chunk_slots: one of {list(slots)} appears twice or is in the decode set")
        chunks = []
        first_row = int(self.decode_slots.size)
        for slot, num_tokens in zip(slots, tokens, strict=True):
            start, known = int(self.computed[slot]), int(self.known[slot])
            given = self._given.get(slot)
            if num_tokens < 1 or start + num_tokens > known or given is None or given.numel() != known:
                raise PlanError(f"slot {slot}: a chunk of {num_tokens} tokens, {start} of {known} are computed")
            chunks.append(Chunk(slot, start, num_tokens, first_row, samples=start + num_tokens == known))
            first_row += num_tokens
        return chunks

    def _tables(self, slots: Slots, lens: Slots) -> torch.Tensor:
        """Block tables of rows, as wide as the longest of `lens` needs."""
        columns = self.layout.blocks_for(int(lens.max())) if slots.size else 0
        return self.block_tables[:, :columns].index_select(0, self._tensor(slots))

    def _check_room(self, slots: Slots, lens: Slots) -> None:
        if (self.table_lens[slots] * self.layout.block_size < lens).any():
            raise PlanError("a row's block table has no room for the tokens to compute")

    def _check_new(self, new: NewSequence) -> None:
        self._check_empty(new.slot)
        where, num_tokens = f"new sequence in slot {new.slot}", len(new.token_ids)
        if not 0 <= new.computed_tokens < num_tokens <= self.max_model_len:
            raise PlanError(f"{where}: {new.computed_tokens} computed of {num_tokens} tokens")
        if not 1 <= new.prompt_tokens <= num_tokens:
            raise PlanError(f"{where}: a prompt of {new.prompt_tokens} in {num_tokens} tokens")
        if len(new.blocks) > self.block_tables.shape[1]:
            raise PlanError(f"{where}: {len(new.blocks)} blocks are more than max_model_len needs")
        if len(new.blocks) * self.layout.block_size < new.computed_tokens:
            raise PlanError(f"{where}: {len(new.blocks)} blocks cannot hold {new.computed_tokens} tokens")
        self._blocks(new.blocks, where)
        ids = [*new.stop_token_ids, *(token for token, _ in new.sampling.logit_bias)]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise PlanError(f"{where}: a stop or bias token id beyond the vocabulary of {self.vocab_size}")

    def _check_empty(self, slot: int) -> None:
        if not 0 <= slot < self.max_slots:
            raise PlanError(f"slot {slot}: there are {self.max_slots}")
        if self.known[slot]:
            raise PlanError(f"slot {slot} is to be filled but not empty")

    def _occupied(self, slots: Sequence[int], where: str) -> Slots:
        """The slots as an array; PlanError unless all are rows in use."""
        rows = np.asarray(slots, dtype=np.int64)
        if ((rows < 0) | (rows >= self.max_slots)).any() or not self.known[rows].all():
            raise PlanError(f"{where}: not all of {list(slots)} are rows in use")
        return rows

    def _blocks(self, blocks: Sequence[int], where: str) -> Slots:
        """The block ids as an array; PlanError unless all are in the pool."""
        ids = np.asarray(blocks, dtype=np.int64)
        if ((ids < 0) | (ids >= self.num_blocks)).any():
            raise PlanError(f"{where}: not all of {list(blocks)} are blocks of a pool of {self.num_blocks}")
        return ids

    def _leave_decode(self, rows: Slots) -> None:
        self.in_decode[rows] = False
        self.decode_slots = self.decode_slots[self.in_decode[self.decode_slots]]

    def _tensor(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        """A host array on the device. The copy keeps later changes of the host's array out of it."""
        return torch.tensor(array, device=self.device)


def _check_pairs(where: str, first: Sequence[int], second: Sequence[int]) -> None:
    if len(first) != len(second):
        raise PlanError(f"{where}: lists of {len(first)} and {len(second)} entries")
