"""Writes safetensors files tensor by tensor, so that a checkpoint is never in memory as a whole.

The format puts a header with every tensor's type, shape and place before the data; so all shapes are declared first.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from engine.durable import flush, write_synced

SHARD_BYTES = 4 << 30
"""A shard holds at most so many bytes of tensors, unless a single tensor is larger."""

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = self.dtype.itemsize
        for dim in self.shape:
            count *= dim
        return count


class SafetensorsWriter:
    """Writes the declared tensors, in the declared order, to one file or to shards with an index.

    Used as a context manager; ``finish`` flushes everything to the disk and writes the index.

    Args:
        directory: that exists; gets model.safetensors, or model-00001-of-0000N.safetensors and the index.
    """

    def __init__(self, directory: Path, entries: Sequence[TensorEntry], shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._shards = _split(entries, shard_bytes)
        count = len(self._shards)
        self._names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._pending = [(shard, entry) for shard, entries in enumerate(self._shards) for entry in entries]
        self._pending.reverse()
        self._shard = -1
        self._file: BinaryIO | None = None
        self._bytes_left = 0  # of the tensor that write_rows has begun

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next declared tensor; one that was declared otherwise is a bug, so it asserts."""
        shard, entry = self._pending.pop()
        assert (entry.name, entry.dtype, entry.shape) == (name, tensor.dtype, tuple(tensor.shape)), (entry, name)
        if self._file is None or shard != self._shard:
            self._file = self._next_file(shard)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)

    def write_rows(self, name: str, rows: Tensor) -> None:
        """Appends a part of the next declared tensor, whose parts come one after the other in the order of memory."""
        shard, entry = self._pending[-1]
        assert (entry.name, entry.dtype) == (name, rows.dtype), (entry, name)
        if self._file is None or shard != self._shard:
            self._file = self._next_file(shard)
        self._bytes_left = self._bytes_left or entry.num_bytes
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        self._bytes_left -= data.numel()
        assert self._bytes_left >= 0, entry
        if self._bytes_left == 0:
            self._pending.pop()

    def finish(self) -> int:
        """Flushes the last file, writes the index of several, and returns the bytes of the tensor files on disk."""
        assert not self._pending, f"{len(self._pending)} declared tensors were not written"
        self._close_synced()
        total = sum((self._directory / name).stat().st_size for name in self._names)
        if len(self._names) > 1:
            index = {
                "metadata": {"total_size": sum(entry.num_bytes for shard in self._shards for entry in shard)},
                "weight_map": {
                    entry.name: file_name
                    for file_name, shard in zip(self._names, self._shards, strict=True)
                    for entry in shard
                },
            }
            write_synced(self._directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        return total

    def _next_file(self, shard: int) -> BinaryIO:
        self._close_synced()
        self._shard = shard
        file = (self._directory / self._names[shard]).open("wb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self._shards[shard]:
            end = offset + entry.num_bytes
            header[entry.name] = {
                "dtype": _TYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        file.write(len(text).to_bytes(8, "little") + text)
        return file

    def _close_synced(self) -> None:
        if self._file is not None:
            flush(self._file)
            self._file.close()


def _split(entries: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards
