"""A GGUF file as a checkpoint with Hugging Face names and layouts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import FormatError
from engine.loading.checkpoint import content_digest
from engine.loading.gguf_blocks import BlockType, block_type, take_apart
from engine.loading.gguf_config import gguf_config
from engine.loading.gguf_file import GGUFFile, GGUFTensor
from engine.loading.gguf_names import COMPUTED, Target, hf_target

CHUNK_VALUES = 1 << 22
"""Values dequantized at a time: dequantizers make several temporaries of the size of their input."""

_TORCH_TYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Types of ggml that torch has too; such tensors are views of the mapping."""


KEPT = re.compile(r"(.*\.(\w+_proj|embed_tokens)|lm_head)\.weight")
"""Matrices of decoders that may stay in blocks: those of linear modules and embeddings."""

PARTS = ("weight_q", "weight_scale", "weight_offset")
"""Names of what a matrix in blocks consists of, in the order of gguf_blocks.take_apart."""


Rows = TypeVar("Rows", Tensor, npt.NDArray[Any])


class GGUFCheckpoint:
    """See Checkpoint.

    Args:
        path: a .gguf file.
        keep_blocks: give quantized matrices as the PARTS of engine.quantization.gguf in place of a ``weight``, and name
            their modules in the configuration's quantization_config; types that do not allow it are dequantized.

    Raises:
        FormatError: malformed, of an unsupported architecture, or with a tensor that the architecture does not have.
    """

    kind: Literal["safetensors", "gguf"] = "gguf"

    def __init__(self, path: Path, *, keep_blocks: bool = False) -> None:
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
        self._parts: dict[str, tuple[str, int]] = {}
        self._last: tuple[str, list[Tensor]] | None = None
        if keep_blocks:
            self._keep_blocks()
        self.stored_bytes = sum(tensor.num_bytes for tensor, _ in self._entries.values())

    def _keep_blocks(self) -> None:
        modules = {}
        for name, (tensor, _) in self._entries.items():
            block = block_type(tensor.type_id)
            if block is not None and KEPT.fullmatch(name) and tensor.shape[-1] % block.block_size == 0:
                module = name.removesuffix(".weight")
                modules[module] = block.name
                for index, part in enumerate(PARTS[: 3 if block.has_offsets else 2]):
                    self._parts[f"{module}.{part}"] = name, index
        if modules:
            quantization = {"quant_method": "gguf", "modules": modules}
            self.config = replace(self.config, quantization_config=quantization)

    def names(self) -> Iterable[str]:
        """Hugging Face names, in file order."""
        kept = {name for name, _ in self._parts.values()}
        return [*(name for name in self._entries if name not in kept), *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        """See Checkpoint."""
        if name not in self._parts:
            return self._entries[name][0].shape
        whole, index = self._parts[name]
        rows, columns = self._entries[whole][0].shape
        block = self._block(whole)
        if index == 0:
            return rows, columns * block.bits // 8
        return rows, columns // block.group_size

    def dtype(self, name: str) -> torch.dtype:
        """See Checkpoint."""
        if name in self._parts:
            whole, index = self._parts[name]
            block = self._block(whole)
            if index == 0:
                return torch.uint8 if block.bits == 4 else torch.int8
            return torch.float16 if block.half_scales else torch.float32
        tensor, target = self._entries[name]
        return torch.float32 if target.change == "shifted" else _TORCH_TYPES.get(tensor.type_id, torch.float32)

    def get(self, name: str) -> Tensor:
        """See Checkpoint."""
        if name in self._parts:
            return self._part(*self._parts[name])
        tensor, target = self._entries[name]
        values = self._read(tensor)
        if target.change == "permuted":
            return _unpermute(values, self._heads(target))
        if target.change == "shifted":
            return values.to(torch.float32) - 1.0
        return values

    def digest(self) -> str:
        """See Checkpoint."""
        digest = content_digest([("", memoryview(self.file.map), self.file.header_bytes)])
        self.file.release()  # with each sample the system has mapped 64 KiB
        return digest

    def _block(self, name: str) -> BlockType:
        block = block_type(self._entries[name][0].type_id)
        assert block is not None
        return block

    def _part(self, name: str, index: int) -> Tensor:
        """One of the PARTS of a matrix. They come one after the other, so the last matrix's are kept for the others."""
        if self._last is None or self._last[0] != name:
            tensor, target = self._entries[name]
            block, columns = self._block(name), tensor.shape[-1]
            rows = self.file.data(tensor).reshape(tensor.shape[0], -1)
            step = max(1, CHUNK_VALUES // columns)
            pieces = [take_apart(block, rows[at : at + step], columns) for at in range(0, len(rows), step)]
            parts = []
            for part in zip(*pieces, strict=True):
                if part[0] is None:
                    continue
                # A small matrix is one piece: where that is contiguous, there is nothing to copy.
                alone = len(part) == 1 and part[0].flags.carray
                whole = part[0] if alone else np.concatenate(part)
                if target.change == "permuted":
                    whole = _unpermute(whole, self._heads(target))
                parts.append(torch.from_numpy(whole))
            self._last = name, parts
            self.file.release(tensor)
        return self._last[1][index]

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
        self.file.release(tensor)
        return out.view(tensor.shape)


def _size(tensor: GGUFTensor) -> int:
    count = 1
    for dim in tensor.shape:
        count *= dim
    return count


def _unpermute(values: Rows, num_heads: int) -> Rows:
    """Undoes llama.cpp's reordering of q and k for its interleaved rotary embedding.

    The converter splits the rows of each head in two halves and interleaves them; this takes them apart again.

    Args:
        values: [num_heads * head_dim, ...].
    """
    half = values.shape[0] // num_heads // 2
    apart = values.reshape(num_heads, half, 2, *values.shape[1:]).swapaxes(1, 2)
    return apart.reshape(values.shape)
