"""Starts the process of a worker, also before it is known what it is to do.

Importing torch takes a worker a second or more: one that ``prepare`` has started is at it while its parent is still
importing what it needs itself. So this module imports next to nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The package's root comes as an argument because the parent's sys.path is not inherited.
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from server.workers.boot import main; main()"
_ROOT = Path(__file__).resolve().parents[2]

_prepared: list[subprocess.Popen[bytes]] = []


def start() -> subprocess.Popen[bytes]:
    """A worker's process: one that is prepared, if there is one. It waits for its configuration on standard input."""
    if _prepared:
        return _prepared.pop()
    # -P: the working directory is no place to import from.
    flags = ["-P", *(["-" + "O" * sys.flags.optimize] if sys.flags.optimize else [])]
    command = [sys.executable, *flags, "-c", _BOOT, str(_ROOT)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)


def prepare() -> None:
    """Starts a worker, which the next ``start`` returns."""
    _prepared.append(start())


def discard_prepared() -> None:
    """Ends the workers that were prepared and not taken."""
    while _prepared:
        process = _prepared.pop()
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
