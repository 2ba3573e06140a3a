"""Adapter versions on disk.

<root>/<name>/<version>/   one version; appears by a rename, never changes
<root>/<name>/state.json   which version is live, whether it is to be loaded, and the next version number

Numbers ascend and are not used twice, not even after a deletion: prefix caches and archived runs go by them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import FailedPreconditionError
from engine.lora.peft import sync_file, write_synced
from engine.names import validate_name

STATE_NAME = "state.json"

STALE_SECONDS = 3600.0
"""Age at which an unfinished directory counts as left behind by a process that died."""


@dataclass(slots=True)
class AdapterState:
    """What is remembered of one adapter name.

    Attributes:
        live: version that new requests get; 0: none is stored.
        loaded: False once it was unloaded, which outlives a restart.
        next: number of the next version.
    """

    live: int = 0
    loaded: bool = True
    next: int = 1


class StoredVersions:
    """The directory of one model's adapters. Several processes may share it; nothing is remembered between calls.

    Args:
        root: may not exist yet; None: nothing is stored, and nothing can be.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def names(self) -> tuple[str, ...]:
        """Names of adapters that have or had versions, sorted."""
        if self.root is None or not self.root.is_dir():
            return ()
        return tuple(sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and entry.name[0] != "."))

    def versions(self, name: str) -> tuple[int, ...]:
        """Versions of an adapter, ascending."""
        if self.root is None:
            return ()
        directory = self.root / validate_name(name, "adapter")
        if not directory.is_dir():
            return ()
        names = (entry.name for entry in directory.iterdir())
        return tuple(sorted(int(n) for n in names if n.isascii() and n.isdigit() and n[0] != "0"))

    def directory(self, name: str, version: int) -> Path:
        """Where a version lies, whether it exists or not."""
        assert self.root is not None
        return self.root / name / str(version)

    def state(self, name: str) -> AdapterState:
        """What is remembered; where that is lost or contradicts the versions, the newest is live."""
        stored = self.versions(name)
        newest = stored[-1] if stored else 0
        fallback = AdapterState(live=newest, next=newest + 1)
        if self.root is None:
            return fallback
        try:
            values = json.loads((self.root / name / STATE_NAME).read_bytes())
            state = AdapterState(live=int(values["live"]), loaded=bool(values["loaded"]), next=int(values["next"]))
        except (OSError, ValueError, TypeError, KeyError):
            return fallback
        state.next = max(state.next, newest + 1)
        if state.live not in stored:
            state.live = newest
        return state

    def write_state(self, name: str, state: AdapterState) -> None:
        """Remembers."""
        assert self.root is not None
        directory = self.root / name
        temporary = directory / f".{STATE_NAME}.{os.getpid()}"
        write_synced(temporary, json.dumps(asdict(state)).encode())
        temporary.replace(directory / STATE_NAME)
        sync_file(directory)

    @contextlib.contextmanager
    def new_version(self, name: str) -> Iterator[Path]:
        """A directory to fill, gone afterwards unless it was committed.

        Raises:
            FailedPreconditionError: there is no root.
        """
        if self.root is None:
            raise FailedPreconditionError(
                f"adapter {name!r} cannot be stored: the engine has no state directory", reason="NO_STATE_DIR"
            )
        directory = self.root / name / f".new-{os.getpid()}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def commit(self, name: str, directory: Path) -> int:
        """Renames a filled directory to the next free version and records it as live."""
        assert self.root is not None
        sync_file(directory)
        version = self.state(name).next
        while True:
            try:
                directory.rename(self.directory(name, version))
                break
            except OSError:
                if not self.directory(name, version).exists():
                    raise
                version += 1  # another process was faster
        sync_file(self.root / name)
        self.write_state(name, AdapterState(live=version, loaded=True, next=version + 1))
        return version

    def remove(self, name: str, version: int) -> None:
        """Deletes a version; it is gone at once, its bytes a little later."""
        directory = self.directory(name, version)
        gone = directory.with_name(f".deleted-{version}-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            directory.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def clear_unfinished(self) -> None:
        """Removes what a process that died left half written."""
        if self.root is None:
            return
        for directory in self.root.glob("*/.*"):
            with contextlib.suppress(OSError):
                if directory.is_dir() and time.time() - directory.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(directory, ignore_errors=True)
