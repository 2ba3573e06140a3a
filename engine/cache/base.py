"""What every cache manager answers, whatever it keeps.

The scheduler drives a sequence through its cache with five calls:

    match_prefix    take what others have computed of the same tokens
    allocate        make room for the tokens of the next step
    commit          these tokens are computed; what became complete may be shared
    rollback        take computed tokens back (rejected drafts)
    free            give everything back; shared contents stay findable

Between ``allocate`` and ``commit`` nothing of the step is visible to others, so a step that failed can simply be run
again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class CachedSequence(Protocol):
    """What a cache manager needs of a sequence (engine.core.sequence.Sequence).

    Attributes:
        token_ids: prompt and completion so far.
        num_computed_tokens: leading tokens whose contents are in the cache. Only the manager changes it.
        block_table: the blocks of tokens [0, P), [P, 2P) …, P the block size. Only the manager changes it.
        prefix_root: what besides tokens must be equal for contents to be equal (engine.cache.prefix.root_hash).
        block_hashes: of the leading full blocks, as far as known. Only the manager changes it.
    """

    token_ids: list[int]
    num_computed_tokens: int
    block_table: list[int]
    prefix_root: bytes
    block_hashes: list[bytes]


class CacheManager(ABC):
    """Owns the cache memory of one model and lends it to sequences.

    Attributes:
        block_size: tokens per block, P.
        num_blocks: blocks in the cache tensors, the null block included.
    """

    block_size: int
    num_blocks: int

    @abstractmethod
    def match_prefix(self, sequence: CachedSequence) -> int:
        """Takes the longest cached prefix of a sequence that holds nothing yet, and counts it as computed.

        At least the last token is left to compute, as its logits are needed.

        Returns: tokens that need not be computed.
        """

    @abstractmethod
    def allocate(self, sequence: CachedSequence, num_tokens: int, num_drafts: int = 0) -> bool:
        """Room for ``num_tokens`` tokens after the computed ones. Idempotent. The last may be one that is not in
        token_ids yet, as the step that chooses it is under way.

        Args:
            num_drafts: the last so many of them are drafts: ``rollback`` may take them back after ``commit``. At least
                one token is none.
        Returns: False, with nothing changed, if there is not enough.
        """

    @abstractmethod
    def commit(self, sequence: CachedSequence, num_tokens: int) -> None:
        """The next ``num_tokens`` tokens of token_ids, for which there is room, are computed."""

    @abstractmethod
    def rollback(self, sequence: CachedSequence, num_tokens: int) -> int:
        """Takes back at least the last ``num_tokens`` computed tokens. Call before token_ids changes.

        Returns: tokens taken back: more than asked where contents that others see would have to be written again.
        """

    @abstractmethod
    def free(self, sequence: CachedSequence) -> None:
        """Gives back all that the sequence holds; it then counts as not computed. Idempotent."""

    @abstractmethod
    def discard(self, sequence: CachedSequence) -> None:
        """``free`` for contents that may be faulty, as of a failed step: nobody finds them afterwards."""

    @abstractmethod
    def blocks_needed(self, sequence: CachedSequence, num_tokens: int) -> int:
        """Blocks that ``allocate`` of as many tokens would take from the free ones."""

    @property
    @abstractmethod
    def max_sequence_tokens(self) -> int:
        """The longest sequence that the empty cache holds."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that ``allocate`` can hand out."""

    @property
    @abstractmethod
    def usage(self) -> float:
        """Fraction of the blocks that sequences hold, 0..1."""

    @property
    @abstractmethod
    def shares_prefixes(self) -> bool:
        """Whether ``match_prefix`` can find anything."""
