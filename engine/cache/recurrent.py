"""Slots of recurrent state: who holds them, and which keep the state at a known prefix. Free of torch.

A recurrent layer has no keys and values to share, only its state after the last token. So prefixes are shared through
*checkpoints*: copies of the state as it was at a block boundary, each in a slot of its own, known by the hash of the
block that ends there. A slot is held by a sequence, free, or free and a checkpoint; checkpoints are dropped, least
recently used first, when their slots are needed.

The ledger moves no tensors. It says which slot is to be copied where before the next forward; copies run in the order
in which they were asked for, and before anything of that forward is written. So a slot may be handed on as soon as a
copy from it is in the list: whoever gets it writes it later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.cache.block_pool import BlockPool
from engine.errors import InvalidArgumentError


@dataclass(slots=True)
class HeldState:
    """What one sequence holds.

    Attributes:
        slot: of its running state; 0 before it has one.
        source: checkpoint that its state will be copied from, held until then; 0: none.
        planned: (position, slot) of states that the step under way keeps: after ``position`` tokens, into ``slot``.
        target: tokens that it was to compute when it began; its prompt, and after a preemption its completion too.
        trailing: (position, hash) of its checkpoints that are of use only until a later one is kept.
        snapshot, snapshot_at: slot of the state after ``snapshot_at`` tokens, before drafts; 0: none.
    """

    slot: int = 0
    source: int = 0
    planned: list[tuple[int, int]] = field(default_factory=list)
    target: int = 0
    trailing: list[tuple[int, bytes]] = field(default_factory=list)
    snapshot: int = 0
    snapshot_at: int = 0


class StateSlots:
    """Slots 1 … num_slots - 1, of which sequences and checkpoints live.

    Args:
        num_slots: slots in the state tensors, slot 0 included, which is never handed out.
        max_sequences: sequences that hold a slot at one time; the other slots can hold checkpoints.

    Raises:
        InvalidArgumentError: there are not enough slots for so many sequences.
    """

    def __init__(self, num_slots: int, max_sequences: int) -> None:
        if not 1 <= max_sequences < num_slots:
            raise InvalidArgumentError(
                f"max_sequences is {max_sequences}; accepted: from 1 to the {num_slots - 1} slots", field="num_slots"
            )
        self.num_slots = num_slots
        self.max_sequences = max_sequences
        self.pool = BlockPool(num_slots)
        self._num_holding = 0
        self._copies: list[tuple[int, int]] = []

    @property
    def num_holding(self) -> int:
        """Sequences that hold a slot."""
        return self._num_holding

    @property
    def num_checkpoints(self) -> int:
        """States at known prefixes that no sequence holds."""
        return self.pool.num_cached

    @property
    def has_empty(self) -> bool:
        """Whether there is a slot that holds nothing."""
        return self.pool.num_free > self.pool.num_cached

    def take_copies(self) -> list[tuple[int, int]]:
        """(from, to) of slots to copy before the next forward, in this order."""
        copies, self._copies = self._copies, []
        return copies

    def find(self, block_hash: bytes) -> int | None:
        """The checkpoint at that prefix."""
        return self.pool.lookup(block_hash)

    def pin(self, state: HeldState, checkpoint: int) -> None:
        """The sequence will go on from this checkpoint, which ``find`` just found."""
        assert not state.slot
        assert not state.source
        self.pool.acquire(checkpoint)
        state.source = checkpoint

    def can_enter(self, state: HeldState) -> bool:
        """Whether ``enter`` will succeed."""
        return bool(state.slot) or self._num_holding < self.max_sequences

    def enter(self, state: HeldState) -> None:
        """Gives the sequence its slot, if it has none."""
        if state.slot:
            return
        assert self._num_holding < self.max_sequences
        slots = self.pool.allocate(1)
        if slots is None:
            # Only the checkpoint that it goes on from is left, so that itself becomes its slot.
            assert state.source
            assert self.pool.ref_count(state.source) == 1
            self.pool.forget(state.source)
            state.slot, state.source = state.source, 0
        else:
            state.slot = slots[0]
            if state.source:
                self._copies.append((state.source, state.slot))
                self.pool.release([state.source])
                state.source = 0
        self._num_holding += 1

    def plan(self, state: HeldState, position: int) -> bool:
        """Reserves a slot for the state after ``position`` tokens.

        Returns: False if all slots are held, or could be needed by sequences that may yet come.
        """
        slot = self._spare()
        if slot:
            state.planned.append((position, slot))
        return bool(slot)

    def plan_snapshot(self, state: HeldState, position: int) -> None:
        """The state after ``position`` tokens will be kept for this sequence alone, until ``drop_snapshot``; in the
        slot of its last snapshot if it has one. Where no slot is to spare, there is none."""
        state.snapshot = state.snapshot or self._spare()
        state.snapshot_at = position if state.snapshot else 0

    def drop_snapshot(self, state: HeldState) -> None:
        """Gives the snapshot's slot back."""
        if state.snapshot:
            self.pool.release([state.snapshot])
        state.snapshot = state.snapshot_at = 0

    def _spare(self) -> int:
        """A slot that no sequence holds, nor may need; 0: none."""
        if self.pool.num_free <= self.max_sequences - self._num_holding:
            return 0
        slots = self.pool.allocate(1)
        assert slots is not None
        return slots[0]

    def drop_plans(self, state: HeldState) -> None:
        """The planned states will not be kept."""
        self.pool.release(slot for _, slot in state.planned)
        state.planned.clear()

    def keep(self, state: HeldState, slot: int, block_hash: bytes) -> None:
        """A planned slot now holds the state at that prefix."""
        state.planned = [entry for entry in state.planned if entry[1] != slot]
        self.pool.register(slot, block_hash)
        self.pool.release([slot])

    def restore(self, state: HeldState, slot: int) -> None:
        """The sequence's state becomes that of a checkpoint, or of its snapshot."""
        self._copies.append((slot, state.slot))

    def forget(self, block_hash: bytes) -> None:
        """Nobody finds this checkpoint any more."""
        slot = self.pool.lookup(block_hash)
        if slot is not None:
            self.pool.acquire(slot)
            self.pool.forget(slot)
            self.pool.release([slot])

    def leave(self, state: HeldState) -> None:
        """Takes everything back."""
        self.drop_plans(state)
        self.drop_snapshot(state)
        if state.source:
            self.pool.release([state.source])
            state.source = 0
        if state.slot:
            self.pool.release([state.slot])
            state.slot = 0
            self._num_holding -= 1
