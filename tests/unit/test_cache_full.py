"""The full-attention manager, with a stand-in for the cache tensors that remembers what was written where."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.full import FullAttentionManager
from engine.cache.prefix import root_hash
from engine.errors import InvalidArgumentError

BLOCK_SIZE = 3
NUM_BLOCKS = 9


@dataclass(eq=False)
class Holder:
    """The least that a cache manager needs."""

    token_ids: list[int]
    prefix_root: bytes = root_hash("m")
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)


class Memory:
    """Contents of the cache: at each slot, what its keys and values were computed from."""

    def __init__(self, manager: FullAttentionManager) -> None:
        self.manager = manager
        self.slots: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def slot(self, holder: Holder, position: int) -> int:
        size = self.manager.block_size
        return holder.block_table[position // size] * size + position % size

    def write(self, holder: Holder, count: int) -> None:
        """Computes the next tokens; no block may be written that another holder has."""
        for position in range(holder.num_computed_tokens, holder.num_computed_tokens + count):
            slot = self.slot(holder, position)
            block = slot // self.manager.block_size
            assert self.manager.pool.ref_count(block) == 1, "a shared block is written"
            assert self.manager.pool.hash_of(block) is None, "a findable block is written"
            self.slots[slot] = (holder.prefix_root, tuple(holder.token_ids[: position + 1]))

    def check(self, holder: Holder) -> None:
        """All that counts as computed was computed from this holder's own tokens."""
        for position in range(holder.num_computed_tokens):
            expected = (holder.prefix_root, tuple(holder.token_ids[: position + 1]))
            assert self.slots[self.slot(holder, position)] == expected


def compute(manager: FullAttentionManager, memory: Memory, holder: Holder, count: int) -> None:
    assert manager.allocate(holder, count)
    memory.write(holder, count)
    manager.commit(holder, count)


def manager_and_memory(num_blocks: int = NUM_BLOCKS) -> tuple[FullAttentionManager, Memory]:
    manager = FullAttentionManager(num_blocks, BLOCK_SIZE)
    return manager, Memory(manager)


def test_a_second_sequence_takes_full_blocks_and_leaves_its_last_token() -> None:
    """Hits are whole blocks, and never all of a prompt: its last token's logits are needed."""
    manager, memory = manager_and_memory()
    first = Holder([1, 2, 3, 4, 5, 6])
    compute(manager, memory, first, 6)
    same, longer, other = Holder([1, 2, 3, 4, 5, 6]), Holder([1, 2, 3, 4, 5, 6, 7]), Holder([1, 2, 9, 4, 5, 6, 7])
    assert manager.match_prefix(same) == 3
    assert manager.match_prefix(longer) == 6
    assert manager.match_prefix(other) == 0
    assert longer.block_table == first.block_table


@pytest.mark.parametrize("root", [root_hash("m", b"a"), root_hash("m", b"", "salt"), root_hash("n")])
def test_no_hit_across_roots(root: bytes) -> None:
    """Equal tokens under another adapter, salt or model are not the same prefix."""
    manager, memory = manager_and_memory()
    compute(manager, memory, Holder([1, 2, 3, 4]), 4)
    assert manager.match_prefix(Holder([1, 2, 3, 4], prefix_root=root)) == 0


def test_blocks_of_ended_sequences_stay_findable_until_they_are_needed() -> None:
    """free keeps contents; allocation evicts them when nothing else is left."""
    manager, memory = manager_and_memory(num_blocks=4)
    first = Holder([1, 2, 3, 4])
    compute(manager, memory, first, 4)
    manager.free(first)
    assert manager.num_free_blocks == 3
    again = Holder([1, 2, 3, 4])
    assert manager.match_prefix(again) == 3
    manager.free(again)
    compute(manager, memory, Holder([7] * 9), 9)
    assert manager.match_prefix(Holder([1, 2, 3, 4])) == 0


def test_a_block_counts_as_cached_only_once_it_is_full_and_committed() -> None:
    """Allocated but uncomputed tokens are nobody else's."""
    manager, memory = manager_and_memory()
    first = Holder([1, 2, 3, 4])
    assert manager.allocate(first, 4)
    memory.write(first, 4)
    assert manager.match_prefix(Holder([1, 2, 3, 4])) == 0
    manager.commit(first, 2)
    assert manager.match_prefix(Holder([1, 2, 3, 4])) == 0
    manager.commit(first, 1)
    assert manager.match_prefix(Holder([1, 2, 3, 4])) == 3


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = FullAttentionManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=False)
    compute(manager, Memory(manager), Holder([1, 2, 3, 4]), 4)
    assert manager.match_prefix(Holder([1, 2, 3, 4])) == 0
    assert not manager.shares_prefixes


