"""The cache of full attention: every token of a sequence stays, in blocks, until the sequence ends.

One block table serves all attention layers of a model. Layers with a sliding window can use it too: they mask what
has left the window.
"""

from __future__ import annotations

from engine.cache.base import CachedSequence, CacheManager
from engine.cache.block_pool import BlockPool
from engine.cache.prefix import block_hash as hash_block
from engine.errors import InvalidArgumentError


class FullAttentionManager(CacheManager):
    """Blocks of keys and values, shared among sequences with equal prefixes.

    Only full blocks are shared and a sequence writes only behind its computed tokens, so a block is never written
    while another sequence can see it.

    Args:
        num_blocks: blocks in the cache tensors, the null block included.
        block_size: tokens per block.
        enable_prefix_caching: False: nothing is shared.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if block_size < 1:
            raise InvalidArgumentError(f"block_size is {block_size}; accepted: at least 1", field="block_size")
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks)
        self._enable_prefix_caching = enable_prefix_caching

    def match_prefix(self, sequence: CachedSequence) -> int:
        assert not sequence.block_table, "match_prefix comes before anything else"
        if not self._enable_prefix_caching:
            return 0
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self.pool.lookup(self.block_hash(sequence, index))
            if block is None:
                break
            self.pool.acquire(block)
            sequence.block_table.append(block)
        sequence.num_computed_tokens = len(sequence.block_table) * self.block_size
        return sequence.num_computed_tokens

    def allocate(self, sequence: CachedSequence, num_tokens: int, num_drafts: int = 0) -> bool:
        needed = self.blocks_needed(sequence, num_tokens)
        if needed == 0:  # most decoded tokens
            return True
        blocks = self.pool.allocate(needed)
        if blocks is None:
            return False
        sequence.block_table.extend(blocks)
        return True

    def commit(self, sequence: CachedSequence, num_tokens: int) -> None:
        before, after = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        assert after <= len(sequence.token_ids), "only tokens that are known can be computed"
        assert after <= len(sequence.block_table) * self.block_size, "commit without room"
        sequence.num_computed_tokens = after
        if self._enable_prefix_caching:
            for index in range(before // self.block_size, after // self.block_size):
                self.pool.register(sequence.block_table[index], self.block_hash(sequence, index))

    def rollback(self, sequence: CachedSequence, num_tokens: int) -> int:
        before = sequence.num_computed_tokens
        assert 0 <= num_tokens <= before, f"cannot take back {num_tokens} of {before} computed tokens"
        after = before - num_tokens
        keep = -(-after // self.block_size)
        if num_tokens and after % self.block_size:
            last = sequence.block_table[keep - 1]
            if self.pool.ref_count(last) > 1:
                # Others read this block: leave it to them, and compute our part of it again in a block of our own.
                keep -= 1
                after = keep * self.block_size
            else:
                self.pool.forget(last)
        self.pool.release(reversed(sequence.block_table[keep:]))
        del sequence.block_table[keep:]
        del sequence.block_hashes[after // self.block_size :]
        sequence.num_computed_tokens = after
        return before - after

    def free(self, sequence: CachedSequence) -> None:
        self.pool.release(reversed(sequence.block_table))
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def discard(self, sequence: CachedSequence) -> None:
        for block in sequence.block_table:
            self.pool.forget(block)
        self.free(sequence)

    def blocks_needed(self, sequence: CachedSequence, num_tokens: int) -> int:
        total = -(-(sequence.num_computed_tokens + num_tokens) // self.block_size)
        return max(0, total - len(sequence.block_table))

    @property
    def max_sequence_tokens(self) -> int:
        return self.pool.capacity * self.block_size

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def usage(self) -> float:
        return self.pool.num_used / self.pool.capacity

    @property
    def shares_prefixes(self) -> bool:
        return self._enable_prefix_caching

    def block_hash(self, sequence: CachedSequence, index: int) -> bytes:
        """Hash of full block ``index``; extends the chain that the sequence carries, so each is computed once."""
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else sequence.prefix_root
            hashes.append(hash_block(parent, sequence.token_ids[start : start + self.block_size]))
        return hashes[index]
