"""The first code of a worker process: it imports the rest, which takes most of the time until the server is ready.

A worker may be started before it is known what it is to do (``server.workers.spawn.prepare``), so its configuration
is asked for last.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import threading

from server.workers.turns import as_usual

_MAX_CONFIG_BYTES = 1 << 20


class ParentPipe:
    """Standard input: its first line is the configuration, and its end is the end of the parent, which ends this
    process as well, whatever the main thread is doing."""

    def __init__(self) -> None:
        self._line: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def config(self) -> bytes:
        """Waits for the configuration."""
        return self._line.get()

    def _watch(self) -> None:
        line = b""
        with contextlib.suppress(OSError):
            while (data := os.read(0, 65536)) and len(line) <= _MAX_CONFIG_BYTES:
                line += data
                if line.endswith(b"\n"):
                    self._line.put(line)
                    line = b""
        os._exit(1)


def main() -> None:
    """Entry of the process."""
    # Ctrl-C reaches the whole process group, and so does SIGTERM from systemd, timeout(1) or kill(1) of a group. What
    # to do about it is the parent's to decide, which may well be to let streams finish; so both are ignored before the
    # first slow import. Shutdown, or the end of the parent, ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    as_usual()  # before any thread
    # GNU OpenMP reads its settings as torch loads it. Its own choice is to spin some milliseconds at each barrier:
    # where cores are shared with anything else, threads then burn the time that those they wait for need (decoding fell
    # from 16 to 2 tokens/s beside busy processes). With 20,000 turns decoding is at 95% of its undisturbed rate or
    # better.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    parent = ParentPipe()
    # What is imported stays: looking through it for garbage, again and again as it grows, takes a seventh of the time.
    # Frozen, it is not looked through later either, when a collection would hold up a step.
    gc.disable()
    from server.workers.worker import work

    gc.freeze()
    gc.enable()
    raise SystemExit(work(parent.config()))
