"""Weights of 16-bit floats, held as a checkpoint has them and widened to the compute type as they are multiplied.

Every bfloat16 and float16 is a float32, so the products are those of the widened weight, at half the memory and, where
reading it is what a product costs, in half the time.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.ops import cpu
from engine.ops.quantized import WeightRows, quantized_linear
from engine.quantization.base import LinearScheme


class HalfPrecision(LinearScheme):
    """W as the parameter ``weight`` [O, I] in a 16-bit type, beside activations in the compute type, float32.

    Args:
        name: of the type, as llama.cpp prints it.
    """

    is_plain = True

    def __init__(self, dtype: torch.dtype, name: str) -> None:
        self.dtype = dtype
        self.name = name  # type: ignore[misc]

    def create_parameters(self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        module.compute_dtype = dtype  # type: ignore[assignment]
        weight = torch.empty(out_features, in_features, dtype=self.dtype)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        packed = self.packed(module)
        if packed is not None and cpu.takes_rows(x):
            return packed.linear(x)
        return quantized_linear(x, self.rows(module), module.get_parameter("weight").shape[0], packed)

    def dequantize(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return module.get_parameter("weight").to(dtype)

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        if module.compute_dtype == torch.float32 and cpu.takes_ids(ids) and (packed := self.packed(module)) is not None:
            return packed.gather(ids)
        return module.get_parameter("weight")[ids].to(module.compute_dtype)  # type: ignore[arg-type]

    def packed(self, module: nn.Module) -> cpu.PackedWeight | None:
        weight = module.get_parameter("weight")
        return cpu.packed(module, weight, lambda: cpu.StoredWeight(weight))

    def rows(self, module: nn.Module) -> WeightRows:
        weight, packed = module.get_parameter("weight"), self.packed(module)

        def rows(start: int, end: int, dtype: torch.dtype) -> Tensor:
            if packed is not None and dtype == torch.float32:
                return cpu.scratch_rows(packed, start, end)
            return weight[start:end].to(dtype)

        return rows


HALF_PRECISION = {
    dtype: HalfPrecision(dtype, name) for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16"))
}
"""By the type that is stored."""
