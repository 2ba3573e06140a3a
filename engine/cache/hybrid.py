"""The cache of hybrids: blocks for attention layers and a slot of recurrent state, for each sequence both or neither.

A prefix is found only as far as both kinds hold it: the blocks up to a boundary, and a checkpoint of the state at that
boundary. Checkpoints are taken on the way, within the step that crosses the boundary: at the last boundary from which a
request with the same prompt can go on, and at every ``checkpoint_interval`` blocks.
"""

from __future__ import annotations

from engine.cache.base import CachedSequence, CacheManager
from engine.cache.block_pool import BlockPool
from engine.cache.full import FullAttentionManager
from engine.cache.recurrent import HeldState, StateSlots
from engine.errors import InvalidArgumentError


class HybridManager(CacheManager):
    """Composes the managers of both kinds behind one interface.

    A step advances a state by all its tokens or not at all, so ``commit`` takes exactly the tokens that were allocated
    last; rejected ones are rolled back after it. A step that failed midway leaves states that nobody can tell the age
    of: its sequences are to be discarded, not run again.

    Args:
        num_blocks, block_size: of the attention cache.
        num_slots, max_sequences: see StateSlots.
        checkpoint_interval: blocks between checkpoints on the way; 0: only at the end of prompts.
        enable_prefix_caching: False: nothing is shared, and no checkpoint is taken.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        max_sequences: int,
        *,
        checkpoint_interval: int = 0,
        enable_prefix_caching: bool = True,
    ) -> None:
        if checkpoint_interval < 0:
            raise InvalidArgumentError(
                f"checkpoint_interval is {checkpoint_interval}; accepted: at least 0", field="checkpoint_interval"
            )
        self.blocks = FullAttentionManager(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.slots = StateSlots(num_slots, max_sequences)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._interval = checkpoint_interval * block_size
        self._states: dict[int, HeldState] = {}  # by id of the sequence, from first touch to free
        self._scheduled: dict[int, int] = {}

    @property
    def pool(self) -> BlockPool:
        """The attention blocks."""
        return self.blocks.pool

    def state_slot(self, sequence: CachedSequence) -> int:
        """The slot of a sequence that has room."""
        return self._states[id(sequence)].slot

    def planned_states(self, sequence: CachedSequence) -> list[tuple[int, int]]:
        """(position, slot): the step under way is to store the state after ``position`` tokens in ``slot``."""
        return self._states[id(sequence)].planned

    def match_prefix(self, sequence: CachedSequence) -> int:
        assert id(sequence) not in self._states, "match_prefix comes before anything else"
        self.blocks.match_prefix(sequence)
        for count in range(len(sequence.block_table), 0, -1):
            checkpoint = self.slots.find(self.blocks.block_hash(sequence, count - 1))
            if checkpoint is not None:
                break
        else:
            count, checkpoint = 0, None
        self.blocks.pool.release(reversed(sequence.block_table[count:]))
        del sequence.block_table[count:]
        sequence.num_computed_tokens = count * self.block_size
        if checkpoint is not None:
            self.slots.pin(self._state(sequence), checkpoint)
        return sequence.num_computed_tokens

    def allocate(self, sequence: CachedSequence, num_tokens: int) -> bool:
        state = self._states.get(id(sequence)) or HeldState()
        if not self.slots.can_enter(state) or not self.blocks.allocate(sequence, num_tokens):
            return False
        if not state.slot:
            self._states[id(sequence)] = state
            state.target = len(sequence.token_ids)
            self.slots.enter(state)
        self._scheduled[id(sequence)] = num_tokens
        self._plan(sequence, state, num_tokens)
        return True

    def commit(self, sequence: CachedSequence, num_tokens: int) -> None:
        state = self._states[id(sequence)]
        scheduled = self._scheduled.pop(id(sequence), None)
        assert num_tokens == scheduled, f"{num_tokens} tokens committed of {scheduled}; a state has no middle"
        self.blocks.commit(sequence, num_tokens)
        for position, slot in list(state.planned):
            self.slots.keep(state, slot, self.blocks.block_hash(sequence, position // self.block_size - 1))

    def rollback(self, sequence: CachedSequence, num_tokens: int) -> int:
        """Goes back to the last checkpoint that is early enough, or to the start; what lies between is replayed."""
        before = sequence.num_computed_tokens
        assert 0 <= num_tokens <= before, f"cannot take back {num_tokens} of {before} computed tokens"
        if num_tokens == 0:
            return 0
        state = self._states[id(sequence)]
        self.slots.drop_plans(state)
        after = 0
        if self.shares_prefixes:
            for count in range((before - num_tokens) // self.block_size, 0, -1):
                checkpoint = self.slots.find(self.blocks.block_hash(sequence, count - 1))
                if checkpoint is not None:
                    after = count * self.block_size
                    self.slots.restore(state, checkpoint)
                    break
        taken = self.blocks.rollback(sequence, before - after)
        assert taken == before - after, "a block boundary is nobody else's middle"
        return taken

    def free(self, sequence: CachedSequence) -> None:
        state = self._states.pop(id(sequence), None)
        self._scheduled.pop(id(sequence), None)
        if state is not None:
            self.slots.leave(state)
        self.blocks.free(sequence)

    def discard(self, sequence: CachedSequence) -> None:
        if self.shares_prefixes:
            for block_hash in sequence.block_hashes:
                self.slots.forget(block_hash)
        self.blocks.discard(sequence)
        self.free(sequence)

    def blocks_needed(self, sequence: CachedSequence, num_tokens: int) -> int:
        return self.blocks.blocks_needed(sequence, num_tokens)

    @property
    def max_sequence_tokens(self) -> int:
        return self.blocks.max_sequence_tokens

    @property
    def num_free_blocks(self) -> int:
        return self.blocks.num_free_blocks

    @property
    def usage(self) -> float:
        return self.blocks.usage

    @property
    def shares_prefixes(self) -> bool:
        return self.blocks.shares_prefixes

    def _state(self, sequence: CachedSequence) -> HeldState:
        return self._states.setdefault(id(sequence), HeldState())

    def _plan(self, sequence: CachedSequence, state: HeldState, num_tokens: int) -> None:
        """Reserves slots for the checkpoints that lie within the next ``num_tokens`` tokens, the last first: it
        saves the most."""
        self.slots.drop_plans(state)
        if not self.shares_prefixes:
            return
        start = sequence.num_computed_tokens
        end = start + num_tokens
        positions = set()
        last = (state.target - 1) // self.block_size * self.block_size
        if start < last <= end:
            positions.add(last)
        if self._interval:
            positions.update(range(start // self._interval * self._interval + self._interval, end + 1, self._interval))
        for position in sorted(positions, reverse=True):
            known = self.slots.find(self.blocks.block_hash(sequence, position // self.block_size - 1))
            if known is None and not self.slots.plan(state, position):
                break
