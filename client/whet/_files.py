"""Adapter files on their way to and from the server."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from whet._values import incomplete, new_request_id
from whet.errors import InternalError
from whet.v1 import common_pb2, model_pb2

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHUNK_BYTES = 512 << 10


def import_requests(
    name: str, model: str, directory: str | Path, request_id: str | None, force: bool = False
) -> Iterator[model_pb2.ImportAdapterRequest]:
    """The messages of ``import_adapter``; files are read as they are sent.

    Raises:
        FileNotFoundError: ``directory`` lacks one of the files; raised by the call itself, before anything is sent.
    """
    paths = [Path(directory) / file for file in ADAPTER_FILES]
    header = model_pb2.ImportAdapterHeader(
        request_id=new_request_id(request_id),
        model=model,
        name=name,
        force=force,
        files=[common_pb2.FileInfo(name=path.name, size_bytes=path.stat().st_size) for path in paths],
    )
    return _messages(header, paths)


def _messages(header: model_pb2.ImportAdapterHeader, paths: list[Path]) -> Iterator[model_pb2.ImportAdapterRequest]:
    yield model_pb2.ImportAdapterRequest(header=header)
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield model_pb2.ImportAdapterRequest(chunk=common_pb2.FileChunk(name=path.name, data=data))


class Download:
    """Receives the files of an Export stream into a directory, which appears whole or not at all.

    Use as a context manager: leaving it without ``commit`` removes what was received.

    Args:
        directory: made anew; may exist if it is empty, or with ``overwrite``.
    Raises:
        FileExistsError: it holds something.
        InternalError: the server sends other files than it announced, or names that are not bare file names.
    """

    def __init__(self, directory: str | Path, *, overwrite: bool, request_id: str) -> None:
        self.adapter: model_pb2.Adapter | None = None
        self._directory = Path(directory)
        if not overwrite and self._directory.exists() and any(self._directory.iterdir()):
            raise FileExistsError(f"{self._directory} is not empty; accepted: a new or empty directory, or overwrite")
        self._partial = self._directory.with_name(f".{self._directory.name}.{uuid.uuid4().hex}")
        self._expected: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._request_id = request_id
        self._finished = False

    def __enter__(self) -> Download:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self._request_id

    def end(self) -> None:
        """Raises InternalError if the stream ended too early."""
        if self.adapter is None or not self._finished:
            raise incomplete("ExportAdapter", self._request_id)

    def feed(self, response: model_pb2.ExportAdapterResponse) -> tuple[object, ...]:
        """Takes the next response; there is nothing to iterate."""
        match response.WhichOneof("event"):
            case "header":
                self._open(response.header)
            case "chunk":
                file = self._files.get(response.chunk.name)
                if file is None:
                    raise self._broken(f"sent data of {response.chunk.name!r}, which it had not announced")
                file.write(response.chunk.data)
            case "finished":
                self._finished = True
            case _:  # of a newer server
                pass
        return ()

    def _open(self, header: model_pb2.ExportAdapterHeader) -> None:
        self.adapter = header.adapter
        for info in header.files:
            name = info.name
            if name in ("", ".", "..") or "\0" in name or "/" in name or "\\" in name or name in self._expected:
                raise self._broken(f"announced a file named {name!r}; accepted: distinct bare file names")
            self._expected[name] = info.size_bytes
            self._files[name] = (self._partial / name).open("xb")

    def commit(self) -> model_pb2.Adapter:
        """Puts the directory in its place; returns the adapter that it holds."""
        self.end()
        assert self.adapter is not None
        for name, file in self._files.items():
            if file.tell() != self._expected[name]:
                raise self._broken(f"announced {self._expected[name]} bytes of {name} and sent {file.tell()}")
            file.flush()
            os.fsync(file.fileno())
            file.close()
        _sync_directory(self._partial)
        if self._directory.exists() and any(self._directory.iterdir()):
            old = self._directory.with_name(f"{self._partial.name}.old")
            self._directory.rename(old)
            self._partial.rename(self._directory)
            shutil.rmtree(old)
        else:
            self._partial.rename(self._directory)  # onto an empty directory, too
        _sync_directory(self._directory.parent)
        return self.adapter

    def _broken(self, what: str) -> InternalError:
        return InternalError(f"the server {what}", reason="BAD_EXPORT", request_id=self._request_id)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
