"""The operating system's side of a worker: starting it, and seeing that it never outlives its parent.

A worker is a plain subprocess, not one of multiprocessing's: that would pickle its arguments and import the parent's
main module again. Its configuration is the first line on its standard input; the pipe then stays open and silent for
life, and its end-of-file, which comes however the parent dies, ends the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from server.workers.messages import WorkerConfig

# Ctrl-C reaches the whole process group, and so does SIGTERM from systemd, timeout(1) or kill(1) of a group. What to do
# about it is the parent's to decide, which may well be to let streams finish; so both are ignored before the first slow
# import. Shutdown, or the end of the parent, ends a worker. The package's root comes as an argument because the
# parent's sys.path is not inherited.
_BOOT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.path.insert(0, sys.argv[1]); "
    "from server.workers.worker import main; main()"
)
_ROOT = Path(__file__).resolve().parents[2]
_MAX_CONFIG_BYTES = 1 << 20


class WorkerProcess:
    """One worker process, alive or dead."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def spawn(cls, config: WorkerConfig) -> WorkerProcess:
        """Starts a worker; it reports Ready, or StartFailed, at ``config.endpoint``."""
        # -P: the working directory is no place to import from.
        flags = ["-P", *(["-" + "O" * sys.flags.optimize] if sys.flags.optimize else [])]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *flags, "-c", _BOOT, str(_ROOT), stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once; wait() tells
            process.stdin.write(msgspec.json.encode(config) + b"\n")
            await process.stdin.drain()
        return cls(process)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Waits for the end; returns the exit status, negative for a signal."""
        return await self._process.wait()

    def kill(self) -> None:
        """Ends the process now, hung or not."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def describe_exit(status: int) -> str:
    """The exit status in words."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


# ------------------------------------------------------------------------------------------------- inside the worker


def read_config() -> WorkerConfig:
    """Reads the first line of standard input.

    Raises:
        msgspec.DecodeError: it is no worker configuration.
        EOFError: the parent went away before it wrote one.
    """
    line = b""
    while not line.endswith(b"\n"):
        # Unbuffered, byte by byte: the rest of the pipe belongs to the watch.
        byte = os.read(0, 1)
        if not byte or len(line) > _MAX_CONFIG_BYTES:
            raise EOFError("standard input ended before the configuration did")
        line += byte
    return msgspec.json.decode(line, type=WorkerConfig)


def die_with_parent() -> None:
    """Ends this process as soon as standard input does, whatever the main thread is doing."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
