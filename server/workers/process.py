"""The operating system's side of a worker: starting it, and seeing that it never outlives its parent.

A worker is a plain subprocess, not one of multiprocessing's: that would pickle its arguments and import the parent's
main module again. Its configuration is the first line on its standard input; the pipe then stays open and silent for
life, and its end-of-file, which comes however the parent dies, ends the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import threading
from typing import IO

from server.workers.spawn import start


class WorkerProcess:
    """One worker process, alive or dead."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    async def spawn(cls, config: bytes) -> WorkerProcess:
        """Starts a worker, or takes one that is prepared; it reports Ready, or StartFailed, at the endpoint that its
        configuration names.

        Args:
            config: a WorkerConfig, as one line of JSON.
        """
        process = start()
        with contextlib.suppress(BrokenPipeError):  # it died at once; wait() tells
            await asyncio.to_thread(_pipe(process).write, config)
        return cls(process)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Waits for the end; returns the exit status, negative for a signal."""
        loop, status = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(value: int) -> None:
            if not status.done():
                status.set_result(value)

        def wait() -> None:
            value = self._process.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, value)

        threading.Thread(target=wait, name=f"wait-{self.pid}", daemon=True).start()
        ended: int = await status
        _pipe(self._process).close()
        return ended

    def kill(self) -> None:
        """Ends the process now, hung or not."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def describe_exit(status: int) -> str:
    """The exit status in words."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
