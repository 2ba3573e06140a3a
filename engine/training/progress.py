"""How fast a run goes and what memory it takes."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path
from statistics import fmean

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

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


def reset_peak_memory(device: torch.device) -> None:
    """Peaks are counted from now on. Where the system does not allow that, they are those of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set and nothing else


def peak_memory_bytes(device: torch.device) -> int | None:
    """Since reset_peak_memory: what torch's allocator gave out on a GPU; on the CPU the resident set of this process,
    weights, caches and files that it maps included. None where the system does not tell (it is Linux that does)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
