"""Blocks of the attention cache: who holds them, which are free, and which still hold a known prefix.

A block is in exactly one of three places: held by one or more sequences (reference count > 0), free, or free and
cached. A cached block keeps its contents under its hash until the pool needs it for something else, least recently
used first. The pool counts; it never touches the tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from engine.errors import InvalidArgumentError

NULL_BLOCK = 0
"""Never handed out. Block tables are padded with it, and it stands for positions that no layer reads any more."""


class BlockPool:
    """Reference-counted blocks 1 … num_blocks - 1.

    Args:
        num_blocks: blocks in the cache tensors, the null block included; at least 2.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise InvalidArgumentError(
                f"num_blocks is {num_blocks}; accepted: at least 2, as block {NULL_BLOCK} is reserved",
                field="num_blocks",
            )
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # popped from the end: low blocks first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def capacity(self) -> int:
        """Blocks that sequences can hold."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.capacity - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks that still hold a known prefix."""
        return len(self._cached)

    def ref_count(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block]

    def hash_of(self, block: int) -> bytes | None:
        """The hash under which ``lookup`` finds the block; None if it does not."""
        return self._hashes[block]

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with these contents, held or free."""
        return self._by_hash.get(block_hash)

    def acquire(self, block: int) -> None:
        """One more sequence holds this block, which ``lookup`` just found."""
        assert self._hashes[block] is not None, f"block {block} has no known contents"
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Blocks for new contents, each held once; evicts cached blocks as needed.

        Returns: None, with nothing changed, if fewer than ``count`` are free.
        """
        if count > self.num_free:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.forget(block)
        self._ref_counts[block] = 1
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """One sequence fewer holds each of these; null blocks are passed over.

        Of blocks that become free at once, the first given is the first to be evicted: give the end of a sequence
        before its beginning, which more others may share.
        """
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            assert self._ref_counts[block] > 0, f"block {block} is released but not held"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Makes a held, fully computed block known by its hash.

        If another block has this hash already (two sequences computed the same prefix side by side), that one stays
        the known one.
        """
        assert self._ref_counts[block] > 0, f"block {block} is registered but not held"
        assert self._hashes[block] is None, f"block {block} is registered twice"
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hashes[block] = block_hash

    def forget(self, block: int) -> None:
        """``lookup`` no longer finds the block, so its contents may change. It must not be free and cached."""
        assert block not in self._cached
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block] = None
