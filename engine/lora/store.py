"""The adapters of one model: versions on disk, and those of them that are in memory.

<root>/<name>/<version>/ holds adapter_config.json, adapter_model.safetensors and lineage.json.

A version is written aside, synced and renamed, so it is there whole or not at all. A request holds the Adapter that it
resolved at its arrival, so it keeps its version whatever is published, unloaded or deleted meanwhile.

Several processes may share a root: each looks at the disk for versions that it does not know (engine.lora.versions).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from engine.durable import sync, write_synced
from engine.errors import (
    AlreadyExistsError,
    EngineError,
    FailedPreconditionError,
    FormatError,
    InvalidArgumentError,
    NotFoundError,
)
from engine.info import AdapterInfo, AdapterSource
from engine.lora.adapter import Adapter
from engine.lora.describe import describe_loaded, describe_stored
from engine.lora.lineage import LINEAGE_NAME, Lineage, base_digest_of
from engine.lora.peft import WEIGHTS_NAME, load_adapter, save_adapter
from engine.lora.peft_config import CONFIG_NAME
from engine.lora.targets import LinearLike
from engine.lora.versions import AdapterState, FormerName, StoredVersions
from engine.names import validate_name

logger = logging.getLogger(__name__)

MAX_RESIDENT_OLD_VERSIONS = 4
"""Versions other than the live ones that stay in memory after a request named them, least recently used first out."""


class Targets(Protocol):
    """What is asked of a model."""

    def lora_targets(self) -> Mapping[str, LinearLike]: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...


class AdapterStore:
    """Versions of one model's adapters.

    Args:
        root: directory of this model's adapters; None: nothing can be published, only loaded from elsewhere.
        model: gives names and shapes of the linear modules, and the type of A and B in memory.
        device: where A and B go.
        base_digest: of the model's weights; stored adapters of other weights are refused.
    """

    def __init__(
        self,
        model_name: str,
        root: Path | None,
        model: Targets,
        *,
        device: torch.device | str = "cpu",
        base_digest: str = "",
    ) -> None:
        self._model_name = model_name
        self._stored = StoredVersions(root)
        self._targets = model.lora_targets()
        self._dtype = model.compute_dtype
        self._device = device
        self._base_digest = base_digest
        self._live: dict[str, Adapter] = {}
        self._old: OrderedDict[tuple[str, int], Adapter] = OrderedDict()
        self._external: dict[str, tuple[Adapter, AdapterInfo]] = {}
        # Of versions on disk, without what changes: a version never does, nor is its number used again.
        self._infos: dict[tuple[str, int], AdapterInfo] = {}
        self._scan()

    @property
    def can_publish(self) -> bool:
        """Whether there is a directory to store versions in."""
        return self._stored.root is not None

    # -------------------------------------------------------------------------------------------------------- lookup

    def get(self, name: str, version: int | None = None) -> Adapter:
        """The adapter for a request; a stored version that is not in memory is read.

        Args:
            version: None: the live one.
        Raises:
            NotFoundError: there is no such adapter or version, or it was unloaded.
            FailedPreconditionError: it belongs to other base weights.
        """
        live = self._live.get(name)
        if version is None:
            if live is None:
                raise self._unknown(name)
            return live
        if live is not None and live.version == version:
            return live
        if version == 0 and name in self._external:
            return self._external[name][0]
        key = (name, version)
        if not self._stored.exists(name, version):
            self._old.pop(key, None)  # another process deleted it
        if key not in self._old:
            if live is None and not self._stored.state(name).loaded:
                raise self._unknown(name)
            self._old[key] = self._read(name, version)
            while len(self._old) > MAX_RESIDENT_OLD_VERSIONS:
                self._old.popitem(last=False)
        self._old.move_to_end(key)
        return self._old[key]

    def read_exact(self, name: str, version: int | None = None, *, force: bool = False) -> Adapter:
        """A version as its files have it: float32, on the CPU; in memory it may be rounded to the model's type.

        Args:
            version: None: the live one.
            force: also one of other base weights, if the shapes fit.
        Raises:
            NotFoundError: there is no such adapter or version.
            FailedPreconditionError: it belongs to other base weights.
        """
        version = self._resolve(name, version)
        directory = self.path(name, version)
        if version > 0 and not force:
            self._refuse_other_base(name, version, base_digest_of(directory))
        return load_adapter(directory, self._targets, name=name, version=version, dtype=torch.float32)

    def is_of_other_base(self, name: str, version: int) -> bool:
        """Whether a version says that it was trained on other base weights."""
        return self._is_other_base(base_digest_of(self.path(name, version)))

    def present(self, name: str, version: int) -> tuple[str, int]:
        """Name and version under which the weights go now that once were this name's and version's."""
        return self._stored.present(name, version)

    def list(self) -> list[AdapterInfo]:
        """Every version, in memory or on disk; by name, then version."""
        infos = [self._info_of_external(name) for name in self._external]
        former_names = self._stored.former_names()
        for name in self._stored.names():
            state = self._stored.state(name)
            for version in self._stored.versions(name):
                info = self._info_or_none(name, version, state, former_names)
                if info is not None:
                    infos.append(info)
        return sorted(infos, key=lambda info: (info.name, info.version))

    def info(self, name: str, version: int | None = None) -> AdapterInfo:
        """One version; None: the live one.

        Raises:
            NotFoundError: there is no such adapter or version.
        """
        version = self._resolve(name, version)
        return self._info_of_external(name) if version == 0 else self._info(name, version)

    def path(self, name: str, version: int | None = None) -> Path:
        """The PEFT directory of a version; None: the live one.

        Raises:
            NotFoundError: there is no such adapter or version.
        """
        version = self._resolve(name, version)
        return Path(self._external[name][1].path) if version == 0 else self._stored.directory(name, version)

    # -------------------------------------------------------------------------------------------------------- change

    def publish(
        self,
        adapter: Adapter,
        *,
        run_id: str = "",
        base_digest: str | None = None,
        best_nll: float | None = None,
        parent: tuple[str, int] | None = None,
        data_digest: str = "",
        sources: Sequence[AdapterSource] = (),
        combination: str = "",
        forced: bool = False,
    ) -> AdapterInfo:
        """Stores an adapter as the next version of ``adapter.name`` and makes it live. The tensors are copied.

        Args:
            base_digest: None: that of this model.
            run_id, best_nll, parent, data_digest, sources, combination, forced: see Lineage.
        Raises:
            FormatError: it has values that are not finite, which no load would take.
            FailedPreconditionError: there is no directory to store it in.
        """
        name = validate_name(adapter.name, "adapter")
        for module, pair in adapter.modules.items():
            if not all(bool(torch.isfinite(factor).all()) for factor in pair):
                raise FormatError(f"adapter {name!r} has values in {module} that are not finite; nothing is published")
        digest = self._base_digest if base_digest is None else base_digest
        lineage = Lineage(
            created_at=time.time(),
            run_id=run_id,
            base_digest=digest,
            best_nll=best_nll,
            parent=parent,
            data_digest=data_digest,
            sources=tuple(sources),
            combination=combination,
            forced=forced,
        )
        with self._stored.new_version(name) as directory:
            save_adapter(directory, adapter, self._targets, base_model=self._model_name, base_digest=digest)
            write_synced(directory / LINEAGE_NAME, lineage.encode())
            version = self._stored.commit(name, directory)
        modules = {
            module: tuple(t.detach().to(self._device, self._dtype, copy=True) for t in pair)
            for module, pair in adapter.modules.items()
        }
        published = replace(adapter, version=version, dropout=0.0, modules=modules)  # type: ignore[arg-type]
        self._make_live(name, published)
        return self._info(name, version)

    def import_staged(self, name: str, staged: Path, *, force: bool = False) -> AdapterInfo:
        """Checks an uploaded PEFT directory and stores its two files as the next version, which becomes live. The
        staged directory is removed once that is done. Files that do not say which base weights they belong to are
        taken to belong to these.

        Args:
            force: also take files of other base weights, if the shapes fit.
        Raises:
            FormatError, ShapeError, NotFoundError: what is there is no adapter for this model; nothing was stored.
            FailedPreconditionError: it says that it belongs to other base weights.
        """
        validate_name(name, "adapter")
        digest = base_digest_of(staged) or self._base_digest
        if not force:
            self._refuse_other_base(name, 0, digest)
        adapter = self._load(staged, name, 0)
        lineage = Lineage(created_at=time.time(), base_digest=digest)
        forced_onto = self._base_digest if digest != self._base_digest else ""
        with self._stored.new_version(name) as directory:
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(staged / file, directory / file)
                sync(directory / file)
            write_synced(directory / LINEAGE_NAME, lineage.encode())
            version = self._stored.commit(name, directory, forced_onto=forced_onto)
        self._make_live(name, replace(adapter, version=version))
        shutil.rmtree(staged, ignore_errors=True)
        return self._info(name, version)

    def add_from_path(self, name: str, path: Path, *, force: bool = False) -> AdapterInfo:
        """Loads a PEFT directory that the operator names, as version 0, live. It is not copied into the store.

        Args:
            force: also load one of other base weights, if the shapes fit.
        Raises:
            FormatError, ShapeError, NotFoundError: what is there is no adapter for this model.
            FailedPreconditionError: it says that it belongs to other base weights.
        """
        validate_name(name, "adapter")
        if not force:
            self._refuse_other_base(name, 0, base_digest_of(path))
        adapter = self._load(path, name, 0)
        info = describe_loaded(adapter, path, self._targets, model=self._model_name)
        self._external[name] = adapter, replace(info, forced=self._is_other_base(info.base_digest))
        self._live[name] = adapter
        return self._info_of_external(name)

    def load(self, name: str, version: int | None = None, *, force: bool = False) -> AdapterInfo:
        """Reads a version and makes it live; None: the newest stored one, or version 0 where none is.

        Args:
            force: also one of other base weights, if the shapes fit. It is remembered: until the base changes once
                more, this version loads without force.
        Raises:
            NotFoundError: there is no such adapter or version.
            FailedPreconditionError: it belongs to other base weights.
        """
        stored = self._stored.versions(name)
        if version is None:
            version = stored[-1] if stored else 0
        if version == 0:
            if name not in self._external:
                raise self._unknown(name, None if not stored else 0)
            self._live[name] = self._external[name][0]
            return self._info_of_external(name)
        live = self._live.get(name)
        if live is None or live.version != version:
            live = self._take_old(name, version) or self._read(name, version, force=force)
            if force and self.is_of_other_base(name, version):
                state = self._stored.state(name)
                self._stored.write_state(name, replace(state, forced=state.forced | {version: self._base_digest}))
        self._make_live(name, live)
        return self._info(name, version)

    def unload(self, name: str) -> None:
        """Drops an adapter from memory. It stays on disk, and load brings it back.

        Raises:
            NotFoundError: there is no such adapter.
        """
        if name not in self._live and not self._stored.versions(name) and name not in self._external:
            raise self._unknown(name)
        self._forget(name)
        self._external.pop(name, None)
        if self._stored.versions(name):
            self._stored.write_state(name, replace(self._stored.state(name), loaded=False))

    def delete(self, name: str, version: int | None = None) -> None:
        """Deletes a version, or all of them, from disk and memory. Where the live one goes, the newest that is left
        becomes live, unless it cannot be loaded; then none is.

        Raises:
            NotFoundError: there is no such adapter or version.
            FailedPreconditionError: version 0, whose files are the operator's.
        """
        stored = self._stored.versions(name)
        if version == 0 or (version is None and not stored and name in self._external):
            raise FailedPreconditionError(
                f"adapter {name!r} version 0 was loaded from a directory of the operator's; it can be unloaded",
                field="version",
                reason="NOT_STORED",
            )
        if not stored or (version is not None and version not in stored):
            raise self._unknown(name, version)
        state = self._stored.state(name)
        gone = stored if version is None else (version,)
        left = [v for v in stored if v not in gone]
        if state.live in gone:
            # Written first: a crash in between leaves versions that are not live, never a live one that is gone.
            self._stored.write_state(name, replace(state, live=left[-1] if left else 0))
        for v in gone:
            self._stored.remove(name, v)
            self._old.pop((name, v), None)
            self._infos.pop((name, v), None)
        live = self._live.get(name)
        if live is not None and live.version in gone:
            del self._live[name]
            if left:
                self._go_back(name, left[-1])

    def _go_back(self, name: str, version: int) -> None:
        """Makes an earlier version live, where it can be: the deletion before it is done, and no error of it."""
        try:
            self._live[name] = self._take_old(name, version) or self._read(name, version)
        except EngineError as error:
            logger.warning("adapter %s of %s has no live version: %s", name, self._model_name, error.message)

    def prune(
        self,
        name: str | None,
        keep_last: int,
        *,
        keep: Collection[tuple[str, int]] = (),
        dry_run: bool = False,
    ) -> Sequence[AdapterInfo]:
        """Deletes versions that are neither live, nor among the newest, nor needed. One whose files are damaged, so
        that there is nothing to tell of it, is named in the log and stays.

        Args:
            name: None: of every adapter.
            keep_last: newest versions of each adapter to keep.
            keep: names and versions that somebody needs.
            dry_run: delete nothing.
        Returns: what was deleted, or would be, as it was; by name, then version.
        Raises:
            InvalidArgumentError: keep_last is negative.
            NotFoundError: there is no such adapter.
        """
        if keep_last < 0:
            raise InvalidArgumentError(f"keep_last is {keep_last}; accepted: 0 or more", field="keep_last")
        if (
            name is not None
            and not self._stored.versions(validate_name(name, "adapter"))
            and name not in self._external
        ):
            raise self._unknown(name)
        former_names = self._stored.former_names()
        needed = {self._stored.present(*version, former_names) for version in keep}
        needed |= {(live.name, live.version) for live in self._live.values()}
        pruned = []
        for each in self._stored.names() if name is None else (name,):
            stored, state = self._stored.versions(each), self._stored.state(each)
            newest = stored[max(0, len(stored) - keep_last) :]
            for version in stored:
                if version in newest or version == state.live or (each, version) in needed:
                    continue
                info = self._info_or_none(each, version, state, former_names)
                if info is not None:
                    pruned.append(info)
        if not dry_run:
            for info in pruned:
                self.delete(info.name, info.version)
        return pruned

    def rename(self, name: str, new_name: str, *, on_disk: bool = True) -> None:
        """Gives an adapter another name. Its versions keep their numbers; who holds one keeps it.

        Args:
            on_disk: False: another process of the same directory has done that part.
        Raises:
            NotFoundError: there is no such adapter.
            AlreadyExistsError: there is one of the new name.
            FailedPreconditionError: version 0, whose name is the operator's.
        """
        validate_name(new_name, "new_name")
        if name in self._external:
            raise FailedPreconditionError(
                f"adapter {name!r} was loaded from a directory of the operator's, who named it; it cannot be renamed",
                field="name",
                reason="NOT_STORED",
            )
        if on_disk:
            if not self._stored.versions(name):
                raise self._unknown(name)
            if new_name in self._external or self._stored.versions(new_name):
                raise AlreadyExistsError(
                    f"new_name is {new_name!r}, which model {self._model_name!r} has; accepted: a name that is not "
                    "taken",
                    field="new_name",
                    reason="ADAPTER_EXISTS",
                )
            self._stored.rename(name, new_name)
        live = self._live.pop(name, None)
        if live is not None:
            self._live[new_name] = replace(live, name=new_name)
        for key in [key for key in self._old if key[0] == name]:
            self._old[(new_name, key[1])] = replace(self._old.pop(key), name=new_name)
        for key in [key for key in self._infos if key[0] in (name, new_name)]:
            del self._infos[key]

    def _scan(self) -> None:
        """Loads what was live when the last process ended, and clears what a dead process left unfinished."""
        self._stored.clear_unfinished()
        for name in self._stored.names():
            state = self._stored.state(name)
            if not state.loaded or not self._stored.versions(name):
                continue
            try:
                self._live[name] = self._read(name, state.live or self._stored.versions(name)[-1])
            except EngineError as error:
                logger.warning("adapter %s of %s is not loaded: %s", name, self._model_name, error.message)

    def _read(self, name: str, version: int, *, force: bool = False) -> Adapter:
        if version not in self._stored.versions(name):
            raise self._unknown(name, version)
        directory = self._stored.directory(name, version)
        if not force:
            self._refuse_other_base(name, version, base_digest_of(directory))
        return self._load(directory, name, version)

    def _refuse_other_base(self, name: str, version: int, digest: str) -> None:
        """Raises FailedPreconditionError for an adapter of other base weights, unless it was forced onto these."""
        if not self._is_other_base(digest):
            return
        if version > 0 and self._stored.state(name).forced.get(version) == self._base_digest:
            return
        raise FailedPreconditionError(
            f"adapter {name!r}{f' version {version}' if version else ''} was trained on other weights ({digest[:16]}) "
            f"than those of model {self._model_name!r} ({self._base_digest[:16]}); accepted: one of these weights, or "
            "force",
            field="adapter",
            reason="ADAPTER_BASE_MISMATCH",
        )

    def _is_other_base(self, digest: str) -> bool:
        return bool(digest and self._base_digest and digest != self._base_digest)

    def _load(self, directory: Path, name: str, version: int) -> Adapter:
        return load_adapter(
            directory, self._targets, name=name, version=version, device=self._device, dtype=self._dtype
        )

    # -------------------------------------------------------------------------------------------------------- memory

    def _make_live(self, name: str, adapter: Adapter) -> None:
        adapter.weights_digest()  # now, rather than before the first request
        self._live[name] = adapter
        self._old.pop((name, adapter.version), None)
        state = self._stored.state(name)
        if state.live != adapter.version or not state.loaded:
            self._stored.write_state(name, replace(state, live=adapter.version, loaded=True))

    def _take_old(self, name: str, version: int) -> Adapter | None:
        return self._old.pop((name, version)) if (name, version) in self._old else None

    def _forget(self, name: str) -> None:
        self._live.pop(name, None)
        for key in [key for key in self._old if key[0] == name]:
            del self._old[key]

    def _resolve(self, name: str, version: int | None) -> int:
        """The version that is meant, which exists."""
        if version is None:
            live = self._live.get(name)
            version = live.version if live is not None else self._stored.state(name).live
            if version == 0 and name not in self._external:
                raise self._unknown(name)
        exists = name in self._external if version == 0 else version in self._stored.versions(name)
        if not exists:
            raise self._unknown(name, version)
        return version

    def _info(
        self,
        name: str,
        version: int,
        state: AdapterState | None = None,
        former_names: Sequence[tuple[FormerName, str]] | None = None,
    ) -> AdapterInfo:
        key = (name, version)
        if key not in self._infos:
            self._infos[key] = describe_stored(
                self._stored.directory(name, version),
                self._targets,
                model=self._model_name,
                name=name,
                version=version,
            )
        info, live = self._infos[key], self._live.get(name)
        is_live = live is not None and live.version == version
        if info.parent is not None or info.sources:
            former_names = self._stored.former_names() if former_names is None else former_names
        return replace(
            info,
            live=is_live,
            loaded=is_live or key in self._old,
            parent=None if info.parent is None else self._stored.present(*info.parent, former_names),
            sources=[self._present_source(source, former_names) for source in info.sources],
            forced=info.forced or version in (state or self._stored.state(name)).forced,
        )

    def _info_or_none(
        self, name: str, version: int, state: AdapterState, former_names: Sequence[tuple[FormerName, str]]
    ) -> AdapterInfo | None:
        """None, and a line in the log, where the files of the version are damaged."""
        try:
            return self._info(name, version, state, former_names)
        except EngineError as error:
            logger.warning("adapter %s version %d of %s: %s", name, version, self._model_name, error.message)
            return None

    def _present_source(
        self, source: AdapterSource, former_names: Sequence[tuple[FormerName, str]] | None
    ) -> AdapterSource:
        name, _ = self._stored.present(source.name, source.version, former_names)
        return replace(source, name=name)

    def _info_of_external(self, name: str) -> AdapterInfo:
        adapter, info = self._external[name]
        return replace(info, live=self._live.get(name) is adapter)

    def _unknown(self, name: str, version: int | None = None) -> NotFoundError:
        stored = self._stored.versions(name)
        there = {*self._live, *(other for other in self._stored.names() if self._stored.versions(other))}
        known = ", ".join(sorted(there)) or "none"
        if version is not None and (stored or name in self._live):
            versions = ", ".join(map(str, ((0,) if name in self._external else ()) + stored)) or "none"
            return NotFoundError(
                f"adapter {name!r} of model {self._model_name!r} has no version {version}; it has {versions}",
                field="adapter_version",
                reason="ADAPTER_VERSION_NOT_FOUND",
            )
        if stored:
            return NotFoundError(
                f"adapter {name!r} of model {self._model_name!r} is not loaded; stored versions: "
                f"{', '.join(map(str, stored))}",
                field="adapter",
                reason="ADAPTER_NOT_LOADED",
            )
        return NotFoundError(
            f"model {self._model_name!r} has no adapter {name!r}; it has: {known}",
            field="adapter",
            reason="ADAPTER_NOT_FOUND",
        )
