"""An upload of adapter files into a staging directory: fixed names, announced sizes, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from engine.errors import InvalidArgumentError
from server.errors import over_limit

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_CONFIG_BYTES = 1 << 20


class Upload:
    """Receives the files that were announced.

    Args:
        directory: made by ``open``; removed by the caller.
        sizes: file name to bytes.
        num_announced: entries of the announcement, to see a name given twice.
        max_bytes: of all files.
    Raises:
        InvalidArgumentError: the announcement is not of exactly the files of a PEFT adapter, within the limits.
    """

    def __init__(self, directory: Path, sizes: Mapping[str, int], num_announced: int, max_bytes: int) -> None:
        if set(sizes) != set(ADAPTER_FILES) or num_announced != len(ADAPTER_FILES):
            given = ", ".join(repr(name[:80]) for name in list(sizes)[:8]) or "none"
            raise InvalidArgumentError(
                f"header.files are {given}; accepted: exactly {' and '.join(ADAPTER_FILES)}", field="header.files"
            )
        for name, size in sizes.items():
            if size <= 0:
                raise InvalidArgumentError(
                    f"header.files: {name} has {size} bytes; accepted: at least 1", field="header.files"
                )
        if sizes[ADAPTER_FILES[0]] > MAX_CONFIG_BYTES:
            raise over_limit("header.files", sizes[ADAPTER_FILES[0]], MAX_CONFIG_BYTES, f"bytes of {ADAPTER_FILES[0]}")
        if sum(sizes.values()) > max_bytes:
            raise over_limit("header.files", sum(sizes.values()), max_bytes, "bytes in all")
        self.directory = directory
        self._sizes = dict(sizes)
        self._received = dict.fromkeys(sizes, 0)
        self._files: dict[str, BinaryIO] = {}

    def open(self) -> None:
        """Makes the directory and its empty files."""
        self.directory.mkdir(parents=True)
        for name in self._sizes:
            self._files[name] = (self.directory / name).open("xb")

    def write(self, name: str, data: bytes) -> None:
        """Appends to a file.

        Raises:
            InvalidArgumentError: it was not announced, or grows beyond its size.
        """
        if name not in self._files:
            raise InvalidArgumentError(
                f"chunk.name is {name[:80]!r}; accepted: {' or '.join(ADAPTER_FILES)}", field="chunk.name"
            )
        self._received[name] += len(data)
        if self._received[name] > self._sizes[name]:
            raise InvalidArgumentError(
                f"{name} has more than the {self._sizes[name]} bytes that were announced", field="chunk.data"
            )
        self._files[name].write(data)

    def finish(self) -> None:
        """Closes the files.

        Raises:
            InvalidArgumentError: one is shorter than announced.
        """
        self.close()
        for name, size in self._sizes.items():
            if self._received[name] != size:
                raise InvalidArgumentError(
                    f"{name} ended after {self._received[name]} of {size} announced bytes", field="chunk.data"
                )

    def close(self) -> None:
        """Closes the files; may be called again."""
        for file in self._files.values():
            file.close()
