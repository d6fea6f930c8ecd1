"""What the groups of one worker have in common, counted as they come and go."""

from __future__ import annotations

from collections import Counter

from scheduler.sequence import SequenceGroup, SequenceStatus

PROGRESS_TOKENS = 16
"""Output tokens per sequence after which a request is no longer suspected of having brought its worker down. One that
does so by what it asks for, or at some position, does so again within the first tokens after it has been resumed."""

_RUNNING = {SequenceStatus.PREFILLING, SequenceStatus.RUNNING, SequenceStatus.ENDING}


class Census:
    """Groups of a worker that have not finished, by what is asked about them in every step."""

    __slots__ = ("_max_losses", "priorities", "searches", "stop_tokens", "suspects")

    def __init__(self, max_losses: int) -> None:
        """max_losses: workers that a group may lose; with the last of them it fails."""
        self._max_losses = max_losses
        self.priorities: dict[int, int] = {}  # how many have each priority
        self.stop_tokens: dict[int, int] = {}  # how many have each stop token
        self.searches: dict[SequenceGroup, None] = {}  # beam searches
        self.suspects: dict[SequenceGroup, None] = {}  # were on a worker when it was lost, and no progress since

    def enter(self, group: SequenceGroup) -> None:
        priority = group.request.priority
        self.priorities[priority] = self.priorities.get(priority, 0) + 1
        for token in group.request.stop_ids:
            self.stop_tokens[token] = self.stop_tokens.get(token, 0) + 1
        if group.search is not None:
            self.searches[group] = None
        if group.losses:
            group.acquitted_at = _num_output(group) + PROGRESS_TOKENS * len(group.live)
            self.suspects[group] = None

    def leave(self, group: SequenceGroup) -> None:
        _count_down(self.priorities, group.request.priority)
        for token in group.request.stop_ids:
            _count_down(self.stop_tokens, token)
        self.searches.pop(group, None)
        self.suspects.pop(group, None)

    def must_be_alone(self, group: SequenceGroup) -> bool:
        """Whether a group's next loss is its last while another such group runs: the one that brings workers down must
        not take the others with it."""
        last = self._max_losses - 1
        return group.losses >= last and any(other.losses >= last and _is_running(other) for other in self.suspects)

    def acquit(self) -> None:
        """Forgets the losses of groups that have made progress since."""
        for group in [group for group in self.suspects if _num_output(group) >= group.acquitted_at]:
            group.losses = 0
            del self.suspects[group]

    def check_integrity(self, groups: dict[SequenceGroup, None]) -> None:
        """Raises AssertionError unless exactly these groups are counted."""
        stop_tokens = Counter(token for group in groups for token in group.request.stop_ids)
        assert self.priorities == Counter(group.request.priority for group in groups), "priorities are miscounted"
        assert self.stop_tokens == stop_tokens, "stop tokens are miscounted"
        assert self.searches.keys() == {group for group in groups if group.search is not None}, "a search is not known"
        assert self.suspects.keys() <= groups.keys(), "a group that is not here is suspected"


def _count_down(counts: dict[int, int], key: int) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1


def _num_output(group: SequenceGroup) -> int:
    return sum(len(sequence.output) for sequence in group.sequences)


def _is_running(group: SequenceGroup) -> bool:
    return any(sequence.status in _RUNNING for sequence in group.live)
