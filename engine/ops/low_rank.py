"""The low-rank update of a product by a frozen weight, as training needs it.

    y = x W^T + scaling B A x

Autograd's way copies the product to add to it, keeps the scaled and the unscaled A x, and adds up two gradients of x.
Here the product, which nothing else needs, is written in place; x and scaling A x are kept; and the update's gradient
of x is added in the place of the product's. The CPU kernels make one pass forward, over x and y, and one back, over x
and the gradient of y. In torch's form, which is their reference, the rank is the left factor's height in all products
but one: MKL is two to four times as fast with few rows as with few columns. Proof: tests/unit/test_low_rank.py.

Shapes: T tokens, I in_features, O out_features, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.context import FrozenProduct
from engine.ops import cpu


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y [T, O] plus the update for x [T, I], out of place.

    Args:
        a: [r, I], b: [O, r], of any floating type; they are multiplied in that of x.
    """
    return torch.addmm(y, F.linear(x, a.to(x.dtype)) * scaling, b.to(x.dtype).mT)


def low_rank_linear(
    layer: FrozenProduct, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropped: Tensor | None = None
) -> Tensor:
    """The product for x [T, I] plus the update: [T, O], differentiable once with respect to x, dropped, A and B.

    Args:
        a, b: see ``add_low_rank``, which with the product is the reference.
        dropped: [T, I], what the update is for; None: x.
    """
    tensors = (x, a, b) if dropped is None else (x, a, b, dropped)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Under autocast the product and x differ in type.
    if wanted and not torch.is_autocast_enabled(x.device.type):
        return _LowRankLinear.apply(x, dropped, a, b, scaling, layer)  # type: ignore[no-any-return, no-untyped-call]
    return add_low_rank(layer.product(x), x if dropped is None else dropped, a, b, scaling)


class _LowRankLinear(torch.autograd.Function):
    """With l = scaling A x and dl = scaling B^T dy: dx = dy W + A^T dl, dA = dl x^T, dB = dy l^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, scaling: float, layer: FrozenProduct
    ) -> Tensor:
        y = layer.product(x)
        given = x if dropped is None else dropped
        if y.is_contiguous() and _kernel_takes(y, given, a, b):
            low = cpu.low_rank(y, given, a, b, scaling).mT  # [r, T]
        else:
            low = (a.to(given.dtype) @ given.mT).mul_(scaling)
            y.addmm_(low.mT, b.to(given.dtype).mT.contiguous())
        ctx.save_for_backward(given, low, a, b)
        ctx.scaling, ctx.layer, ctx.is_dropped = scaling, layer, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, low, a, b = ctx.saved_tensors
        needs_x, needs_dropped, needs_a, needs_b, _, _ = ctx.needs_input_grad
        d_x = ctx.layer.input_gradient(grad) if needs_x else None
        d_dropped = torch.zeros_like(given) if ctx.is_dropped and needs_dropped else None
        d_given = d_dropped if ctx.is_dropped else d_x
        tensors = (grad, given, low, a, b) if d_given is None else (grad, given, low, a, b, d_given)
        if needs_a and needs_b and _kernel_takes(*tensors) and (d_given is None or d_given.is_contiguous()):
            of_both = cpu.low_rank_gradient(grad, given, low.mT, a, b, ctx.scaling, d_given)
            return d_x, d_dropped, *of_both, None, None
        d_low = (b.to(grad.dtype).mT.contiguous() @ grad.mT).mul_(ctx.scaling)  # [r, T]
        if d_given is not None:
            d_given.addmm_(d_low.mT, a.to(grad.dtype))
        of_a = (d_low @ given).to(a.dtype) if needs_a else None
        of_b = (low @ grad).mT.to(b.dtype) if needs_b else None
        return d_x, d_dropped, of_a, of_b, None, None


def _kernel_takes(*tensors: Tensor) -> bool:
    return cpu.takes(*tensors) and all(t.numel() > 0 for t in tensors)