def test_allocate_changes_nothing_when_it_fails() -> None:
    manager, _ = manager_and_memory(num_blocks=3)
    holder = Holder(list(range(20)))
    assert not manager.allocate(holder, 7)
    assert holder.block_table == []
    assert manager.num_free_blocks == 2
    assert manager.allocate(holder, 6)
    assert manager.allocate(holder, 6), "idempotent"
    assert len(holder.block_table) == 2


def test_rollback_into_a_shared_block_gives_it_up() -> None:
    """The other reader keeps its contents; the one that rolls back computes its part of the block again."""
    manager, memory = manager_and_memory()
    first, second = Holder([1, 2, 3, 4, 5, 6, 7]), Holder([1, 2, 3, 4, 5, 6, 8])
    compute(manager, memory, first, 7)
    assert manager.match_prefix(second) == 6
    assert manager.rollback(second, 1) == 3
    assert second.num_computed_tokens == 3
    second.token_ids[5:] = [9, 9]
    compute(manager, memory, second, 4)
    memory.check(first)
    memory.check(second)


def test_rollback_of_an_own_block_makes_it_unfindable() -> None:
    manager, memory = manager_and_memory()
    holder = Holder([1, 2, 3, 4])
    compute(manager, memory, holder, 3)
    assert manager.rollback(holder, 1) == 1
    assert manager.match_prefix(Holder([1, 2, 3, 4])) == 0


def test_block_size_is_validated() -> None:
    with pytest.raises(InvalidArgumentError, match="block_size is 0"):
        FullAttentionManager(4, 0)


class ManagerMachine(RuleBasedStateMachine):
    """Sequences over a tiny alphabet, so that prefixes are often equal, come, grow, shrink and go."""

    def __init__(self) -> None:
        super().__init__()
        self.manager, self.memory = manager_and_memory()
        self.holders: list[Holder] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(["", "s"]))
    def arrive(self, tokens: list[int], salt: str) -> None:
        holder = Holder(tokens, prefix_root=root_hash("m", b"", salt))
        matched = self.manager.match_prefix(holder)
        assert matched < len(tokens)
        assert matched % BLOCK_SIZE == 0
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), commit=st.booleans())
    def advance(self, data: st.DataObject, commit: bool) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        count = data.draw(st.integers(0, len(holder.token_ids) - holder.num_computed_tokens))
        needed, free = self.manager.blocks_needed(holder, count), self.manager.num_free_blocks
        assert self.manager.allocate(holder, count) == (needed <= free)
        if needed <= free:
            self.memory.write(holder, count)
            if commit:
                self.manager.commit(holder, count)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        data.draw(st.sampled_from(self.holders)).token_ids.append(token)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(0, 1))
    def shrink(self, data: st.DataObject, token: int) -> None:
        """Takes computed tokens back and replaces them by others."""
        holder = data.draw(st.sampled_from(self.holders))
        count = data.draw(st.integers(0, holder.num_computed_tokens))
        before = holder.num_computed_tokens
        taken = self.manager.rollback(holder, count)
        assert count <= taken < count + BLOCK_SIZE
        assert holder.num_computed_tokens == before - taken
        if count:
            holder.token_ids[before - count :] = [token]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.manager.free(holder)
        self.manager.free(holder)
        assert holder.block_table == []
        assert holder.num_computed_tokens == 0
        self.holders.remove(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """One holder's contents turn out to be faulty: they may be held still, but not found."""
        holder = data.draw(st.sampled_from(self.holders))
        faulty = list(holder.block_table)
        self.manager.discard(holder)
        assert all(self.manager.pool.hash_of(block) is None for block in faulty)
        self.holders.remove(holder)

    @invariant()
    def contents_are_right(self) -> None:
        for holder in self.holders:
            self.memory.check(holder)

    @invariant()
    def references_are_right(self) -> None:
        tables = [block for holder in self.holders for block in holder.block_table]
        pool = self.manager.pool
        assert all(pool.ref_count(block) == tables.count(block) for block in range(NUM_BLOCKS))
        assert self.manager.usage == pytest.approx(len(set(tables)) / pool.capacity)

    def teardown(self) -> None:
        for holder in self.holders:
            self.manager.free(holder)
        assert self.manager.num_free_blocks == NUM_BLOCKS - 1


ManagerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestManager = ManagerMachine.TestCase
