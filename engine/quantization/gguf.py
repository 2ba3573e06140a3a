"""Weights of a GGUF file as the file has them: integers in groups, each with a scale and perhaps an offset.

Shapes: O out_features, I in_features, S group size, G = I / S groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import FormatError
from engine.loading.gguf_blocks import BLOCK_TYPES, BlockType
from engine.ops import cpu
from engine.ops.backends import uses_triton_forward
from engine.ops.quantized import WeightRows, quantized_linear, unpack_int4
from engine.quantization.base import UNQUANTIZED, LinearScheme, SchemeMap, quant_methods

STORED_SHIFT = 8
"""What unpack_int4 subtracts."""


class GGUFBlocks(LinearScheme):
    """w = q * scale + offset, in the integers of one of ggml's block types (engine.loading.gguf_blocks).

    Once loaded, a module has ``weight_q`` (int8 [O, I], or uint8 [O, I / 2] of two values a byte), ``weight_scale``
    [O, G] and, for types with offsets, ``weight_offset`` [O, G].
    """

    def __init__(self, block: BlockType) -> None:
        self.block = block
        self.name = block.name  # type: ignore[misc]

    def create_parameters(self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        block = self.block
        if in_features % block.block_size:
            raise FormatError(
                f"module {module.name} has {in_features} inputs; accepted for {block.name}: a multiple of "
                f"{block.block_size}"
            )
        shape = (out_features, in_features // block.group_size)
        scales = torch.float16 if block.half_scales else torch.float32
        tensors = {
            "weight_q": torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            if block.bits == 4
            else torch.empty(out_features, in_features, dtype=torch.int8),
            "weight_scale": torch.empty(shape, dtype=scales),
        }
        if block.has_offsets:
            tensors["weight_offset"] = torch.empty(shape, dtype=scales)
        module.compute_dtype = dtype  # type: ignore[assignment]
        for name, tensor in tensors.items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        values, scale, offset = self._stored(module)
        if uses_triton_forward(x, scale):
            from engine.ops.triton import grouped_rows

            if grouped_rows.takes(x):
                return grouped_rows.linear(x, values, scale, offset=offset, shift=self.block.zero_point)
        packed = self.packed(module)
        if packed is not None and cpu.takes_rounded(x):
            return packed.linear(x, rounds=True)
        if packed is not None and cpu.takes_rows(x, cpu.MAX_ROWS_OF_INTEGERS):
            return packed.linear(x)
        return quantized_linear(x, self._rows(module, packed), module.get_parameter("weight_q").shape[0], packed)

    def dequantize(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._widen(*self._stored(module)).to(dtype)

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        if module.compute_dtype == torch.float32 and cpu.takes_ids(ids):
            packed = self.packed(module)
            if packed is not None:
                return packed.gather(ids)
        values, scale, offset = self._stored(module)
        rows = self._widen(values[ids], scale[ids], None if offset is None else offset[ids])
        return rows.to(module.compute_dtype)  # type: ignore[arg-type]

    def _stored(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        offset = module.get_parameter("weight_offset") if self.block.has_offsets else None
        return module.get_parameter("weight_q"), module.get_parameter("weight_scale"), offset

    def packed(self, module: nn.Module) -> cpu.PackedWeight | None:
        values, scale, offset = self._stored(module)
        shift = self.block.zero_point
        return cpu.packed(module, values, lambda: cpu.StoredWeight(values, scale, offsets=offset, shift=shift))

    def rows(self, module: nn.Module) -> WeightRows:
        return self._rows(module, self.packed(module))

    def _rows(self, module: nn.Module, packed: cpu.PackedWeight | None) -> WeightRows:
        values, scale, offset = self._stored(module)

        def rows(start: int, end: int, dtype: torch.dtype) -> Tensor:
            if packed is not None:
                return cpu.scratch_rows(packed, start, end).to(dtype)
            part = None if offset is None else offset[start:end]
            return self._widen(values[start:end], scale[start:end], part).to(dtype)

        return rows

    def _widen(self, values: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Rows of W in float32 from rows of what is stored."""
        block, (num_rows, groups) = self.block, scale.shape
        if block.bits == 4:
            values = unpack_int4(values, groups * block.group_size)
        wide = values.to(torch.float32).view(num_rows, groups, block.group_size)
        if block.bits == 4 and block.zero_point != STORED_SHIFT:
            wide.add_(STORED_SHIFT - block.zero_point)
        wide.mul_(scale.float().unsqueeze(-1))
        if offset is not None:
            wide.add_(offset.float().unsqueeze(-1))
        return wide.view(num_rows, groups * block.group_size)


@quant_methods.register("gguf")
class GGUFMap(SchemeMap):
    """Schemes of the modules that a GGUF file has in blocks: ``modules`` of the configuration, name to block type."""

    name = "gguf"

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(quantization_config)
        modules = (quantization_config or {}).get("modules")
        if not isinstance(modules, Mapping):
            raise FormatError("quantization_config.modules is missing; accepted: module names with their block types")
        self._schemes: dict[str, GGUFBlocks] = {}
        by_type: dict[str, GGUFBlocks] = {}
        for name, kind in modules.items():
            if kind not in BLOCK_TYPES:
                raise FormatError(f"quantization_config.modules.{name} is {kind!r}; accepted: {', '.join(BLOCK_TYPES)}")
            self._schemes[name] = by_type.setdefault(kind, GGUFBlocks(BLOCK_TYPES[kind]))

    def for_module(self, name: str) -> LinearScheme:
        """See SchemeMap."""
        return self._schemes.get(name, UNQUANTIZED)
