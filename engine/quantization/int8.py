"""Q8: int8 with one symmetric scale per output channel.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from engine.errors import FormatError
from engine.ops import cpu
from engine.ops.backends import uses_triton_forward
from engine.ops.quantized import WeightRows, quantized_linear, unpack_int8
from engine.quantization.base import LinearScheme
from engine.quantization.packing import packed_width

Int8Format = Literal["int-quantized", "pack-quantized"]

KERNEL_MAX_ROWS = 8
"""Rows of input up to which torch's bfloat16 kernel beats widening the weight: 4 times at one row, 1.6 times at 8,
0.9 times at 16 (one thread of a Zen 4, 1536 x 576). Its float32 variant is 6 times slower at one row and not used."""


class Int8PerChannel(LinearScheme):
    """W = q * scale, q int8 [O, I], scale [O, 1] in the compute type.

    A checkpoint holds q as bytes ("int-quantized": ``weight``) or packed four to a word ("pack-quantized":
    ``weight_packed``, the layout that vLLM takes for weights without quantized activations). Once loaded, the module
    has ``weight`` either way.

    Args:
        stored: how the checkpoint holds q.
    """

    name = "q8"

    def __init__(self, stored: Int8Format = "pack-quantized") -> None:
        self.stored = stored

    def create_parameters(self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        if self.stored == "pack-quantized":
            packed = torch.empty(out_features, packed_width(in_features, 8), dtype=torch.int32)
            module.register_parameter("weight_packed", nn.Parameter(packed, requires_grad=False))
            shape = torch.empty(2, dtype=torch.int64)
            module.register_parameter("weight_shape", nn.Parameter(shape, requires_grad=False))
        else:
            weight = torch.empty(out_features, in_features, dtype=torch.int8)
            module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        scale = torch.empty(out_features, 1, dtype=dtype)
        module.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))

    def after_loading(self, module: nn.Module) -> None:
        if self.stored == "pack-quantized":
            check_shape(module)
            weight = unpack_int8(module.get_parameter("weight_packed").data, int(module.in_features))  # type: ignore[arg-type]
            del module.weight_packed
            del module.weight_shape
            module.register_parameter("weight", nn.Parameter(weight.contiguous(), requires_grad=False))

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, scale = module.get_parameter("weight"), module.get_parameter("weight_scale")
        if uses_triton_forward(x, scale):
            from engine.ops.triton import int8_rows

            if int8_rows.takes(x):
                return int8_rows.linear(x, weight, scale)
        packed = self.packed(module)
        if packed is not None and cpu.takes_rounded(x):
            return packed.linear(x, rounds=True)
        if packed is not None and cpu.takes_rows(x, cpu.MAX_ROWS_OF_INTEGERS):
            return packed.linear(x)
        num_rows = x.numel() // x.shape[-1]
        if (
            x.dtype == scale.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and 0 < num_rows <= KERNEL_MAX_ROWS
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            flat = x.reshape(num_rows, x.shape[-1])
            y: Tensor = torch.ops.aten._weight_int8pack_mm(flat, weight, scale.view(-1))
            return y.view(*x.shape[:-1], y.shape[-1])
        return quantized_linear(x, _rows(weight, scale, packed), weight.shape[0], packed)

    def dequantize(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        weight, scale = module.get_parameter("weight"), module.get_parameter("weight_scale")
        return _rows(weight, scale, None)(0, weight.shape[0], dtype)

    def rows(self, module: nn.Module) -> WeightRows:
        weight, scale = module.get_parameter("weight"), module.get_parameter("weight_scale")
        return _rows(weight, scale, self.packed(module))

    def packed(self, module: nn.Module) -> cpu.PackedWeight | None:
        weight, scale = module.get_parameter("weight"), module.get_parameter("weight_scale")
        return cpu.packed(module, weight, lambda: cpu.StoredWeight(weight, scale))

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        weight, scale = module.get_parameter("weight"), module.get_parameter("weight_scale")
        if scale.dtype == torch.float32 and cpu.takes_ids(ids):
            packed = self.packed(module)
            if packed is not None:
                return packed.gather(ids)
        return weight[ids].to(scale.dtype) * scale[ids]


def _rows(weight: Tensor, scale: Tensor, packed: cpu.PackedWeight | None) -> WeightRows:
    def rows(start: int, end: int, dtype: torch.dtype) -> Tensor:
        if packed is not None and dtype == torch.float32:
            return cpu.scratch_rows(packed, start, end)
        return weight[start:end].to(dtype).mul_(scale[start:end].to(dtype))

    return rows


def check_shape(module: nn.Module) -> None:
    """Compares the stored ``weight_shape`` with the module's.

    Raises:
        FormatError: they differ.
    """
    stored = module.get_parameter("weight_shape").tolist()
    wanted = [module.out_features, module.in_features]
    if stored != wanted:
        raise FormatError(f"{module.name}.weight_shape is {stored}; accepted: {wanted}, the shape of the module")
