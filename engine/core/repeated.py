"""Decode steps of which nothing is new but tokens and positions.

A captured step reads all weights and leaves the caches of a core empty, so that whatever Python and torch do between
two of them runs at memory's pace: an operation of torch costs tens of microseconds there. So a step is repeated with
less where the scheduler gives the very batch of the step before: the numbers of the new tokens and of the draws are
written, and the captured step, which ends with the choice of tokens, is run. Where a sequence asks for what that choice
cannot do, such as penalties or log-probabilities, the sampler chooses from the step's logits.

Proof: tests/engine/test_repeated_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeAlias

from torch import Tensor

from engine.core.captured_steps import CapturedSteps
from engine.core.decode_graphs import DecodeGraphs
from engine.core.scheduled import ScheduledBatch
from engine.core.sequence import Sequence
from engine.errors import EngineError
from engine.sampling.on_device import DeviceSampler, row_numbers

Sampled: TypeAlias = dict[int, int | EngineError]
"""By id of a sequence, its token, or why there is none."""


class RepeatedSteps:
    """Repeats the steps of one model.

    Args:
        graphs: the model's captured steps; it has no recurrent states, which would have to be kept on the way.
        sampler: knows which choices the captured steps do.
        sample: chooses all others, from logits [N, V] of N sequences, which it may overwrite.
    """

    def __init__(
        self, graphs: DecodeGraphs, sampler: DeviceSampler, sample: Callable[[Tensor, Seq[Sequence]], Sampled]
    ) -> None:
        self._graphs = graphs
        self._sampler = sampler
        self._sample = sample
        self._batch: ScheduledBatch | None = None
        self._sequences: list[Sequence] = []
        self._chooses = False

    def ran(self, batch: ScheduledBatch | None) -> None:
        """Tells which step has been run in the ordinary way by ``graphs``, in the order of the batch's entries.

        Args:
            batch: None: they did not run it.
        """
        self._sequences = [] if batch is None else [entry.sequence for entry in batch.entries]
        self._batch = batch if self._graphs.can_go_on else None
        self._chooses = self._sampler.takes(self._sequences)

    def takes(self, batch: ScheduledBatch) -> bool:
        """Whether this is the batch of the step before, and ``run`` can run it again."""
        return batch is self._batch

    def run(self) -> Sampled:
        """Runs that batch once more."""
        sequences = self._sequences
        tokens, logits = self._graphs.next_tokens(
            [s.token_ids[-1] for s in sequences],
            [s.num_computed_tokens for s in sequences],
            [s.block_table for s in sequences],
            row_numbers(sequences)[0] if self._chooses else (),
        )
        if not self._chooses:
            return self._sample(logits, sequences)
        sampled: Sampled = {id(s): token for s, token in zip(sequences, tokens, strict=True)}
        if min(tokens) < 0:
            left = [row for row, token in enumerate(tokens) if token < 0]
            sampled |= self._sample(logits[left], [sequences[row] for row in left])
        return sampled


def repeated_steps(
    graphs: CapturedSteps | None,
    sampler: DeviceSampler,
    sample: Callable[[Tensor, Seq[Sequence]], Sampled],
    *,
    has_states: bool,
) -> RepeatedSteps | None:
    """None where steps cannot be repeated."""
    if has_states or not isinstance(graphs, DecodeGraphs):
        return None
    return RepeatedSteps(graphs, sampler, sample)
