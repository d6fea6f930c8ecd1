"""The block pool, block tables and block manager: literal block ids, then a state machine against a toy model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.block_manager import BlockManager
from scheduler.block_pool import BlockPool, OutOfBlocksError
from scheduler.block_table import BlockTable, blocks_for
from scheduler.prefix_cache import extend_chain, start_chain


def make_manager(num_blocks: int = 8, host_blocks: int = 8, block_size: int = 4) -> BlockManager:
    return BlockManager(num_blocks=num_blocks, host_blocks=host_blocks, block_size=block_size)


def table_of(manager: BlockManager, num_tokens: int) -> BlockTable:
    table = BlockTable()
    manager.extend(table, num_tokens)
    return table


def keys_of(num_blocks: int, tenant: str = "") -> list[bytes]:
    return extend_chain(start_chain(tenant), list(range(4 * num_blocks)), 4)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tokens_need_blocks_rounded_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 4) == blocks


def test_a_fresh_pool_hands_out_blocks_in_order_and_the_one_freed_last_first() -> None:
    pool = BlockPool(4)
    assert [pool.take(), pool.take(), pool.take()] == [0, 1, 2]
    assert pool.drop(1)
    pool.put_back(1)
    assert pool.drop(0)
    pool.put_back(0)
    assert [pool.take(), pool.take(), pool.take()] == [0, 1, 3]


def test_an_empty_pool_raises_rather_than_hand_out_a_block_twice() -> None:
    pool = BlockPool(1)
    pool.take()
    with pytest.raises(OutOfBlocksError, match="all 1 blocks are taken"):
        pool.take()


def test_many_blocks_are_taken_all_or_none() -> None:
    pool = BlockPool(4)
    assert pool.take_many(3) == [0, 1, 2]
    with pytest.raises(OutOfBlocksError, match="2 blocks are wanted, 1 of 4 are free"):
        pool.take_many(2)
    assert pool.take_many(0) == []
    assert pool.take_many(1) == [3]


def test_a_block_without_references_cannot_be_dropped() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="block 0 has no reference"):
        pool.drop(0)


def test_the_pools_check_finds_a_lost_block_and_a_wrong_count() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.check_integrity({block: 1}, ())
    with pytest.raises(AssertionError, match="references"):
        pool.check_integrity({block: 2}, ())
    pool.references[block] = 0
    with pytest.raises(AssertionError, match="a block is lost"):
        pool.check_integrity({}, ())


def test_a_table_grows_block_by_block() -> None:
    manager = make_manager()
    table = table_of(manager, 5)
    assert table.blocks == [0, 1]
    manager.extend(table, 8)
    assert table.blocks == [0, 1]
    manager.extend(table, 9)
    assert table.blocks == [0, 1, 2]
    assert manager.append(table) == 3
    assert manager.num_free == 4


def test_a_fork_shares_all_blocks_and_costs_none() -> None:
    manager = make_manager()
    parent = table_of(manager, 6)
    child = manager.fork(parent)
    assert child.blocks == [0, 1]
    assert manager.num_free == 6
    assert manager.is_shared(child, 1)
    manager.append(child)
    assert parent.blocks == [0, 1]
    manager.check_integrity([parent, child])


def test_a_fork_of_the_first_blocks_shares_only_those() -> None:
    manager = make_manager()
    parent = table_of(manager, 12)
    child = manager.fork(parent, 2)
    assert child.blocks == [0, 1]
    assert not manager.is_shared(parent, 2)
    manager.check_integrity([parent, child])


def test_copy_on_write_gives_all_but_the_last_holder_a_block_of_its_own() -> None:
    manager = make_manager()
    parent = table_of(manager, 6)
    first, second = manager.fork(parent), manager.fork(parent)
    assert manager.make_private(parent, 1) == (1, 2)
    assert manager.make_private(first, 1) == (1, 3)
    assert manager.make_private(second, 1) is None
    assert [parent.blocks, first.blocks, second.blocks] == [[0, 2], [0, 3], [0, 1]]
    manager.check_integrity([parent, first, second])


def test_a_shared_block_is_free_only_after_its_last_table_is_freed() -> None:
    manager = make_manager()
    parent = table_of(manager, 8)
    child = manager.fork(parent)
    manager.free(parent)
    assert manager.num_free == 6
    manager.free(child)
    assert manager.num_free == 8
    assert parent.blocks == child.blocks == []


def test_swapping_moves_shared_blocks_once_and_keeps_them_shared() -> None:
    manager = make_manager()
    parent = table_of(manager, 8)
    child = manager.fork(parent)
    manager.append(child)
    assert manager.swap_out_need([parent, child]) == 3
    out = manager.swap_out([parent, child])
    assert (out.sources, out.destinations) == ([0, 1, 2], [0, 1, 2])
    assert (parent.blocks, child.blocks, parent.on_host) == ([0, 1], [0, 1, 2], True)
    assert (manager.num_free, manager.host.num_free) == (8, 5)
    manager.check_integrity([parent, child])
    other = table_of(manager, 4)
    assert other.blocks == [2]
    assert manager.swap_in_need([parent, child], [2, 2]) == 3
    back = manager.swap_in([parent, child], [2, 2])
    assert (back.sources, back.destinations) == ([0, 1, 2], [1, 0, 3])
    assert (parent.blocks, child.blocks, child.on_host) == ([1, 0], [1, 0, 3], False)
    assert manager.host.num_free == 8
    manager.check_integrity([parent, child, other])


def test_swapping_in_gives_every_table_its_own_partial_block() -> None:
    manager = make_manager()
    parent = table_of(manager, 6)
    child = manager.fork(parent)
    manager.swap_out([parent, child])
    assert manager.swap_in_need([parent, child], [1, 1]) == 3
    back = manager.swap_in([parent, child], [1, 1])
    assert back.sources == [0, 1, 1]
    assert len(set(back.destinations)) == 3
    assert parent.blocks[0] == child.blocks[0]
    assert parent.blocks[1] != child.blocks[1]
    manager.check_integrity([parent, child])


def test_a_table_on_the_host_can_be_freed() -> None:
    manager = make_manager()
    table = table_of(manager, 8)
    manager.swap_out([table])
    manager.free(table)
    assert manager.host.num_free == 8
    assert not table.on_host
    manager.check_integrity([])


def test_a_registered_block_is_found_while_used_and_after() -> None:
    manager = make_manager()
    keys = keys_of(2)
    table = table_of(manager, 8)
    manager.register(zip(table.blocks, keys, strict=True))
    assert manager.find_prefix(keys) == [0, 1]
    manager.free(table)
    assert manager.num_free == 8
    assert manager.find_prefix(keys) == [0, 1]
    assert manager.num_parked([0, 1]) == 2
    again = BlockTable()
    manager.share_prefix(again, [0, 1])
    assert again.blocks == [0, 1]
    assert manager.num_free == 6
    manager.check_integrity([again])


def test_unreferenced_blocks_are_given_up_only_when_no_other_is_free_and_the_oldest_chains_end_first() -> None:
    manager = make_manager(num_blocks=4)
    keys = keys_of(2)
    table = table_of(manager, 8)
    manager.register(zip(table.blocks, keys, strict=True))
    manager.free(table)
    other = table_of(manager, 8)
    assert other.blocks == [2, 3]
    assert manager.append(other) == 1
    assert manager.find_prefix(keys) == [0]
    assert manager.append(other) == 0
    assert manager.find_prefix(keys) == []
    with pytest.raises(OutOfBlocksError):
        manager.append(other)
    manager.check_integrity([other])


def test_the_first_block_of_a_key_stays_registered() -> None:
    manager = make_manager()
    (key,) = keys_of(1)
    first, second = table_of(manager, 4), table_of(manager, 4)
    manager.register([(first.blocks[0], key)])
    manager.register([(second.blocks[0], key)])
    assert manager.find_prefix([key]) == [0]
    manager.free(second)
    assert manager.find_prefix([key]) == [0]
    manager.check_integrity([first])


def test_forgotten_blocks_are_not_found_and_free_once_unused() -> None:
    manager = make_manager(num_blocks=2)
    keys = keys_of(2)
    table = table_of(manager, 8)
    manager.register(zip(table.blocks, keys, strict=True))
    manager.forget(keys[1:])
    assert manager.find_prefix(keys) == [0]
    manager.free(table)
    manager.forget(keys)
    assert manager.find_prefix(keys) == []
    assert manager.pool.num_free == 2
    manager.check_integrity([])


def test_keys_depend_on_everything_before_the_block_and_on_the_tenant() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    keys = extend_chain(start_chain("a"), tokens, 4)
    assert len(keys) == 2
    assert len(set(keys)) == 2
    assert extend_chain(start_chain("a"), [9, *tokens[1:]], 4)[1] != keys[1]
    assert extend_chain(start_chain("b"), tokens, 4)[0] != keys[0]
    chain = start_chain("a")
    assert extend_chain(chain, tokens[:4], 4) + extend_chain(chain, tokens[4:], 4) == keys


def test_keys_are_the_documented_sha256() -> None:
    import hashlib
    import struct

    salt = hashlib.sha256(b"tenant").digest()
    first = hashlib.sha256(salt + struct.pack("<2I", 7, 70000)).digest()
    second = hashlib.sha256(salt + struct.pack("<4I", 7, 70000, 0, 2**32 - 1)).digest()
    assert extend_chain(start_chain("tenant"), [7, 70000, 0, 2**32 - 1, 5], 2) == [first, second]


class Blocks(RuleBasedStateMachine):
    """Random verbs on a small manager. The toy model holds every table's contents as a list of values; a memory of
    values per block id shows whether the manager's block ids would give the same."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(num_blocks=10, host_blocks=6, block_size=2, host_cache=True)
        self.manager.most_clean = 8  # so that there is nearly always something to copy
        self.kv: dict[int, tuple[int, ...]] = {}
        self.arena: dict[int, tuple[int, ...]] = {}
        self.tables: list[BlockTable] = []
        self.model: list[list[int]] = []  # per table: the values of its tokens
        self.cached: dict[bytes, tuple[int, ...]] = {}  # every key ever registered: what its block must hold
        self.pinned: set[bytes] = set()
        self.pinned_blocks: set[bytes] = set()  # keys of those, whose blocks may not be given up

    def write(self, number: int, position: int, value: int) -> None:
        """Writes one token's value through the block table; the block must be private."""
        block = self.tables[number].blocks[position // 2]
        assert self.manager.pool.references[block] == 1, "a write goes to a shared block"
        self.kv[block] = (*self.kv.get(block, ())[: position % 2], value)

    def copy_out(self) -> None:
        """What the plan copies out for the second tier, before it writes anything. Every rule is a plan."""
        moves = self.manager.tier.flush()
        assert len(set(moves.destinations)) == len(moves)
        for source, destination in zip(moves.sources, moves.destinations, strict=True):
            self.arena[destination] = self.kv[source]

    def on_device(self) -> list[int]:
        return [number for number, table in enumerate(self.tables) if not table.on_host]

    def away(self) -> list[int]:
        return [number for number, table in enumerate(self.tables) if table.on_host]

    def truncate(self, number: int, num_tokens: int) -> None:
        del self.model[number][num_tokens:]
        self.manager.truncate(self.tables[number], num_tokens)
        assert len(self.tables[number]) == blocks_for(num_tokens, 2)

    def move_out(self, numbers: list[int]) -> bool:
        """Swaps tables out if the arena has room for all of them."""
        tables = [self.tables[number] for number in numbers]
        if self.manager.swap_out_need(tables) > self.manager.tier.num_available:
            return False
        moves = self.manager.swap_out(tables)
        assert len(set(moves.destinations)) == len(moves)
        for source, destination in zip(moves.sources, moves.destinations, strict=True):
            self.arena[destination] = self.kv[source]
        return True

    @precondition(lambda self: len(self.tables) < 5 and self.manager.num_free >= 2)
    @rule(values=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def add(self, values: list[int]) -> None:
        table = BlockTable()
        keys = extend_chain(start_chain(""), values, 2)
        keys_to_find = keys[: (len(values) - 1) // 2]
        found = self.manager.find_prefix(keys_to_find)
        kept_keys = self.manager.tier.find(keys_to_find[len(found) :])
        kept = self.manager.tier.take(kept_keys)
        self.manager.share_prefix(table, found)
        self.manager.extend(table, len(values))
        moves = self.manager.fill_from_host(table, len(found), kept, kept_keys)
        self.copy_out()
        for source, destination in zip(moves.sources, moves.destinations, strict=True):
            self.kv[destination] = self.arena[source]
        self.tables.append(table)
        self.model.append(values.copy())
        for position in range(2 * (len(found) + len(kept)), len(values)):
            self.write(len(self.tables) - 1, position, values[position])
        for block, key, start in zip(table.blocks, keys, range(0, len(values), 2), strict=False):
            self.manager.register([(block, key)])
            self.cached[key] = tuple(values[start : start + 2])

    @precondition(lambda self: self.on_device() and self.manager.num_free)
    @rule(data=st.data(), value=st.integers(0, 2))
    def append(self, data: st.DataObject, value: int) -> None:
        number = data.draw(st.sampled_from(self.on_device()))
        table, values = self.tables[number], self.model[number]
        position = len(values)
        if position % 2 == 0:
            self.manager.append(table)
            self.copy_out()
        else:
            copied = self.manager.make_private(table, position // 2)
            self.copy_out()
            if copied is not None:
                source, destination = copied
                self.kv[destination] = self.kv[source]
        values.append(value)
        self.write(number, position, value)

    @precondition(lambda self: self.tables and len(self.tables) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """All of a table, in whichever memory it is, or its first full blocks."""
        number = data.draw(st.integers(0, len(self.tables) - 1))
        parent, values = self.tables[number], self.model[number]
        shared = data.draw(st.none() | st.integers(0, len(values) // 2))
        self.tables.append(self.manager.fork(parent, shared))
        self.model.append(values.copy() if shared is None else values[: 2 * shared])

    @precondition(lambda self: len(self.tables) > 1)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        """A beam dies and a second child of another takes its place: in the pool, or while both are swapped out."""
        dead, parent = data.draw(st.lists(st.integers(0, len(self.tables) - 1), min_size=2, max_size=2, unique=True))
        table = self.manager.fork(self.tables[parent])
        self.manager.free(self.tables[dead])
        self.tables[dead], self.model[dead] = table, self.model[parent].copy()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.tables) - 1))
        self.manager.free(self.tables.pop(number))
        del self.model[number]

    @precondition(lambda self: self.on_device())
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.sampled_from(self.on_device()), min_size=1, max_size=3, unique=True))
        self.move_out(numbers)

    @precondition(lambda self: self.on_device())
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        """Tables go to the arena with the beginning of their tokens that is confirmed, or all of them are freed."""
        numbers = data.draw(st.lists(st.sampled_from(self.on_device()), min_size=1, max_size=3, unique=True))
        for number in numbers:
            self.truncate(number, data.draw(st.integers(0, len(self.model[number]))))
        if not self.move_out(numbers):
            for number in numbers:
                self.manager.free(self.tables[number])
                self.model[number].clear()

    @precondition(lambda self: len(self.on_device()) < len(self.tables))
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        """The last tokens of a table in the arena are taken back. What it shared with others stays theirs."""
        number = data.draw(st.sampled_from(self.away()))
        self.truncate(number, data.draw(st.integers(0, len(self.model[number]))))

    @precondition(lambda self: len(self.on_device()) < len(self.tables))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.sampled_from(self.away()), min_size=1, max_size=3, unique=True))
        tables = [self.tables[number] for number in numbers]
        num_full = [len(self.model[number]) // 2 for number in numbers]
        need, free = self.manager.swap_in_need(tables, num_full), self.manager.num_free
        if need > free:
            return
        moves = self.manager.swap_in(tables, num_full)
        self.copy_out()
        assert self.manager.num_free == free - need
        assert len(set(moves.destinations)) == len(moves)
        for source, destination in zip(moves.sources, moves.destinations, strict=True):
            self.kv[destination] = self.arena[source]

    @precondition(lambda self: self.manager.cache.next_to_clean())
    @rule()
    def clean(self) -> None:
        """Blocks that nobody refers to are copied out before they are needed."""
        free, parked = self.manager.num_free, self.manager.cache.parked
        self.manager.clean()
        self.copy_out()
        assert (self.manager.num_free, self.manager.cache.parked) == (free, parked), "cleaning has given up a block"

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.cached)))
        self.manager.forget([key])
        self.pinned_blocks.discard(key)
        assert self.manager.find_prefix([key]) == []
        assert self.manager.tier.find([key]) == []

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.cached)))
        self.manager.cache.pin([key])
        self.pinned.add(key)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pinned)))
        self.manager.cache.unpin([key])
        self.pinned.remove(key)
        self.pinned_blocks.discard(key)

    @precondition(lambda self: self.pinned_blocks)
    @rule()
    def yield_pinned(self) -> None:
        """A request that fits in no other way goes before pins."""
        num_free, num_set_aside = self.manager.num_free, self.manager.cache.num_set_aside
        assert self.manager.cache.yield_pinned() == (num_set_aside > 0)
        assert self.manager.num_free == num_free + num_set_aside
        self.pinned_blocks.clear()

    @invariant()
    def pinned_blocks_stay(self) -> None:
        cache, find = self.manager.cache, self.manager.find_prefix
        for key in self.pinned_blocks:
            assert find([key]), "a pinned block was given up"
            assert not cache.is_parked(find([key])[0]), "a pinned block may be given up"
        # Those that have yielded are like all others until they have been used again.
        self.pinned_blocks |= {key for key in self.pinned for block in find([key]) if not cache.is_parked(block)}

    @invariant()
    def the_books_balance(self) -> None:
        self.manager.check_integrity(self.tables)
        counts = Counter(block for table in self.tables if not table.on_host for block in table.blocks)
        assert self.manager.num_used == len(counts)

    @invariant()
    def every_table_leads_to_its_own_tokens(self) -> None:
        for table, values in zip(self.tables, self.model, strict=True):
            memory = self.arena if table.on_host else self.kv
            found = [value for block in table.blocks for value in memory[block]]
            assert found[: len(values)] == values

    @invariant()
    def every_cached_block_holds_what_its_key_says(self) -> None:
        for key, values in self.cached.items():
            for block in self.manager.find_prefix([key]):
                assert self.kv[block] == values

    @invariant()
    def every_kept_block_holds_what_its_key_says(self) -> None:
        for key, block in self.manager.tier._block_of.items():
            assert self.arena[block] == self.cached[key]


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
