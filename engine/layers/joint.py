"""Linears that share an input, as one product.

A GPU takes about as long to begin a product as to make one of a decode step, and a CPU is slow at narrow products, as
small encoders have them (1,021 rows, one thread of a Zen 3: three of 384 x 384 take 1.15 times as long as one of
1,152 x 384). So q, k and v, or gate and up, are multiplied at once: their weights are laid side by side in one tensor,
of which each linear's own is a view. Weights of integers stay as they are, but where many rows of x are rounded for the
product, they are rounded once for all. Nothing else changes: names, adapters and training know the linears one by one.

Shapes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.context import ForwardContext
from engine.layers.linear import Linear
from engine.ops import cpu


class JointLinears:
    """Several linears of one input. No module itself, so that a layer's parameters keep their names."""

    def __init__(self, *linears: Linear) -> None:
        self._linears = linears
        self._sizes = [linear.out_features for linear in linears]
        self._joined: Linear | None = None

    def join(self) -> bool:
        """Lays the weights side by side. Returns whether they can be: floats of one type, all with a bias or none."""
        linears = self._linears
        biases = [linear.bias for linear in linears]
        schemes = {linear.scheme for linear in linears}
        if len(schemes) > 1 or len({b is None for b in biases}) > 1:
            return False
        scheme = schemes.pop()
        if not scheme.is_plain:
            return False
        weights = [linear.get_parameter("weight") for linear in linears]
        if len({(w.dtype, w.device, w.shape[1]) for w in weights}) > 1:
            return False
        given = [b for b in biases if b is not None]
        inputs, outputs = linears[0].in_features, sum(self._sizes)
        with torch.device("meta"):
            joined = Linear(inputs, outputs, name="joined", bias=bool(given), scheme=scheme, lora=False)
        joined.weight = nn.Parameter(_side_by_side(weights), requires_grad=False)
        if given:
            joined.bias = nn.Parameter(_side_by_side(given), requires_grad=False)
        self._joined = joined
        return True

    def __call__(self, x: Tensor, ctx: ForwardContext) -> list[Tensor]:
        """x [T, I]: the linears' outputs, each [T, O]; rows of one tensor where they are joined."""
        # Training takes products one by one: each is one function with its update, and keeps nothing of the others.
        # And a few rows on a CPU have a kernel that reads each weight once.
        if torch.is_grad_enabled() or cpu.takes_rows(x):
            return [linear(x, ctx) for linear in self._linears]
        if self._joined is None or not self._is_current():
            return self._rounded_once(x, ctx)
        parts = torch.split(self._joined(x, ctx), self._sizes, dim=-1)
        return [linear.add_lora(x, y, ctx) for linear, y in zip(self._linears, parts, strict=True)]

    def _rounded_once(self, x: Tensor, ctx: ForwardContext) -> list[Tensor]:
        packed = [linear.scheme.packed(linear) for linear in self._linears] if cpu.takes_rounded(x) else []
        rounding = {i: weight for i, weight in enumerate(packed) if weight is not None and weight.has_integers}
        if len(rounding) < 2:
            return [linear(x, ctx) for linear in self._linears]
        products = dict(zip(rounding, cpu.rounded_products(x, list(rounding.values())), strict=True))
        return [
            linear.finish(x, products[i], ctx) if i in products else linear(x, ctx)
            for i, linear in enumerate(self._linears)
        ]

    def _is_current(self) -> bool:
        """Whether nobody has given the first linear another weight since."""
        assert self._joined is not None
        weight = self._joined.get_parameter("weight")
        return self._linears[0].get_parameter("weight").data_ptr() == weight.data_ptr()


def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    joined = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, torch.split(joined, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def join_linears(model: nn.Module) -> int:
    """Joins what layers have declared to be joint. Returns how many products that saves in a forward."""
    saved = 0
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, JointLinears) and value.join():
                saved += len(value._sizes) - 1
    return saved
