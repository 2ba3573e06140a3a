"""The block pool against a simple model of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.block_pool import NULL_BLOCK, BlockPool
from engine.errors import InvalidArgumentError

NUM_BLOCKS = 7


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, name and give back blocks at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[int] = []  # one entry per hold
        self.named: dict[bytes, int] = {}
        self.next_name = 0

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is None:
            assert self.pool.num_free == free
            return
        assert len(set(blocks)) == count
        assert NULL_BLOCK not in blocks
        assert not set(blocks) & set(self.held)
        for block in blocks:
            assert self.pool.hash_of(block) is None, "new contents under an old name"
            self.named = {key: value for key, value in self.named.items() if value != block}
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release([NULL_BLOCK, block])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), again=st.booleans())
    def register(self, data: st.DataObject, again: bool) -> None:
        block = data.draw(st.sampled_from(self.held))
        if self.pool.hash_of(block) is not None:
            return
        if again and self.named:
            taken = data.draw(st.sampled_from(sorted(self.named)))
            self.pool.register(block, taken)
            assert self.pool.hash_of(block) is None
        else:
            self.pool.register(block, name(self.next_name))
            self.named[name(self.next_name)] = block
            self.next_name += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.forget(block)
        self.named = {key: value for key, value in self.named.items() if value != block}

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.named)))
        block = self.pool.lookup(key)
        assert block == self.named[key]
        assert block is not None
        self.pool.acquire(block)
        self.held.append(block)

    @invariant()
    def counts_agree(self) -> None:
        holds = Counter(self.held)
        assert all(self.pool.ref_count(block) == holds[block] for block in range(NUM_BLOCKS))
        assert self.pool.num_used == len(holds)
        assert self.pool.num_free == self.pool.capacity - len(holds)
        assert self.pool.num_cached == len(set(self.named.values()) - set(holds))
        for key, block in self.named.items():
            assert self.pool.lookup(key) == block

    def teardown(self) -> None:
        self.pool.release(self.held)
        assert self.pool.num_free == self.pool.capacity


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_eviction_is_least_recently_used_and_ends_before_beginnings() -> None:
    """A sequence's last block goes first; a prefix that was hit again outlives one that was not."""
    pool = BlockPool(5)
    a = pool.allocate(2)
    b = pool.allocate(2)
    assert a is not None
    assert b is not None
    for number, block in enumerate(a + b):
        pool.register(block, name(number))
    pool.release(reversed(a))
    pool.release(reversed(b))
    pool.acquire(a[0])
    pool.release([a[0]])
    evicted = []
    for _ in range(4):
        before = {number for number in range(4) if pool.lookup(name(number)) is not None}
        assert pool.allocate(1) is not None
        evicted += [n for n in before if pool.lookup(name(n)) is None]
    assert evicted == [1, 3, 2, 0]


def test_free_blocks_go_before_cached_ones() -> None:
    """Nothing known is evicted while a block without known contents is free."""
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.register(blocks[0], name(0))
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[1]]
    assert pool.lookup(name(0)) == blocks[0]


def test_a_pool_needs_a_block_beside_the_null_block() -> None:
    with pytest.raises(InvalidArgumentError, match="num_blocks is 1"):
        BlockPool(1)
