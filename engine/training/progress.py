"""How fast a run goes and what memory it takes."""

from __future__ import annotations

import time
from collections import deque
from statistics import fmean

import torch

ETA_STEPS = 20
"""Steps over which the time per step is averaged."""


class Progress:
    """Clock of one run in one process.

    Args:
        seconds_before: that the run took in earlier processes.
    """

    def __init__(self, seconds_before: float) -> None:
        self._seconds_before = seconds_before
        self._began = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=ETA_STEPS)

    def start(self) -> None:
        """The run begins now."""
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of work and waiting so far."""
        return self._seconds_before + time.monotonic() - self._began

    def observe_step(self, seconds: float) -> None:
        """Takes in how long an optimizer step took."""
        self._step_seconds.append(seconds)

    def eta_seconds(self, steps: int) -> float | None:
        """Until so many more steps are done; None before the first."""
        return steps * fmean(self._step_seconds) if self._step_seconds else None


def peak_memory_bytes(device: torch.device) -> int | None:
    """Of the device's allocator. A process on the CPU cannot tell what of its peak was a run's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
