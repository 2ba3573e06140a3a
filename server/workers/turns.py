"""Who has a core first where the front end and the engine share some (Linux).

The engine's threads compute pieces of one operation side by side, and all wait for the last. By the ordinary policy
whatever wakes may take a core from one of them at once, and with many streams the front end wakes a thousand times a
second: at 64 streams on two cores that took 4% of all tokens per second. A thread of SCHED_BATCH that wakes takes an
idle core, or waits until one of them has had its turn, some 3 ms.
"""

from __future__ import annotations

import contextlib
import os


def behind_the_engine() -> None:
    """For the front end: what this thread starts from now on, and itself, interrupts nobody."""
    _set("SCHED_BATCH")


def as_usual() -> None:
    """For a worker, as a process has the policy of the one that started it."""
    _set("SCHED_OTHER")


def _set(policy: str) -> None:
    # A system that has no such policies, or a container that forbids to choose, serves as well.
    if hasattr(os, policy):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
