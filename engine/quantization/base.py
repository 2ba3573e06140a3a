"""How a linear weight is stored and multiplied.

A scheme is stateless; the tensors live on the module as parameters under the names that checkpoints use, so that one
loader serves all schemes. Every scheme gives the gradient of its input, so LoRA trains over any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ops import cpu, dense, quantized
from engine.ops.dense import is_divided, linear
from engine.ops.elementwise import add
from engine.ops.quantized import WeightRows, quantized_linear
from engine.registry import Registry


class LinearScheme(ABC):
    """One way to store W [out_features, in_features]."""

    name: ClassVar[str]
    is_plain: ClassVar[bool] = False
    """W is one parameter of floats, ``weight``, whose rows are outputs."""

    @abstractmethod
    def create_parameters(self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Registers the stored tensors on ``module`` (called under the meta device), without gradients."""

    @abstractmethod
    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        """x [..., in_features] times W transposed: [..., out_features]; differentiable with respect to x."""

    @abstractmethod
    def dequantize(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out_features, in_features]."""

    def input_gradient(self, module: nn.Module, grad: Tensor) -> Tensor:
        """Of ``apply`` for x: grad [..., out_features] times W, [..., in_features], in memory of its own."""
        return quantized.input_gradient(grad, self.rows(module), self.packed(module))

    def apply_with_bias(self, module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
        """``apply``, plus bias [out_features]. Schemes whose product can take it in override this."""
        return add(self.apply(module, x), bias)

    def rows(self, module: nn.Module) -> WeightRows:
        """Reads W a few rows at a time. Schemes that can do so without making all of it override this."""
        return lambda start, end, dtype: self.dequantize(module, dtype)[start:end]

    def packed(self, module: nn.Module) -> cpu.PackedWeight | None:
        """W for the CPU kernels. Schemes that these can read override this."""
        return None

    def apply_part(self, module: nn.Module, x: Tensor, start: int, end: int) -> Tensor:
        """Outputs [start, end) of ``apply`` alone, for a product that is to be taken in parts."""
        rows, packed = self.rows(module), self.packed(module)
        part = None if packed is None else packed.part(start, end)
        return quantized_linear(x, lambda s, e, dtype: rows(start + s, start + e, dtype), end - start, part)

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        """Rows of W for ids [T]: [T, in_features]. Schemes with cheap row access override this."""
        return self.dequantize(module)[ids]

    def after_loading(self, module: nn.Module) -> None:  # noqa: B027 - most schemes need nothing here
        """Repacks for fast kernels, once the tensors hold their values."""


class Unquantized(LinearScheme):
    """W as it is, in the compute type."""

    name = "none"
    is_plain = True

    def create_parameters(self, module: nn.Module, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        weight = torch.empty(out_features, in_features, dtype=dtype)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        if cpu.takes_rows(x) and (packed := self.packed(module)) is not None:
            return packed.linear(x)
        return linear(x, weight)

    def input_gradient(self, module: nn.Module, grad: Tensor) -> Tensor:
        return dense.input_gradient(grad, module.get_parameter("weight"))

    def apply_with_bias(self, module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        if is_divided(x, weight) or cpu.takes_rows(x):
            return super().apply_with_bias(module, x, bias)
        return F.linear(x, weight, bias)

    def packed(self, module: nn.Module) -> cpu.PackedWeight | None:
        weight = module.get_parameter("weight")
        return cpu.packed(module, weight, lambda: cpu.StoredWeight(weight))

    def apply_part(self, module: nn.Module, x: Tensor, start: int, end: int) -> Tensor:
        return linear(x, module.get_parameter("weight")[start:end])

    def dequantize(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return module.get_parameter("weight").to(dtype)

    def embed(self, module: nn.Module, ids: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        wants_gradient = weight.requires_grad and torch.is_grad_enabled()
        if weight.dtype == torch.float32 and not wants_gradient and cpu.takes_ids(ids):
            packed = self.packed(module)
            if packed is not None:
                return packed.gather(ids)
        return F.embedding(ids, weight)


UNQUANTIZED = Unquantized()

QuantMethod = type["SchemeMap"]
quant_methods: Registry[QuantMethod] = Registry("quantization method", "engine.quantization")
"""``quant_method`` of a config.json to the SchemeMap that reads it."""


class SchemeMap:
    """Which scheme each linear module of a model has. This base: none is quantized.

    Args:
        quantization_config: of config.json, or None.
    """

    name = "none"

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        self.quantization_config = quantization_config

    def for_module(self, name: str) -> LinearScheme:
        """Scheme of the module with that full name ("model.layers.0.self_attn.q_proj")."""
        return UNQUANTIZED


def scheme_map(quantization_config: Mapping[str, Any] | None) -> SchemeMap:
    """The SchemeMap for a config.json's ``quantization_config``.

    Raises:
        InvalidArgumentError: the quant_method is not supported.
    """
    if not quantization_config:
        return SchemeMap()
    return quant_methods.get(str(quantization_config.get("quant_method")))(quantization_config)
