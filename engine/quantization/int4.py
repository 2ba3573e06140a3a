"""Q4: 4-bit integers in groups along the input, symmetric or with a zero point per group.

Shapes: O out_features, I in_features, S group size, G = I / S groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.errors import FormatError
from engine.ops import cpu
from engine.ops.backends import uses_triton_forward
from engine.ops.quantized import WeightRows, quantized_linear, unpack_int4
from engine.quantization.base import LinearScheme
from engine.quantization.int8 import check_shape
from engine.quantization.packing import packed_width, unpack_outputs

GROUP_SIZES = (32, 64, 128)

KERNEL_MAX_ROWS = 16
"""Rows of input up to which torch's bfloat16 kernel beats widening the weight: 18 times at one row, 2.9 times at 16,
as fast at 64 (one thread of a Zen 4, 1536 x 576). Its float32 variant is twice slower at one row, so none is used."""


class Int4Grouped(LinearScheme):
    """W = (q - zero) * scale, q in [-8, 7] [O, I], scale [O, G] in the compute type, zero in [-8, 7] [O, G] or absent.

    Checkpoints hold ``weight_packed`` (eight values to an int32 word), ``weight_scale``, ``weight_shape`` and, with
    zero points, ``weight_zero_point`` packed along the outputs. In float32 on the CPU the loaded module keeps the
    packed words where our kernels read them, or else one byte a value (``weight_int8``): torch widens bytes in a
    quarter of the time of halves of bytes. In bfloat16 it keeps the packed words, and again in the layout of torch's
    kernel (``weight_kernel``), which takes 0.7 times that of bfloat16 weights (SmolLM2-135M, one thread of a Zen 4).
    On other devices it keeps the packed words alone.

    Args:
        group_size: S, one of GROUP_SIZES.
        symmetric: without zero points.
    """

    name = "q4"

    def __init__(self, group_size: int, symmetric: bool = True) -> None:
        assert group_size in GROUP_SIZES
        self.group_size = group_size
        self.symmetric = symmetric

    def create_parameters(self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        if in_features % self.group_size:
            raise FormatError(
                f"module {module.name} has {in_features} inputs, which groups of {self.group_size} do not divide"
            )
        groups = in_features // self.group_size
        tensors = {
            "weight_packed": torch.empty(out_features, packed_width(in_features, 4), dtype=torch.int32),
            "weight_scale": torch.empty(out_features, groups, dtype=dtype),
            "weight_shape": torch.empty(2, dtype=torch.int64),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = torch.empty(packed_width(out_features, 4), groups, dtype=torch.int32)
        for name, tensor in tensors.items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def after_loading(self, module: nn.Module) -> None:
        check_shape(module)
        del module.weight_shape
        packed, scale = module.get_parameter("weight_packed").data, module.get_parameter("weight_scale").data
        zero: Tensor | None = None
        if not self.symmetric:
            zero = unpack_outputs(module.get_parameter("weight_zero_point").data, scale.shape[0], 4).to(scale.dtype)
            del module.weight_zero_point
            module.register_buffer("zero_point", zero, persistent=False)
        if packed.device.type != "cpu" or self.packed(module) is not None:
            return
        unpacked = unpack_int4(packed, scale.shape[1] * self.group_size)
        if scale.dtype == torch.bfloat16:
            kernel, scale_and_zero = _for_kernel(unpacked, scale, zero)
            module.register_buffer("weight_kernel", kernel, persistent=False)
            module.register_buffer("scale_and_zero", scale_and_zero, persistent=False)
        else:
            del module.weight_packed
            module.register_buffer("weight_int8", unpacked, persistent=False)

    def packed(self, module: nn.Module) -> cpu.PackedWeight | None:
        words = module._parameters.get("weight_packed")
        if words is None:
            return None
        scale, zero = module.get_parameter("weight_scale"), module._buffers.get("zero_point")
        return cpu.packed(module, words, lambda: cpu.StoredWeight(words.view(torch.uint8), scale, zero))

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        values, scale, zero = self._stored(module)
        if values.dtype == torch.int32 and uses_triton_forward(x, scale):
            from engine.ops.triton import grouped_rows

            if grouped_rows.takes(x):
                return grouped_rows.linear(x, values.view(torch.uint8), scale, zero=zero, shift=8)
        if cpu.takes_rounded(x) and (packed := self.packed(module)) is not None:
            return packed.linear(x, rounds=True)
        if cpu.takes_rows(x, cpu.MAX_ROWS_OF_INTEGERS) and (packed := self.packed(module)) is not None:
            return packed.linear(x)
        num_rows = x.numel() // x.shape[-1]
        if (
            "weight_kernel" in module._buffers
            and x.dtype == torch.bfloat16
            and 0 < num_rows <= KERNEL_MAX_ROWS
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            kernel, scale_and_zero = module.get_buffer("weight_kernel"), module.get_buffer("scale_and_zero")
            flat = x.reshape(num_rows, x.shape[-1])
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, kernel, self.group_size, scale_and_zero)
            return y.view(*x.shape[:-1], y.shape[-1])
        return quantized_linear(x, self.rows(module), scale.shape[0], self.packed(module))

    def dequantize(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._widen(*self._stored(module), dtype)

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        packed = self.packed(module) if cpu.takes_ids(ids) else None
        values, scale, zero = self._stored(module)
        if packed is not None and scale.dtype == torch.float32:
            return packed.gather(ids)
        return self._widen(values[ids], scale[ids], None if zero is None else zero[ids], scale.dtype)

    def rows(self, module: nn.Module) -> WeightRows:
        values, scale, zero = self._stored(module)
        packed = self.packed(module)

        def rows(start: int, end: int, dtype: torch.dtype) -> Tensor:
            if packed is not None and dtype == torch.float32:
                return cpu.scratch_rows(packed, start, end)
            part = None if zero is None else zero[start:end]
            return self._widen(values[start:end], scale[start:end], part, dtype)

        return rows

    def _stored(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        values = module._buffers.get("weight_int8")
        if values is None:
            values = module.get_parameter("weight_packed")
        zero = None if self.symmetric else module.get_buffer("zero_point")
        return values, module.get_parameter("weight_scale"), zero

    def _widen(self, values: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows of W from rows of what is stored."""
        num_rows, groups = scale.shape
        if values.dtype == torch.int32:
            values = unpack_int4(values, groups * self.group_size)
        wide = values.to(dtype).view(num_rows, groups, self.group_size)
        if zero is not None:
            wide.sub_(zero.to(dtype).unsqueeze(-1))
        return wide.mul_(scale.to(dtype).unsqueeze(-1)).view(num_rows, groups * self.group_size)


def _for_kernel(values: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layout of torch's CPU kernel, which computes (u - 8) * scale + offset with u = q + 8.

    Args:
        values: q [O, I] int8; scale: [O, G]; zero: [O, G] in the type of the scale, or None.

    Returns: packed values, and [G, O, 2] of scale and offset in the type of the scale.
    """
    kernel = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32) + 8, 1)
    offset = torch.zeros_like(scale) if zero is None else -zero * scale
    return kernel, torch.stack([scale.T, offset.T], dim=-1).contiguous()
