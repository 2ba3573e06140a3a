"""The ``whet`` command: the client in a terminal."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        from whet.cli.commands import cli, run
    except ImportError as error:
        print(f'whet: the command needs {error.name}; pip install "whet[cli]"', file=sys.stderr)
        raise SystemExit(1) from error
    try:
        status = run(cli)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe left; Python would say so again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.stderr.flush()
    # All is printed, and gRPC's own threads may still work on a call that Ctrl-C left: an interpreter that takes itself
    # down beside them has been seen to hang, and to abort.
    os._exit(status)
