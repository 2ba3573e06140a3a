"""Decode steps of which nothing is new but tokens and positions.

A captured step reads all weights and leaves the caches of a core empty, so that whatever Python and torch do between
two of them runs at memory's pace: an operation of torch costs tens of microseconds there. So a step is repeated with
less where the scheduler gives the very batch of the step before, in which each sequence took its likeliest token: the
numbers of the new tokens are written, and the captured step, which ends with the likeliest tokens, is run.

Proof: tests/engine/test_repeated_steps.py.
"""

from __future__ import annotations

from engine.core.captured_steps import CapturedSteps
from engine.core.decode_graphs import DecodeGraphs
from engine.core.scheduled import ScheduledBatch
from engine.core.sequence import Sequence
from engine.errors import EngineError
from engine.sampling.sampler import Sampler, not_finite


class RepeatedSteps:
    """Repeats the steps of one model.

    Args:
        graphs: the model's captured steps; it has no recurrent states, which would have to be kept on the way.
        sampler: whose greedy choice is repeated.
    """

    def __init__(self, graphs: DecodeGraphs, sampler: Sampler) -> None:
        self._graphs = graphs
        self._sampler = sampler
        self._batch: ScheduledBatch | None = None
        self._sequences: list[Sequence] = []

    def ran(self, batch: ScheduledBatch | None) -> None:
        """Tells which step has been run in the ordinary way by ``graphs``, in the order of the batch's entries.

        Args:
            batch: None: they did not run it.
        """
        self._sequences = [] if batch is None else [entry.sequence for entry in batch.entries]
        follows = self._graphs.can_go_on and self._sampler.takes_likeliest(self._sequences)
        self._batch = batch if follows else None

    def takes(self, batch: ScheduledBatch) -> bool:
        """Whether this is the batch of the step before, and ``run`` can run it again."""
        return batch is self._batch

    def run(self) -> dict[int, int | EngineError]:
        """Runs that batch once more. Returns, by id of the sequence, its token, or why there is none."""
        sequences = self._sequences
        tokens = self._graphs.next_likeliest(
            [s.token_ids[-1] for s in sequences],
            [s.num_computed_tokens for s in sequences],
            [s.block_table for s in sequences],
        )
        return {id(s): not_finite(s) if token < 0 else token for s, token in zip(sequences, tokens, strict=True)}


def repeated_steps(graphs: CapturedSteps | None, sampler: object, *, has_states: bool) -> RepeatedSteps | None:
    """None where steps cannot be repeated."""
    if has_states or not isinstance(graphs, DecodeGraphs) or not isinstance(sampler, Sampler):
        return None
    return RepeatedSteps(graphs, sampler)
