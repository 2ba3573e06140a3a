"""The cache of hybrids: blocks for attention layers and a slot of recurrent state, for each sequence both or neither.

A prefix is found only as far as both kinds hold it: the blocks up to a boundary, and a checkpoint of the state at that
boundary. Checkpoints are taken on the way, within the step that crosses the boundary: at the last boundary from which a
request with the same prompt can go on, at every ``checkpoint_interval`` blocks, and at the last boundary of a
completion, from which the next turn of a chat goes on. As nobody knows beforehand where a completion ends, each
boundary in its course gets one, which goes when the next is kept.

A state has no middle, so drafts that are rejected cost more than in attention, where they are just forgotten. Within
the step that computes drafts, the state before the first of them is kept in a slot of the sequence's own, its snapshot;
``rollback`` returns to it, and the accepted drafts are computed again, with the tokens of the next step. Where no slot
is to spare, it goes back to the last checkpoint, at most a block before, and more is computed again.
``python -m tests.bench.draft_rollback``: with 4 drafts, each right with chance 0.7, a layer of Qwen3.5-0.8B's shape
took 1.10 times as long where the slot was copied aside before each step, and 1.07 times from checkpoints alone; they
computed 2.1 and 1.9 times as many rows. At the tiny test shape, where rows cost little, the snapshot was slower by a
tenth.
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
    last; rejected drafts are rolled back after it. A step that failed midway leaves states that nobody can tell the age
    of: its sequences are to be discarded, not run again.

    Args:
        num_blocks, block_size: of the attention cache.
        num_slots, max_sequences: see StateSlots.
        checkpoint_interval: blocks between checkpoints on the way; 0: only at the ends of prompts and completions.
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
        self._scheduled: dict[int, tuple[int, int]] = {}  # tokens, and drafts among them

    @property
    def pool(self) -> BlockPool:
        """The attention blocks."""
        return self.blocks.pool

    def state_slot(self, sequence: CachedSequence) -> int:
        """The slot of a sequence that has room."""
        return self._states[id(sequence)].slot

    def planned_states(self, sequence: CachedSequence) -> list[tuple[int, int]]:
        """(position, slot): the step under way is to store the state after ``position`` tokens in ``slot``."""
        state = self._states[id(sequence)]
        is_due = state.snapshot_at > sequence.num_computed_tokens
        return [*state.planned, *([(state.snapshot_at, state.snapshot)] if is_due else [])]

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

    def allocate(self, sequence: CachedSequence, num_tokens: int, num_drafts: int = 0) -> bool:
        assert 0 <= num_drafts < num_tokens, f"{num_drafts} drafts of {num_tokens} tokens"
        self._unschedule(sequence)
        state = self._states.get(id(sequence)) or HeldState()
        if not self.slots.can_enter(state) or not self.blocks.allocate(sequence, num_tokens):
            return False
        if not state.slot:
            self._states[id(sequence)] = state
            state.target = len(sequence.token_ids)
            self.slots.enter(state)
        self._scheduled[id(sequence)] = (num_tokens, num_drafts)
        if num_drafts:
            self.slots.plan_snapshot(state, sequence.num_computed_tokens + num_tokens - num_drafts)
        else:
            self.slots.drop_snapshot(state)
        self._plan(sequence, state, num_tokens, num_drafts)
        return True

    def commit(self, sequence: CachedSequence, num_tokens: int) -> None:
        state = self._states[id(sequence)]
        scheduled, num_drafts = self._scheduled.pop(id(sequence), (0, 0))
        assert num_tokens == scheduled, f"{num_tokens} tokens committed of {scheduled}; a state has no middle"
        self.blocks.commit(sequence, num_tokens)
        for position, slot in sorted(state.planned):
            block_hash = self.blocks.block_hash(sequence, position // self.block_size - 1)
            self.slots.keep(state, slot, block_hash)
            if not self._lasts(state, position):
                state.trailing.append((position, block_hash))
        # What ends in a draft may yet be taken back, and the one before it be the last again.
        certain = sequence.num_computed_tokens - num_drafts
        settled = [entry for entry in state.trailing if entry[0] <= certain]
        for entry in settled[:-1]:
            self.slots.forget(entry[1])
            state.trailing.remove(entry)

    def rollback(self, sequence: CachedSequence, num_tokens: int) -> int:
        """Goes back to the last snapshot or checkpoint that is early enough, or to the start; what lies between is
        replayed: after drafts, those of them that were accepted."""
        before = sequence.num_computed_tokens
        assert 0 <= num_tokens <= before, f"cannot take back {num_tokens} of {before} computed tokens"
        if num_tokens == 0:
            return 0
        state = self._states[id(sequence)]
        self.slots.drop_plans(state)
        after, slot = self._last_state(sequence, state, before - num_tokens)
        if slot:
            self.slots.restore(state, slot)
        if after < state.snapshot_at:
            self.slots.drop_snapshot(state)
        while state.trailing and state.trailing[-1][0] > before - num_tokens:
            self.slots.forget(state.trailing.pop()[1])
        taken = self.blocks.rollback(sequence, before - after)
        assert taken == before - after, "a block that is written again is nobody else's"
        return taken

    def _last_state(self, sequence: CachedSequence, state: HeldState, num_tokens: int) -> tuple[int, int]:
        """The latest known state of the leading tokens, at most ``num_tokens`` of them: how many, and its slot; (0, 0):
        none."""
        at = state.snapshot_at
        if not at or at > num_tokens or not self._may_write(sequence, at):
            at = 0
        if self.shares_prefixes:
            for count in range(num_tokens // self.block_size, at // self.block_size, -1):
                checkpoint = self.slots.find(self.blocks.block_hash(sequence, count - 1))
                if checkpoint is not None:
                    return count * self.block_size, checkpoint
        return (at, state.snapshot) if at else (0, 0)

    def _may_write(self, sequence: CachedSequence, position: int) -> bool:
        """Whether the sequence can go on from there without writing into a block that others read."""
        if position % self.block_size == 0:
            return True
        return self.blocks.pool.ref_count(sequence.block_table[position // self.block_size]) == 1

    def free(self, sequence: CachedSequence) -> None:
        state = self._states.pop(id(sequence), None)
        self._unschedule(sequence)
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

    def _unschedule(self, sequence: CachedSequence) -> None:
        """The tokens allocated last are not computed; of drafts among them the hashes go, for others may follow."""
        num_tokens, num_drafts = self._scheduled.pop(id(sequence), (0, 0))
        if num_drafts:
            certain = sequence.num_computed_tokens + num_tokens - num_drafts
            del sequence.block_hashes[certain // self.block_size :]

    def _lasts(self, state: HeldState, position: int) -> bool:
        """Whether a checkpoint at this boundary is of use for as long as there is room."""
        at_prompt_end = position == (state.target - 1) // self.block_size * self.block_size
        return at_prompt_end or bool(self._interval and position % self._interval == 0)

    def _plan(self, sequence: CachedSequence, state: HeldState, num_tokens: int, num_drafts: int) -> None:
        """Reserves slots for the checkpoints that lie within the next ``num_tokens`` tokens, the last first: it
        saves the most."""
        self.slots.drop_plans(state)
        if not self.shares_prefixes:
            return
        start = sequence.num_computed_tokens
        end = start + num_tokens
        first = (start // self.block_size + 1) * self.block_size
        positions = {p for p in range(first, end + 1, self.block_size) if self._lasts(state, p)}
        if end >= state.target and (boundary := end // self.block_size * self.block_size) >= first:
            positions.add(boundary)
            if boundary <= end - num_drafts and not self.slots.has_empty:
                for _, block_hash in state.trailing:  # its slot rather than another sequence's checkpoint
                    self.slots.forget(block_hash)
                state.trailing.clear()
        for position in sorted(positions, reverse=True):
            known = None
            if position <= len(sequence.token_ids):  # else the block ends in a token that is under way
                known = self.slots.find(self.blocks.block_hash(sequence, position // self.block_size - 1))
            if known is None and not self.slots.plan(state, position):
                break
