"""What one step computes of which sequences. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.sequence import Sequence


@dataclass(slots=True)
class ScheduledSequence:
    """The part of one sequence in a step: tokens [num_computed_tokens, num_computed_tokens + num_tokens).

    Attributes:
        is_committed: the cache counts these tokens as computed already (``Scheduler.follow``).
    """

    sequence: Sequence
    num_tokens: int
    is_committed: bool = False

    @property
    def reaches_end(self) -> bool:
        """Whether the step computes its last known token, so that the next one can be sampled."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work. ``scheduler.update`` or ``finish`` is due for each entry; an entry that gets neither, as its
    step failed, is simply scheduled again."""

    entries: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def decodes(self) -> bool:
        """Whether each sequence has a past and one new token, after which the next is chosen."""
        return all(
            entry.num_tokens == 1
            and entry.reaches_end
            and entry.sequence.num_computed_tokens > 0
            and not entry.sequence.collects_prompt_logprobs
            for entry in self.entries
        )

    def sort_by_adapter(self) -> None:
        """Sequences of one adapter side by side, so that each adapter is one segment; by name, so that runs repeat."""
        self.entries.sort(key=lambda e: (e.sequence.request.adapter or "", e.sequence.adapter_version or 0))
