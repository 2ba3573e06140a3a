"""A decode step that the device computes while the host goes on."""

from __future__ import annotations

from collections.abc import Collection

from engine.core.cuda_graphs import LaunchedStep
from engine.core.scheduled import ScheduledBatch
from engine.errors import EngineError
from engine.sampling.on_device import DeviceSampler


class LaunchedBatch:
    """A batch whose tokens have not been read.

    Attributes:
        batch: sequences may end while it is under way, as by an abort; what it gives for them is dropped.
        rows: by id of a sequence, its row in the step.
    """

    def __init__(self, batch: ScheduledBatch, step: LaunchedStep) -> None:
        self.batch = batch
        self.rows = {id(entry.sequence): row for row, entry in enumerate(batch.entries)}
        self._step = step

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return all(entry.sequence.is_finished for entry in self.batch.entries)

    def results(self, sampler: DeviceSampler) -> tuple[dict[int, int | EngineError], set[int]]:
        """Waits for the step.

        Returns: by id of each sequence that has not ended, the token that follows it, or why there is none; and the ids
            of those for which the host had to choose. To a step that was launched after this one they were nobody's.
        """
        token_ids = self._step.token_ids()
        sequences = [entry.sequence for entry in self.batch.entries if not entry.sequence.is_finished]
        rows = [self.rows[id(s)] for s in sequences]
        chosen = [token_ids[row] for row in rows]
        left = {id(s) for s, token in zip(sequences, chosen, strict=True) if token < 0}
        sampled = sampler.settle(chosen, sequences, lambda some: self._step.logits([rows[i] for i in some]))
        return {id(s): sampled.errors.get(i, sampled.token_ids[i]) for i, s in enumerate(sequences)}, left

    def drop(self, sequences: Collection[int]) -> None:
        """Sequences, by id, for which the step computed nothing: the scheduler has them in a later one."""
        self.batch.entries = [entry for entry in self.batch.entries if id(entry.sequence) not in sequences]
