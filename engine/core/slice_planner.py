"""How much of a job may run between two steps of serving, and what its next piece will cost.

A stream sees the time between two of its tokens: a step, and whatever a job does before the next one. The planner
watches how long steps take and lets jobs have a fraction of that in each gap, so that the time between tokens grows by
no more than a given factor, whatever the model and the machine. Pieces of jobs are predicted from those before them;
one that would go beyond the gap waits for the next.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

from engine.jobs import Pause

MEMORY = 64
"""Steps, and pieces of a kind, that are remembered. Machines change their speed, and so do batches."""

QUANTILE = 0.9
"""Of the costs remembered, the one that a piece is expected to take: most gaps are then no longer than planned."""


class _Recent:
    """The latest values of a quantity, and an upper quantile of them."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=MEMORY)

    def add(self, value: float) -> None:
        self._values.append(value)

    def quantile(self) -> float:
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))]


class SlicePlanner:
    """Plans the slices of one engine's jobs.

    Args:
        slice_seconds: no gap gives a job more than this.
        max_slowdown: largest factor on the time between two tokens, above 1; inf: none.
    """

    def __init__(self, slice_seconds: float, max_slowdown: float) -> None:
        self._slice_seconds = slice_seconds
        self._max_slowdown = max_slowdown
        self._steps: deque[float] = deque(maxlen=MEMORY)
        self._costs: dict[tuple[str, str], _Recent] = defaultdict(_Recent)

    def served(self, seconds: float) -> None:
        """Takes in how long a step took."""
        self._steps.append(seconds)

    @property
    def gap_seconds(self) -> float:
        """What jobs may take between the next two steps. Of a median, as a long prompt says little of the decode steps
        after it."""
        if not self._steps:
            return self._slice_seconds
        return min(self._slice_seconds, (self._max_slowdown - 1.0) * statistics.median(self._steps))

    def cost(self, job_kind: str, piece: Pause | None) -> float | None:
        """Seconds that the next piece of a job will take; None: there was none of its kind yet."""
        kind, size = (piece.kind, piece.size) if piece is not None else ("", 1)
        recent = self._costs.get((job_kind, kind))
        return None if recent is None else recent.quantile() * size

    def observe(self, job_kind: str, piece: Pause | None, seconds: float) -> None:
        """Takes in how long a piece took."""
        kind, size = (piece.kind, piece.size) if piece is not None else ("", 1)
        self._costs[job_kind, kind].add(seconds / size)
