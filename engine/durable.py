"""Files that are on the disk when the call returns, whatever becomes of the process or the machine after it.

A rename lasts once the directory that holds the entry is synced as well; syncing the file alone does not say its name.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO


def write_synced(path: Path, data: bytes | str) -> None:
    """Writes a file, text as UTF-8, and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        flush(file)


def flush(file: BinaryIO) -> None:
    """Waits until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until all files below a directory, and the entries of it and its directories, are on the disk."""
    for path, _, files in os.walk(directory):
        for name in files:
            sync(Path(path, name))
        sync(Path(path))


def make_staging(final: Path) -> Path:
    """An empty directory beside ``final``, to fill and to rename to it; its name begins with a dot."""
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))


def clear_staging(final: Path) -> None:
    """Removes what processes that died left of ``final``. Nobody may be writing it."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp names, not of NAME.more
    for path in final.parent.glob(".*"):
        if pattern.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
