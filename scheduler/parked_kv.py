"""Groups that have ended for now: where their KV is kept until somebody continues them."""

from __future__ import annotations

from scheduler.block_manager import BlockManager
from scheduler.draft import Draft
from scheduler.sequence import FinishReason, Sequence, SequenceGroup


class ParkedKv:
    """The parked groups of one worker. Their KV is on its way to the host arena or there; what finds no room is let go,
    and whoever continues it computes it again."""

    def __init__(self, worker_id: str, blocks: BlockManager, block_bytes: int, most_host_blocks: int) -> None:
        self.groups: dict[SequenceGroup, None] = {}
        self.leaving: list[SequenceGroup] = []  # of those, whose KV the next plan copies out
        self._worker_id = worker_id
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._most_host_blocks = most_host_blocks

    def take_in(self, group: SequenceGroup) -> None:
        """Keeps the KV of a group that has just ended, for who continues it: of all its parked sequences, or none."""
        kept = [sequence for sequence in group.sequences if sequence.table.blocks]
        if group.keep_until is None or (group.is_parked and len(kept) < _num_parked(group)):
            for sequence in kept:
                self._lose(sequence)
            return
        if not kept:
            return
        for sequence in kept:
            # The last token's is computed with what follows; of appended tokens none may be yet.
            self.cut(sequence)
        self.groups[group] = None
        group.parked_on = self._worker_id
        if not all(sequence.table.on_host for sequence in kept):
            self.leaving.append(group)

    def swap_out(self, draft: Draft) -> None:
        """Copies the KV of groups that have been parked since the last plan to the arena, as far as there is room."""
        for group in self.leaving:
            if group not in self.groups:
                continue  # let go meanwhile
            tables = [s.table for s in group.sequences if s.table.blocks and not s.table.on_host]
            need = self._blocks.swap_out_need(tables)
            room = self._most_host_blocks - self._num_host_blocks()
            if need > min(room, self._blocks.tier.num_available):
                self.let_go(group)
            elif tables:
                moves = self._blocks.swap_out(tables)
                draft.add_swap_out(moves)
                group.swapped_bytes += len(moves) * self._block_bytes
        self.leaving.clear()

    def let_go(self, group: SequenceGroup) -> None:
        """Frees the KV of a parked group; whoever continues it computes it again."""
        del self.groups[group]
        group.parked_on = None
        for sequence in group.sequences:
            if sequence.table.blocks:
                self._lose(sequence)

    def claim(self, group: SequenceGroup) -> None:
        """A parked group is about to be continued here: its KV is its own again, if it has reached the arena."""
        if any(sequence.table.blocks and not sequence.table.on_host for sequence in group.sequences):
            self.let_go(group)
        else:
            del self.groups[group]
            group.parked_on = None

    def cut(self, sequence: Sequence) -> None:
        """Frees the KV of what is no token of the sequence any more, and that of its last token."""
        if sequence.table.blocks:
            sequence.computed = min(sequence.computed, sequence.num_tokens - 1)
            self._blocks.truncate(sequence.table, sequence.computed)

    def _num_host_blocks(self) -> int:
        """Host blocks that parked groups hold, shared ones counted once per table."""
        return sum(len(s.table) for group in self.groups for s in group.sequences if s.table.on_host)

    def _lose(self, sequence: Sequence) -> None:
        sequence.forget_computed()
        self._blocks.free(sequence.table)


def _num_parked(group: SequenceGroup) -> int:
    return sum(1 for s in group.sequences if s.finish is not None and s.finish.reason is FinishReason.PARKED)
