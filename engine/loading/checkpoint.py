"""A checkpoint: a model's configuration and its tensors by Hugging Face name, read from a memory map on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.loading.resolve import resolve_model_path

DIGEST_BYTES = 16
SAMPLE_BYTES = 4096
SAMPLES_PER_FILE = 256


class Checkpoint(Protocol):
    """What the loader needs of a model's files.

    Attributes:
        path: the directory or .gguf file.
        kind: container format.
        config: shape of the model.
        stored_bytes: of all tensors, as they lie in the files.
    """

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> Literal["safetensors", "gguf"]: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def stored_bytes(self) -> int: ...

    def names(self) -> Iterable[str]:
        """Hugging Face names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. KeyError if there is none of that name."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type of what ``get`` gives, without reading it. KeyError if there is none of that name."""
        ...

    def get(self, name: str) -> Tensor:
        """The tensor: a view of the memory map where its stored type is one of torch's, or else dequantized to
        float32. Never to be written to. KeyError if there is none of that name."""
        ...

    def digest(self) -> str:
        """Identifies the weights: see content_digest."""
        ...


def open_checkpoint(path: Path, *, keep_blocks: bool = False) -> Checkpoint:
    """Opens a model by path; reads headers only.

    Args:
        path: a Hugging Face directory, a .safetensors file or index beside its config.json, or a .gguf file.
        keep_blocks: give a GGUF file's quantized matrices as their integers (see GGUFCheckpoint).

    Raises:
        NotFoundError: there is no such path.
        FormatError: malformed, or of an unsupported kind.
    """
    resolved = resolve_model_path(path)
    if resolved.suffix == ".gguf":
        from engine.loading.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(resolved, keep_blocks=keep_blocks)
    from engine.loading.experts import StackedExperts, has_single_experts
    from engine.loading.safetensors_checkpoint import SafetensorsCheckpoint

    checkpoint = SafetensorsCheckpoint(resolved)
    return StackedExperts(checkpoint) if has_single_experts(checkpoint.names()) else checkpoint


def content_digest(files: Iterable[tuple[str, memoryview, int]]) -> str:
    """A digest of weights that does not read them all.

    It covers each file's name, length and whole header (names, types, shapes and places of all tensors), and 256
    evenly spaced pages of 4 KiB of its data; files of up to 1 MiB of data are covered whole. Two fine-tunes of a model
    differ in nearly every page, so the sample tells them apart; it is no proof against somebody who forges a file.

    Args:
        files: name, content, and length of the header, in a fixed order.

    Returns: 32 hexadecimal digits.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, content, header_bytes in files:
        size = len(content)
        state.update(f"{name}\0{size}\0{header_bytes}\0".encode())
        state.update(content[:header_bytes])
        data = size - header_bytes
        if data <= SAMPLE_BYTES * SAMPLES_PER_FILE:
            state.update(content[header_bytes:])
            continue
        for i in range(SAMPLES_PER_FILE):
            at = header_bytes + (data - SAMPLE_BYTES) * i // (SAMPLES_PER_FILE - 1)
            state.update(content[at : at + SAMPLE_BYTES])
    return state.hexdigest()
