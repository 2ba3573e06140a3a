"""Where the ``whet-server`` command begins: before it imports its options, it starts the worker that will need them."""

from __future__ import annotations

import sys

from server.workers.spawn import discard_prepared, prepare

_NO_SERVER = frozenset({"pull", "verify", "--help", "--version"})


def main() -> None:
    """Entry of the process."""
    if _NO_SERVER.isdisjoint(sys.argv[1:]):
        prepare()
    try:
        from server.cli import main as command

        command(prog_name="whet-server")
    finally:
        discard_prepared()


if __name__ == "__main__":
    main()
