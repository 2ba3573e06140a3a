"""The low-rank update of a product by a frozen weight, as training needs it.

    y += scaling B A x

Autograd's way copies y to add to it and keeps the scaled and the unscaled A x. Here y, which nothing else needs, is
written in place; x and scaling A x are kept, and the backward is four products. The CPU kernels make one pass forward,
over x and y, and one back, over x and the gradient of y. In torch's form, which is their reference, the rank is the
left factor's height in all products but one: MKL is two to four times as fast with few rows as with few columns.
Proof: tests/unit/test_low_rank.py.

Shapes: T tokens, I in_features, O out_features, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu


def add_low_rank_reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """See ``add_low_rank``; out of place."""
    return torch.addmm(y, F.linear(x, a.to(x.dtype)) * scaling, b.to(x.dtype).mT)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y plus the update for x, differentiable once with respect to y, x, A and B.

    Args:
        y: [T, O]; overwritten where that is possible, so the caller must not use it again.
        x: [T, I].
        a: [r, I], b: [O, r], of any floating type; they are multiplied in that of x.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, a, b))
    # A view cannot be written by a Function; under autocast y and x differ in type.
    if wanted and y.dtype == x.dtype and not y._is_view() and not torch.is_autocast_enabled(x.device.type):
        return _AddLowRank.apply(y, x, a, b, scaling)  # type: ignore[no-any-return, no-untyped-call]
    return add_low_rank_reference(y, x, a, b, scaling)


class _AddLowRank(torch.autograd.Function):
    """With l = scaling A x and dl = scaling B^T dy: dx = A^T dl, dA = dl x^T, dB = dy l^T; y is handed on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.mark_dirty(y)
        if y.is_contiguous() and _kernel_takes(y, x, a, b):
            low = cpu.low_rank(y, x, a, b, scaling).mT  # [r, T]
        else:
            low = (a.to(x.dtype) @ x.mT).mul_(scaling)
            y.addmm_(low.mT, b.to(x.dtype).mT.contiguous())
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        if needs_a and needs_b and _kernel_takes(grad, x, low, a, b):
            return grad, *cpu.low_rank_gradient(grad, x, low.mT, a, b, ctx.scaling, wants_x=needs_x), None
        d_low = (b.to(grad.dtype).mT.contiguous() @ grad.mT).mul_(ctx.scaling)  # [r, T]
        d_x = d_low.mT @ a.to(grad.dtype) if needs_x else None
        d_a = (d_low @ x).to(a.dtype) if needs_a else None
        d_b = (low @ grad).mT.to(b.dtype) if needs_b else None
        return grad, d_x, d_a, d_b, None


def _kernel_takes(*tensors: Tensor) -> bool:
    return cpu.takes(*tensors) and all(t.numel() > 0 for t in tensors)
