"""Adapter versions on disk.

<root>/<name>/<version>/   one version; appears by a rename, never changes
<root>/<name>/state.json   which version is live, whether it is to be loaded, the next version number, what was forced,
                           and the names that these versions had before

Numbers ascend and are not used twice, not even after a deletion: prefix caches and archived runs go by them. A name
whose versions were given another one goes on after them, so a name and a number stand for the same weights for ever,
and what a lineage says of a parent stays true: ``present`` tells where those weights are now.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.durable import sync, write_synced
from engine.errors import FailedPreconditionError
from engine.names import validate_name

STATE_NAME = "state.json"

STALE_SECONDS = 3600.0
"""Age at which an unfinished directory counts as left behind by a process that died."""


class FormerName(NamedTuple):
    """Versions of numbers less than ``below`` had this name before."""

    name: str
    below: int


@dataclass(slots=True)
class AdapterState:
    """What is remembered of one adapter name.

    Attributes:
        live: version that new requests get; 0: none is stored.
        loaded: False once it was unloaded, which outlives a restart.
        next: number of the next version.
        forced: version to the digest of the base weights that it was loaded onto though it was trained on others.
        formerly: other names that these versions had, the latest last.
    """

    live: int = 0
    loaded: bool = True
    next: int = 1
    forced: dict[int, str] = field(default_factory=dict)
    formerly: list[FormerName] = field(default_factory=list)


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
        try:
            if self.root is None:
                raise FileNotFoundError
            state = _parse(json.loads((self.root / name / STATE_NAME).read_bytes()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            moved = (former.below for former, _ in self.former_names() if former.name == name)
            return AdapterState(live=newest, next=max(newest + 1, *moved, 1))
        state.next = max(state.next, newest + 1)
        if state.live not in stored:
            state.live = newest
        return state

    def former_names(self) -> list[tuple[FormerName, str]]:
        """Every name that versions had before, and the name that they have now."""
        found = []
        for name in self.names():
            assert self.root is not None
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                state = _parse(json.loads((self.root / name / STATE_NAME).read_bytes()))
                found += [(former, name) for former in state.formerly]
        return found

    def present(
        self, name: str, version: int, former_names: Sequence[tuple[FormerName, str]] | None = None
    ) -> tuple[str, int]:
        """Name and version under which the weights go now that once were this name's and version's.

        Args:
            former_names: of ``former_names``, for a caller that asks often; None: looked up.
        """
        if version == 0 or self.exists(name, version):
            return name, version
        known = self.former_names() if former_names is None else former_names
        moved = [(former.below, to) for former, to in known if former.name == name and version < former.below]
        return (min(moved)[1] if moved else name), version

    def exists(self, name: str, version: int) -> bool:
        """Whether there is such a version."""
        return self.root is not None and version > 0 and self.directory(name, version).is_dir()

    def write_state(self, name: str, state: AdapterState) -> None:
        """Remembers."""
        assert self.root is not None
        directory = self.root / name
        temporary = directory / f".{STATE_NAME}.{os.getpid()}"
        write_synced(temporary, json.dumps(asdict(state)))
        temporary.replace(directory / STATE_NAME)
        sync(directory)

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

    def commit(self, name: str, directory: Path, *, forced_onto: str = "") -> int:
        """Renames a filled directory to the next free version and records it as live.

        Args:
            forced_onto: digest of the base weights, where the version was trained on others.
        """
        assert self.root is not None
        sync(directory)
        state = self.state(name)
        version = state.next
        while True:
            try:
                directory.rename(self.directory(name, version))
                break
            except OSError:
                if not self.directory(name, version).exists():
                    raise
                version += 1  # another process was faster
        sync(self.root / name)
        if forced_onto:
            state.forced[version] = forced_onto
        self.write_state(name, replace(state, live=version, loaded=True, next=version + 1))
        return version

    def rename(self, name: str, new_name: str) -> None:
        """Gives all versions of an adapter another name, under which none is stored. They keep their numbers.

        The state is written first: whenever a process dies here, the versions have either name, and whole.
        """
        assert self.root is not None
        assert not self.versions(new_name), new_name
        source, target = self.root / name, self.root / new_name
        state, other = self.state(name), self.state(new_name)
        former = [entry for entry in state.formerly if entry.name not in (name, new_name)]
        state.formerly = [*other.formerly, *former, FormerName(name, state.next)]
        state.next = max(state.next, other.next)
        self.write_state(name, state)
        if target.exists():
            shutil.rmtree(target)  # of versions that were deleted: what is left is their last number, kept above
        source.rename(target)
        sync(self.root)

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


def _parse(values: Any) -> AdapterState:
    """From state.json; ValueError, TypeError, KeyError or AttributeError where it is malformed."""
    return AdapterState(
        live=int(values["live"]),
        loaded=bool(values["loaded"]),
        next=int(values["next"]),
        forced={int(version): str(digest) for version, digest in values.get("forced", {}).items()},
        formerly=[FormerName(str(former[0]), int(former[1])) for former in values.get("formerly", [])],
    )
