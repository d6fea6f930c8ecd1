"""The persistent batch: one row per slot, changed by the deltas of step plans.

A row's tokens, half-open ranges:

    0 ........ computed ........ known            known == computed + 1 in the decode set
    |  have KV  |  given, or the   |              (the one token sampled last)
    |           |  last sampled    |

Lengths and block tables follow from the plans alone, so the host knows them without asking: it checks every plan
against its own copy and sends the device only what changes. Values of sampled tokens live on the device alone, where
the next step reads them without the host having seen them; and a decode step moves the device's lengths on by itself,
so that a step without changes needs nothing from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.kv_layout import KvLayout
from kernels.reference.step import KNOWN, LAST, PROMPT
from worker.sampling_state import SamplingState, Slots
from worker.shared_prefix import Prefix
from worker.shared_prefix import largest as largest_prefix
from worker.step import Fork, NewSequence, PlanError
from worker.upload import Placed, Upload

NO_PROMPT_LOGPROBS = -1

SHARING_STEP = 32
"""Decode sets that share a prefix are padded to multiples of it."""

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
class StepLayout:
    """What one forward pass computes: T tokens, the decode rows first, then the chunks. All of it on the host."""

    decode_slots: Slots
    """[D], in the order of the decode set."""
    decode_columns: int
    """Blocks of the longest decode row."""
    chunks: Sequence[Chunk]
    """S of them."""
    chunk_slots: Slots
    """[S]."""
    chunk_lens: Slots
    """[S]: tokens in the cache after the step."""
    chunk_columns: int
    """Blocks of the longest of them."""
    query_start: Slots
    """[S + 1]: where each chunk begins behind the decode rows."""
    token_ids: Slots
    """[T - D], of the chunks."""
    positions: Slots
    """[T - D], of the chunks."""
    slot_mapping: Slots
    """[T - D], of the chunks."""

    @property
    def num_decode(self) -> int:
        """D."""
        return self.decode_slots.size

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.decode_slots.size + self.token_ids.size

    @property
    def finishing(self) -> list[Chunk]:
        """The chunks that sample."""
        return [chunk for chunk in self.chunks if chunk.samples]


class Batch:
    """Rows 0..max_slots-1. Every method raises PlanError where a plan contradicts the rows; the batch is then void.

    Row max_slots pads: its length is 0, and a step that computes it writes nothing and attends to nothing.
    """

    def __init__(
        self,
        layout: KvLayout,
        *,
        num_blocks: int,
        max_slots: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        buckets: Sequence[int] = (),
        shares_prefixes: bool = False,
    ) -> None:
        """buckets: the sizes, ascending, that decode sets are padded to; the last is at least max_slots. None: no
        padding. shares_prefixes: whether to look for blocks that decode rows have in common at their beginning."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.max_slots = self.padding_slot = max_slots
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.buckets = tuple(buckets)
        self.sampling = SamplingState(max_slots, vocab_size, device)
        self.columns = layout.blocks_for(max_model_len)
        self.block_tables = torch.zeros((max_slots + 1, self.columns), dtype=torch.int32, device=device)
        self.tokens = torch.zeros((3, max_slots + 1), dtype=torch.int64, device=device)
        """By LAST: the token each row sampled last, or its last known token; by KNOWN: tokens it has, the last sampled
        one included; by PROMPT: those of its prompt."""
        widest = max(max_slots, *self.buckets) if self.buckets else max_slots
        self.decode_rows = torch.full((widest,), self.padding_slot, dtype=torch.int64, device=device)
        """The slots of the decode set in its order, then padding."""
        self.shared_lens = torch.zeros(max_slots + 1, dtype=torch.int32, device=device)
        """Tokens at a row's beginning that it has in common with others of the decode set."""
        self.shared_slot = torch.full((1,), self.padding_slot, dtype=torch.int64, device=device)
        """One of the rows that share; the padding if none do."""

        self.tables = np.zeros((max_slots + 1, self.columns), dtype=np.int32)
        """The host's copy of block_tables."""
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
        self._given: dict[int, Slots] = {}
        """The tokens a row was given, until all of them are computed."""
        self._edits: list[Slots] = []
        """Places in `tables` that changed, row by row, since they were last sent."""
        self._decode_changed = False
        self._shares_prefixes = shares_prefixes
        self.shared: Prefix | None = None
        """What rows of the decode set have in common, as the device was told."""

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

    def add(self, sequences: Sequence[NewSequence], upload: Upload) -> None:
        """Fills empty rows."""
        if not sequences:
            return
        for new in sequences:
            self._check_new(new)
            slot, num_tokens = new.slot, len(new.token_ids)
            tokens = np.asarray(new.token_ids, dtype=np.int64)
            if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
                raise PlanError(f"slot {slot}: a token id beyond the vocabulary of {self.vocab_size}")
            self.known[slot] = num_tokens
            self.computed[slot] = new.computed_tokens
            self.prompt_tokens[slot] = new.prompt_tokens
            self.table_lens[slot] = len(new.blocks)
            wanted = new.prompt_logprobs
            self.prompt_logprobs[slot] = NO_PROMPT_LOGPROBS if wanted is None else wanted
            self._given[slot] = tokens
            self._edit(np.full(len(new.blocks), slot), np.arange(len(new.blocks)), np.asarray(new.blocks, np.int64))
        count = len(sequences)
        slots = upload.put([new.slot for new in sequences])
        columns = [(new.token_ids[-1], len(new.token_ids), new.prompt_tokens) for new in sequences]
        values = upload.put(np.array(columns, dtype=np.int64).T)
        upload.then(lambda: self.tokens.index_copy_(1, slots.tensor, values.tensor.view(3, count)))
        self.sampling.fill(sequences, upload)

    def continue_beams(
        self, slots: Sequence[int], parents: Sequence[int], tokens: Sequence[int], upload: Upload
    ) -> None:
        """Makes row slots[i] a copy of row parents[i] as it was, whose last token is tokens[i] instead."""
        _check_pairs("beam", slots, parents)
        _check_pairs("beam", slots, tokens)
        if not slots:
            return
        rows, sources = np.asarray(slots, dtype=np.int64), self._occupied(parents, "beam_parents")
        if len(set(slots)) != len(slots) or ((rows < 0) | (rows >= self.max_slots)).any():
            raise PlanError(f"beam_slots: one of {list(slots)} appears twice or is no row")
        if (self.known[sources] != self.computed[sources] + 1).any():
            raise PlanError(f"beam_parents: one of {list(parents)} has tokens that are not computed yet")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise PlanError(f"beam_tokens: a token id beyond the vocabulary of {self.vocab_size}")
        self._copy_rows(rows, sources)
        self._decode_changed |= bool(self.in_decode[rows].any())
        for slot in slots:
            self._given.pop(slot, None)
        targets, placed, chosen = upload.put(rows), upload.put(sources), upload.put(tokens)
        self._copy_on_device(placed, targets, upload)
        upload.then(lambda: self.tokens[LAST].index_copy_(0, targets.tensor, chosen.tensor))
        self.sampling.copy(parents, slots, placed, targets, upload)

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
        if (columns >= self.columns).any():
            raise PlanError("append_slots: a block table grows beyond max_model_len")
        self.table_lens[ordered[starts]] += counts
        self._edit(ordered, columns, new_blocks[order])

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
        self._edit(rows, columns, self._blocks(blocks, "replace_blocks"))
        self._decode_changed |= bool(self.in_decode[rows].any())

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
            self._decode_changed = True

    def lay_out(self, chunk_slots: Sequence[int], chunk_tokens: Sequence[int], max_tokens: int) -> StepLayout:
        """Lays out the tokens that this step computes, at most `max_tokens`."""
        chunks = self._chunks(chunk_slots, chunk_tokens)
        decode = self.decode_slots
        counts = np.fromiter((chunk.num_tokens for chunk in chunks), dtype=np.int64, count=len(chunks))
        total = decode.size + int(counts.sum())
        if total > max_tokens:
            raise PlanError(f"a step of {total} tokens; at most {max_tokens} were announced")
        decode_lens = self.known[decode]
        self._check_room(decode, decode_lens)
        decode_columns = self.layout.blocks_for(int(decode_lens.max())) if decode.size else 0
        if not chunks:
            return StepLayout(
                decode, decode_columns, (), _NO_SLOTS, _NO_SLOTS, 0, _NO_SLOTS, _NO_SLOTS, _NO_SLOTS, _NO_SLOTS
            )
        rows = np.fromiter((chunk.slot for chunk in chunks), dtype=np.int64, count=len(chunks))
        lens = self.computed[rows] + counts
        self._check_room(rows, lens)
        query_start = np.concatenate(([0], counts.cumsum()))
        # Positions of the chunks: a running number, shifted so that every chunk begins at its row's computed tokens.
        positions = np.arange(total - decode.size) + np.repeat(self.computed[rows] - query_start[:-1], counts)
        block_size = self.layout.block_size
        blocks = self.tables[np.repeat(rows, counts), positions // block_size].astype(np.int64)
        return StepLayout(
            decode_slots=decode,
            decode_columns=decode_columns,
            chunks=chunks,
            chunk_slots=rows,
            chunk_lens=lens,
            chunk_columns=self.layout.blocks_for(int(lens.max())),
            query_start=query_start,
            token_ids=np.concatenate([self._given[c.slot][c.start : c.start + c.num_tokens] for c in chunks]),
            positions=positions,
            slot_mapping=blocks * block_size + positions % block_size,
        )

    def stage(self, upload: Upload) -> None:
        """Puts the changes of block tables and decode set into the upload."""
        if self._edits:
            flat = np.concatenate(self._edits)
            self._edits.clear()
            # A place that changed twice occurs twice, both times with what it is now.
            places, blocks = upload.put(flat), upload.put(self.tables.reshape(-1)[flat], np.int32)
            upload.then(lambda: self.block_tables.view(-1).index_copy_(0, places.tensor, blocks.tensor))
        if self._decode_changed:
            self._decode_changed = False
            self._share(upload)
            count = self.padded(self.decode_slots.size)
            if count:
                slots = np.full(count, self.padding_slot)
                slots[: self.decode_slots.size] = self.decode_slots
                placed = upload.put(slots)
                upload.then(lambda: self.decode_rows[:count].copy_(placed.tensor))

    def padded(self, num_decode: int) -> int:
        """The bucket for a decode set of this size."""
        buckets = self.buckets if self.shared is None else self.sharing_buckets
        return next((bucket for bucket in buckets if bucket >= num_decode), num_decode) if num_decode else 0

    @property
    def sharing_buckets(self) -> Sequence[int]:
        """Those for decode sets that share a prefix: fewer, because a row more costs little there."""
        if not self._shares_prefixes or not self.buckets:
            return ()
        return *(bucket for bucket in self.buckets[:-1] if bucket % SHARING_STEP == 0), self.buckets[-1]

    def _share(self, upload: Upload) -> None:
        """Looks for what the decode set has in common, and tells the device if that is something else than before."""
        if not self._shares_prefixes:
            return
        before, size = self.shared, self.layout.block_size
        found = largest_prefix(self.tables, self.known, self.decode_slots, size)
        self.shared = found
        if found is None and before is None:
            return
        if found and before and found.blocks == before.blocks and np.array_equal(found.slots, before.slots):
            return
        lens = np.zeros(self.max_slots + 1, dtype=np.int64)
        if found:
            lens[found.slots] = found.blocks * size
        placed = upload.put(lens, np.int32)
        slot = upload.put([self.padding_slot if found is None else int(found.slots[0])])

        def tell() -> None:
            self.shared_lens.copy_(placed.tensor)
            self.shared_slot.copy_(slot.tensor)

        upload.then(tell)

    def advance(self, layout: StepLayout, forks: Sequence[Fork], upload: Upload) -> tuple[Slots, Slots]:
        """What the step changes that is known without its results: tokens get computed, forks appear, rows sample.

        Returns the slots of the rows that sample, in the order of the result (decode set, finishing chunks, forks),
        and how many output tokens each has so far.
        """
        finishing = layout.finishing
        self.computed[layout.decode_slots] += 1
        for chunk in layout.chunks:
            self.computed[chunk.slot] += chunk.num_tokens
            if chunk.samples:
                self._given.pop(chunk.slot, None)
        self._fork(forks, finishing, upload)
        others = [chunk.slot for chunk in finishing] + [fork.slot for fork in forks]
        slots = (
            np.concatenate((layout.decode_slots, np.array(others, dtype=np.int64))) if others else layout.decode_slots
        )
        output_lens: Slots = self.known[slots] - self.prompt_tokens[slots]
        self.known[slots] += 1
        return slots, output_lens

    def given_tokens(self, slot: int) -> Slots:
        """The tokens the row was given. Only until its last chunk is computed."""
        return self._given[slot]

    def touched_blocks(self, layout: StepLayout) -> tuple[Slots, Slots]:
        """Blocks of the pool that the step's rows hold, and those among them that it writes to."""
        size, decode = self.layout.block_size, layout.decode_slots
        rows = np.concatenate((decode, layout.chunk_slots))
        lens = self.table_lens[rows]
        width = int(lens.max()) if rows.size else 0
        held = self.tables[rows, :width][np.arange(width) < lens[:, None]].astype(np.int64)
        written = self.tables[decode, (self.known[decode] - 1) // size].astype(np.int64)
        return held, np.concatenate((written, np.unique(layout.slot_mapping // size)))

    def check_integrity(self) -> None:
        """Asserts what must hold between steps, on the host and between host and device. Waits for the device."""
        assert np.array_equal(np.sort(self.decode_slots), np.flatnonzero(self.in_decode))
        assert (self.known[self.in_decode] == self.computed[self.in_decode] + 1).all()
        used = self.known > 0
        assert (self.computed[used] < self.known[used]).all()
        assert (self.table_lens[used] * self.layout.block_size >= self.computed[used]).all()
        assert not self.table_lens[~used].any()
        tokens, tables = self.tokens.cpu().numpy(), self.block_tables.cpu().numpy()
        assert tokens[KNOWN, self.padding_slot] == 0
        assert np.array_equal(tokens[KNOWN, :-1][used], self.known[used])
        assert np.array_equal(tokens[PROMPT, :-1][used], self.prompt_tokens[used])
        for slot in np.flatnonzero(used):
            assert np.array_equal(tables[slot, : self.table_lens[slot]], self.tables[slot, : self.table_lens[slot]])
        if not self._decode_changed:
            assert np.array_equal(self.decode_rows[: self.decode_slots.size].cpu().numpy(), self.decode_slots)

    def _fork(self, forks: Sequence[Fork], finishing: Sequence[Chunk], upload: Upload) -> None:
        """Copies rows for parallel samples. Parents are rows whose last chunk this step computes."""
        if not forks:
            return
        parents = {chunk.slot for chunk in finishing}
        for fork in forks:
            if fork.parent_slot not in parents:
                raise PlanError(f"fork of slot {fork.parent_slot}, whose last chunk is not in this plan")
            self._check_empty(fork.slot)
        slots, sources = [fork.slot for fork in forks], [fork.parent_slot for fork in forks]
        self._copy_rows(np.array(slots), np.array(sources))
        placed, targets = upload.put(sources), upload.put(slots)
        self._copy_on_device(placed, targets, upload)
        self.sampling.fork(forks, placed, targets, upload)

    def _copy_rows(self, slots: Slots, parents: Slots) -> None:
        """On the host: rows become copies of their parents, which are all read before."""
        for array in (self.known, self.computed, self.prompt_tokens, self.table_lens, self.tables):
            array[slots] = array[parents]
        self.prompt_logprobs[slots] = NO_PROMPT_LOGPROBS

    def _copy_on_device(self, parents: Placed, slots: Placed, upload: Upload) -> None:
        def copy_rows() -> None:
            self.block_tables.index_copy_(0, slots.tensor, self.block_tables.index_select(0, parents.tensor))
            self.tokens.index_copy_(1, slots.tensor, self.tokens.index_select(1, parents.tensor))

        upload.then(copy_rows)

    def _edit(self, rows: Slots, columns: Slots, blocks: Slots) -> None:
        """Changes entries of block tables, on the host at once and on the device with the next upload."""
        if rows.size:
            self.tables[rows, columns] = blocks
            self._edits.append(rows * self.columns + columns)

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
            if num_tokens < 1 or start + num_tokens > known or given is None or given.size != known:
                raise PlanError(f"slot {slot}: a chunk of {num_tokens} tokens, {start} of {known} are computed")
            chunks.append(Chunk(slot, start, num_tokens, first_row, samples=start + num_tokens == known))
            first_row += num_tokens
        return chunks

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
        if len(new.blocks) > self.columns:
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

    def _leave_decode(self, rows: npt.NDArray[np.int64]) -> None:
        self.in_decode[rows] = False
        self.decode_slots = self.decode_slots[self.in_decode[self.decode_slots]]
        self._decode_changed = True


def _check_pairs(where: str, first: Sequence[int], second: Sequence[int]) -> None:
    if len(first) != len(second):
        raise PlanError(f"{where}: lists of {len(first)} and {len(second)} entries")
