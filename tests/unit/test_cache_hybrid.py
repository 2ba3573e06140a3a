"""The cache of hybrids under random traffic and by example, with stand-ins for states whose value tells what they are
the state of: a checkpoint or a slot that is shared, dropped, copied or written wrongly is seen."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from engine.cache.hybrid import HybridManager
from engine.cache.recurrent import StateSlots
from engine.core.scheduled import ScheduledBatch
from engine.core.sequence import Sequence
from engine.errors import InternalError, InvalidArgumentError
from tests.unit.test_scheduler_properties import (
    BLOCK_SIZE,
    CASES,
    MAX_RUNNING,
    Content,
    Manager,
    Model,
    SchedulerMachine,
    content_of,
)


class HybridModel(Model):
    """Runs batches on blocks and slots."""

    def __init__(self, manager: HybridManager) -> None:
        super().__init__(manager)
        self.hybrid = manager
        self.states: dict[int, Content] = {}

    def forward(self, batch: ScheduledBatch) -> dict[Sequence, list[int]]:
        """Copies first, then each state goes on from what its slot holds, as the layers do it."""
        for source, target in self.hybrid.slots.take_copies():
            self.states[target] = self.states[source]
        written: set[int] = set()
        for entry in batch.entries:
            sequence = entry.sequence
            slot, start = self.hybrid.state_slot(sequence), sequence.num_computed_tokens
            weights = self.weights[sequence]
            if start:
                assert self.states[slot] == content_of(weights, sequence.token_ids[:start]), "another state"
            ends = [(start + entry.num_tokens, slot), *self.hybrid.planned_states(sequence)]
            for position, target in ends:
                assert start < position <= start + entry.num_tokens
                assert target not in written, "two states in one slot"
                written.add(target)
                self.states[target] = content_of(weights, sequence.token_ids[:position])
        return super().forward(batch)


class HybridMachine(SchedulerMachine):
    """Few blocks, few slots: preemption, eviction of checkpoints, failures."""

    num_slots = 7
    interval = 2
    budget = 2 * MAX_RUNNING  # so that as many run as may hold slots

    def make(self) -> tuple[Manager, Model]:
        manager = HybridManager(
            self.num_blocks,
            BLOCK_SIZE,
            self.num_slots,
            MAX_RUNNING,
            checkpoint_interval=self.interval,
            enable_prefix_caching=self.prefix_caching,
        )
        return manager, HybridModel(manager)

    def failed(self, batch: ScheduledBatch) -> None:
        """The states of a failed step are spoilt, and so its sequences end, as the runner ends them."""
        assert isinstance(self.model, HybridModel)
        assert isinstance(self.manager, HybridManager)
        for entry in batch.entries:
            for _, slot in [(0, self.manager.state_slot(entry.sequence)), *self.manager.planned_states(entry.sequence)]:
                self.model.states[slot] = b"spoilt"
            self.scheduler.finish(entry.sequence, "error", InternalError("the step failed"))

    def teardown(self) -> None:
        super().teardown()
        assert isinstance(self.manager, HybridManager)
        assert self.manager.slots.num_holding == 0
        assert self.manager.slots.pool.num_free == self.num_slots - 1, "slots leak"
        assert not self.manager._states, "a sequence is remembered after its end"


class RoomyHybridMachine(HybridMachine):
    """Blocks and slots enough for all, a checkpoint at every block."""

    num_blocks = 200
    num_slots = 100
    interval = 1
    budget = 20


class NoSpareSlotMachine(HybridMachine):
    """One slot more than may run: the next to go on from the only checkpoint takes it over."""

    num_slots = MAX_RUNNING + 2
    interval = 0


class UnsharedHybridMachine(HybridMachine):
    """No prefix caching, and so no checkpoint."""

    num_slots = MAX_RUNNING + 1
    prefix_caching = False


HybridMachine.TestCase.settings = CASES
RoomyHybridMachine.TestCase.settings = CASES
NoSpareSlotMachine.TestCase.settings = CASES
UnsharedHybridMachine.TestCase.settings = CASES
TestTightHybrid = HybridMachine.TestCase
TestRoomyHybrid = RoomyHybridMachine.TestCase
TestNoSpareSlot = NoSpareSlotMachine.TestCase
TestUnsharedHybrid = UnsharedHybridMachine.TestCase


@dataclass(eq=False)
class Holder:
    """A sequence, as far as a cache manager sees it."""

    token_ids: list[int]
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prefix_root: bytes = b"root"
    block_hashes: list[bytes] = field(default_factory=list)


class Runner:
    """Steps of single sequences; a state is the tokens that it is of."""

    def __init__(self, manager: HybridManager) -> None:
        self.manager = manager
        self.states: dict[int, tuple[int, ...]] = {}

    def step(self, holder: Holder, count: int) -> None:
        manager, start = self.manager, holder.num_computed_tokens
        assert manager.allocate(holder, count)
        for source, target in manager.slots.take_copies():
            self.states[target] = self.states[source]
        slot = manager.state_slot(holder)
        if start:
            assert self.states[slot] == tuple(holder.token_ids[:start])
        for position, target in [(start + count, slot), *manager.planned_states(holder)]:
            self.states[target] = tuple(holder.token_ids[:position])
        manager.commit(holder, count)


def test_a_prefix_is_found_as_far_as_both_kinds_hold_it() -> None:
    """Blocks without a checkpoint at their end, or a checkpoint without its blocks, are no hit."""
    manager = HybridManager(40, 4, 12, 4, checkpoint_interval=2)
    runner = Runner(manager)
    first = Holder(list(range(27)))
    assert manager.match_prefix(first) == 0
    runner.step(first, 27)
    assert manager.slots.num_checkpoints == 3  # after 8, 16 and 24 tokens
    for length, expected in ((28, 24), (27, 24), (25, 24), (24, 16), (17, 16), (16, 8), (9, 8), (8, 0)):
        other = Holder(list(range(length)))
        assert manager.match_prefix(other) == expected
        assert len(other.block_table) == expected // 4
        manager.free(other)
    other = Holder([*range(15), 99, *range(16, 27)])
    assert manager.match_prefix(other) == 8
    runner.step(other, 19)
    manager.free(other)
    hashes = list(first.block_hashes)
    assert sum(manager.slots.find(h) is not None for h in hashes) == 3
    manager.discard(first)
    assert all(manager.slots.find(h) is None for h in hashes), "found once the blocks are computed again"
    assert manager.match_prefix(Holder(list(range(27)))) == 0


def test_checkpoints_give_way_to_sequences() -> None:
    """Checkpoints fill what is free, are dropped least recently used first, and never keep a sequence out."""
    manager = HybridManager(100, 2, 6, 3, checkpoint_interval=1)
    runner = Runner(manager)
    holders = [Holder([100 * i + j for j in range(12)]) for i in range(3)]
    for holder in holders:
        assert manager.match_prefix(holder) == 0
        runner.step(holder, 12)
    assert manager.slots.num_holding == 3
    assert manager.slots.num_checkpoints == 2
    outsider = Holder([7] * 4)
    assert not manager.allocate(outsider, 4)
    assert not outsider.block_table
    for holder in holders:
        manager.free(holder)
    assert manager.slots.pool.num_free == 5


@pytest.mark.parametrize("seed", range(20))
def test_rollback_goes_back_to_a_state_that_is_known(seed: int) -> None:
    """Random steps of several tokens of which some are rejected: after each rollback the state is that of the tokens
    that still count, and no more is taken back than to the checkpoint before."""
    rng = random.Random(seed)
    interval = rng.choice([0, 1, 2])
    sharing = rng.random() < 0.8
    manager = HybridManager(200, 4, 40, 2, checkpoint_interval=interval, enable_prefix_caching=sharing)
    runner = Runner(manager)
    holder = Holder([rng.randrange(50) for _ in range(rng.randrange(1, 30))])
    for _ in range(30):
        while holder.num_computed_tokens < len(holder.token_ids):
            left = len(holder.token_ids) - holder.num_computed_tokens
            runner.step(holder, rng.randint(1, left))
        if rng.random() < 0.5 and len(holder.token_ids) > 1:
            rejected = rng.randint(1, min(6, len(holder.token_ids) - 1))
            before = holder.num_computed_tokens
            taken = manager.rollback(holder, rejected)
            assert taken >= rejected
            assert holder.num_computed_tokens == before - taken
            if interval and sharing and before - rejected >= 4 * interval:
                assert before - taken >= (before - rejected) // (4 * interval) * 4 * interval
            del holder.token_ids[before - rejected :]
        holder.token_ids += [rng.randrange(50) for _ in range(rng.randrange(1, 6))]
    manager.free(holder)
    assert manager.slots.num_holding == 0
    assert manager.slots.pool.num_used == 0


@pytest.mark.parametrize("ends", ["free", "allocate"])
def test_drafts_that_no_step_computed_leave_no_name(ends: str) -> None:
    """Room for drafts, and a preemption or other tokens in place of the step: the contents that come instead are not
    found under the drafts' hashes."""
    manager = HybridManager(40, 4, 12, 4)
    runner = Runner(manager)
    holder = Holder(list(range(7)))
    assert manager.match_prefix(holder) == 0
    runner.step(holder, 6)
    holder.token_ids += [50, 51, 52]
    assert manager.allocate(holder, 4, 3)
    if ends == "free":
        manager.free(holder)
    del holder.token_ids[7:]
    holder.token_ids += [60, 61, 62]
    if ends == "free":
        manager.match_prefix(holder)
    runner.step(holder, 10 - holder.num_computed_tokens)
    for token, expected in ((50, 4), (60, 8)):
        other = Holder([*range(7), token, 99])
        assert manager.match_prefix(other) == expected
        manager.free(other)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        StateSlots(4, 4)
    with pytest.raises(InvalidArgumentError):
        HybridManager(4, 4, 4, 2, checkpoint_interval=-1)
