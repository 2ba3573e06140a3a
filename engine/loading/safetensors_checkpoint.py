"""A Hugging Face directory of safetensors files as a checkpoint."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import FormatError
from engine.loading.checkpoint import content_digest
from engine.loading.fields import read_json
from engine.loading.hf_config import load_hf_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096


class SafetensorsCheckpoint:
    """See Checkpoint.

    Args:
        path: a directory that holds config.json and model.safetensors, or an index and its shards, or one .safetensors
            file of any name.

    Raises:
        FormatError: naming the file and the fault.
    """

    kind: Literal["safetensors", "gguf"] = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: ModelConfig = load_hf_config(path)
        self.files, index = _find_files(path)
        # The safetensors library checks header length, shapes, overlaps, gaps and the length of the data.
        self._handles = {file.name: _open(file) for file in self.files}
        self._entries: dict[str, str] = {}
        for file_name, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if index is not None and index.get(name) != file_name:
                    continue  # a shard may hold what the index gives to another
                if name in self._entries:
                    raise FormatError(f"{path}: tensor {name!r} is in {self._entries[name]} and in {file_name}")
                self._entries[name] = file_name
        if index is not None and (missing := sorted(index.keys() - self._entries.keys())):
            raise FormatError(f"{path / INDEX_FILE}: names tensors that its shards do not hold: {missing[:5]}")
        if is_headless(self._entries, self.config):
            self.config = replace(self.config, task="embed")
        self._shapes = {name: tuple(self._slice(name).get_shape()) for name in self._entries}
        self.stored_bytes = sum(file.stat().st_size for file in self.files)

    def names(self) -> Iterable[str]:
        """See Checkpoint."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See Checkpoint."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        return self.get(name).dtype  # of a view of the mapping, which reads nothing

    def get(self, name: str) -> Tensor:
        """See Checkpoint."""
        try:
            tensor: Tensor = self._handles[self._entries[name]].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise FormatError(f"{self.path / self._entries[name]}: tensor {name!r}: {error}") from error
        return tensor

    def digest(self) -> str:
        """See Checkpoint."""
        maps = []
        for file in self.files:
            with file.open("rb") as opened:
                content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            header = 8 + int.from_bytes(content[:8], "little")
            maps.append((file.name if len(self.files) > 1 else "", memoryview(content), header))
        return content_digest(maps)

    def _slice(self, name: str) -> Any:
        return self._handles[self._entries[name]].get_slice(name)


def is_headless(names: Collection[str], config: ModelConfig) -> bool:
    """Whether these are the tensors of a decoder that was saved without its head, to embed with.

    The names have no ``model.`` before them then, or the configuration says so (``Qwen3Model``). Where neither holds, a
    head that is missing is a fault.
    """
    if not config.has_own_head or any(name.startswith("lm_head.") for name in names):
        return False
    architectures = config.raw.get("architectures") or [""]
    return any(name.startswith("embed_tokens.") for name in names) or str(architectures[0]).endswith("Model")


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{file}: not a well-formed safetensors file: {error}") from error


def _find_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory, and tensor name to file name where an index gives it."""
    single, index_file = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file():
        return [_inside(path, SINGLE_FILE)], None
    if index_file.is_file():
        index = read_json(index_file).get("weight_map")
        if not isinstance(index, dict) or not index or any(not isinstance(name, str) for name in index.values()):
            raise FormatError(f"{index_file}: weight_map is not a map of tensor names to file names")
        shards = sorted(set(index.values()))
        if len(shards) > MAX_SHARDS:
            raise FormatError(f"{index_file}: names {len(shards)} shards; accepted: at most {MAX_SHARDS}")
        return [_inside(path, name) for name in shards], index
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FormatError(f"{path}: holds no {SINGLE_FILE} and no {INDEX_FILE}; found {len(found)} .safetensors files")
    return [_inside(path, found[0].name)], None


def _inside(path: Path, name: str) -> Path:
    """The file of that name, which must lie in the directory.

    A symbolic link may lead elsewhere in one case only: the Hugging Face cache keeps a snapshot's files as links into
    the ``blobs`` directory beside ``snapshots``.
    """
    if Path(name).name != name or not name.endswith(".safetensors") or "\\" in name or "\0" in name:
        raise FormatError(f"{path}: the index names the shard {name!r}; accepted: plain .safetensors file names")
    file = path / name
    if not file.is_file():
        raise FormatError(f"{file}: no such file, though the index names it")
    root, target = path.resolve(), file.resolve()
    if target.parent != root and target.parent != root.parent.parent / "blobs":
        raise FormatError(f"{file}: is a link that leaves its directory")
    return file
