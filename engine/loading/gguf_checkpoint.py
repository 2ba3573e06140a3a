"""A GGUF file as a checkpoint with Hugging Face names and layouts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import FormatError
from engine.loading.checkpoint import content_digest
from engine.loading.gguf_config import gguf_config
from engine.loading.gguf_file import GGUFFile, GGUFTensor
from engine.loading.gguf_names import COMPUTED, Target, hf_target

CHUNK_VALUES = 1 << 22
"""Values dequantized at a time: dequantizers make several temporaries of the size of their input."""

_TORCH_TYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Types of ggml that torch has too; such tensors are views of the mapping."""


class GGUFCheckpoint:
    """See Checkpoint.

    Args:
        path: a .gguf file.

    Raises:
        FormatError: malformed, of an unsupported architecture, or with a tensor that the architecture does not have.
    """

    kind: Literal["safetensors", "gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.config: ModelConfig = gguf_config(self.file)
        architecture = self.file.metadata["general.architecture"]
        self._entries: dict[str, tuple[GGUFTensor, Target]] = {}
        for name, tensor in self.file.tensors.items():
            if name in COMPUTED:
                continue
            target = hf_target(architecture, name)
            if target is None:
                raise FormatError(f"{path}: tensor {name!r} is none that the {architecture} architecture has")
            if target.change == "permuted" and tensor.shape[0] % (2 * self._heads(target)):
                raise FormatError(f"{path}: tensor {name!r} has {tensor.shape[0]} rows; accepted: whole heads of pairs")
            if target.name in self._entries:
                raise FormatError(f"{path}: two tensors stand for {target.name!r}")
            self._entries[target.name] = (tensor, target)
        self.stored_bytes = sum(tensor.num_bytes for tensor, _ in self._entries.values())

    def names(self) -> Iterable[str]:
        """Hugging Face names, in file order."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See Checkpoint."""
        return self._entries[name][0].shape

    def get(self, name: str) -> Tensor:
        """See Checkpoint."""
        tensor, target = self._entries[name]
        values = self._read(tensor)
        if target.change == "permuted":
            return _unpermute(values, self._heads(target))
        if target.change == "shifted":
            return values.to(torch.float32) - 1.0
        return values

    def digest(self) -> str:
        """See Checkpoint."""
        return content_digest([("", memoryview(self.file.map), self.file.header_bytes)])

    def _heads(self, target: Target) -> int:
        return self.config.num_attention_heads if ".q_proj." in target.name else self.config.num_key_value_heads

    def _read(self, tensor: GGUFTensor) -> Tensor:
        data = self.file.data(tensor)
        if tensor.type_id in _TORCH_TYPES:
            return torch.from_numpy(data).view(_TORCH_TYPES[tensor.type_id]).view(tensor.shape)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.type_id)
        columns = tensor.shape[-1]
        rows = data.reshape(-1, data.size * columns // _size(tensor))
        out = torch.empty((rows.shape[0], columns), dtype=torch.float32)
        step = max(1, CHUNK_VALUES // columns)
        try:
            for start in range(0, rows.shape[0], step):
                values: npt.NDArray[Any] = dequantize(rows[start : start + step], kind)
                out[start : start + step] = torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(-1, columns)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise FormatError(f"{self.path}: tensor {tensor.name!r} of type {kind.name}: {error}") from error
        return out.view(tensor.shape)


def _size(tensor: GGUFTensor) -> int:
    count = 1
    for dim in tensor.shape:
        count *= dim
    return count


def _unpermute(values: Tensor, num_heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of q and k for its interleaved rotary embedding.

    The converter splits the rows of each head in two halves and interleaves them; this takes them apart again.

    Args:
        values: [num_heads * head_dim, ...].
    """
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, half, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape).contiguous()
