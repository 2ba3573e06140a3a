"""Division by the root of a sum of squares: what RMSNorm and the length of keys and queries have in common.

    y = x r scale w,  r = 1 / sqrt(sum(x^2) / count + eps)

with count D for the root mean square (arXiv:1910.07467) and 1 for the length. ``root_norm_reference`` is that in
plain operations; ``root_norm`` computes the same with fewer, and has a backward of its own that keeps x and r alone
where autograd keeps five tensors of the size of x. On the CPU the root mean square has kernels for both directions,
those of serving in the forward. Proof: tests/unit/test_norm.py and test_cpu_gradients.py.

Shapes: D the last axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu


def root_norm_reference(x: Tensor, weight: Tensor | None, *, count: int, eps: float, scale: float = 1.0) -> Tensor:
    """See ``root_norm``."""
    y = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) / count + eps) * scale
    return y if weight is None else y * weight


def root_norm(x: Tensor, weight: Tensor | None, *, count: int, eps: float, scale: float = 1.0) -> Tensor:
    """Normalises over the last axis, in the type of x.

    Args:
        x: [..., D], float32 or float64.
        weight: [D] in the type of x, or None for ones.
    """
    if torch.is_grad_enabled():
        if weight is not None and weight.requires_grad:
            return root_norm_reference(x, weight, count=count, eps=eps, scale=scale)
        if x.requires_grad:
            return _RootNorm.apply(x, weight, count, eps, scale)  # type: ignore[no-any-return, no-untyped-call]
    return _scaled(x, _inverse_root(x, count, eps), weight, scale)


def _inverse_root(x: Tensor, count: int, eps: float) -> Tensor:
    """r, [..., 1]."""
    return x.square().sum(dim=-1, keepdim=True).div_(count).add_(eps).rsqrt_()


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor | None, scale: float) -> Tensor:
    # In the order of the plain operations, so that results are equal to the last bit.
    y = x * inverse
    if scale != 1.0:
        y.mul_(scale)
    return y if weight is None else y.mul_(weight)


class _RootNorm(torch.autograd.Function):
    """dx = r h - x r^3 / count sum(h x) with h = scale w dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, count: int, eps: float, scale: float) -> Tensor:
        ctx.count, ctx.eps, ctx.scale = count, eps, scale
        if weight is not None and count == x.shape[-1] and scale == 1.0 and cpu.takes(x, weight):
            ctx.save_for_backward(x, None, weight)
            return cpu.rms_norm(x, weight, eps, shifted=False)
        inverse = _inverse_root(x, count, eps)
        ctx.save_for_backward(x, inverse, weight)
        return _scaled(x, inverse, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, inverse, weight = ctx.saved_tensors
        if inverse is None:
            return cpu.rms_norm_gradient(x, weight, grad, ctx.eps)[0], None, None, None, None
        weighted = grad if weight is None else grad * weight
        along = (weighted * x).sum(dim=-1, keepdim=True)
        along.mul_(inverse.pow(3)).mul_(-ctx.scale / ctx.count)
        return (weighted * (inverse * ctx.scale)).addcmul_(x, along), None, None, None, None
