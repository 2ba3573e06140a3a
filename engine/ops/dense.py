"""Multiplication by a weight that is stored as it is, for few rows of input as for many.

Shapes: M rows of the input, I in_features, O out_features, P parts.

A product of few rows is bound by reading W. On a CPU, torch's ``F.linear`` then reads it with one thread: MKL does not
divide a product of a matrix and a vector, and divides those of few vectors badly. Cut along its outputs, W becomes a
batch of P smaller products that threads share: nothing is copied or repacked, so the weight stays the one that the
checkpoint's memory map holds, and training and every other reader use it as it is.

A product of more rows is the CPU kernels' where they are there, in both directions: MKL lays W^T out anew from rows
that lie whole pages apart. With 24 to 256 rows and W of Qwen3.5-0.8B, ``F.linear`` took 1.1 to 1.5 times as long on one
thread of a Zen 3, and 1.25 to 1.55 times on two threads that others disturb; with 512, 1.05. Proof:
tests/unit/test_dense.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu

MAX_ROWS = 16
"""Rows up to which the divided product is used."""

MIN_ELEMENTS = 1 << 19
"""Elements of W from which waking a thread pays for itself."""

PARTS = 4


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed: [..., O]; differentiable like ``linear_reference``.

    On two threads of a busy Zen 3, ``F.linear`` took 0.8 to 1.9 times as long with one row (the gain grows with W), and
    1.3 to 4.2 times with 2 to 16 (shapes of SmolLM2-135M and Qwen3.5-0.8B).
    """
    if is_divided(x, weight):
        return linear_divided(x, weight, left=_weight_is_left(x, weight))
    if _kernel_takes(x, weight):
        if x.requires_grad and torch.is_grad_enabled():
            return _Linear.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]
        return _product(x, weight)
    return linear_reference(x, weight)


def _kernel_takes(x: Tensor, weight: Tensor) -> bool:
    """More rows than are divided, on the CPU, of a frozen W whose rows lie end to end; in float64 a gradient is that of
    torch's product, so that the way of it can be checked."""
    if not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and weight.is_contiguous()):
        return False
    if x.numel() <= MAX_ROWS * x.shape[-1] or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    if x.dtype == torch.float64:
        return x.requires_grad
    return x.dtype == torch.float32 and cpu.available() and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if not cpu.takes(x.detach(), weight):
        return F.linear(x, weight)
    return cpu.PackedWeight(cpu.StoredWeight(weight), weight.shape[1]).product(x)


class _Linear(torch.autograd.Function):
    """dx = dy W; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return input_gradient(grad, *ctx.saved_tensors), None


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Of ``linear`` for x: grad [..., O] times W, [..., I]."""
    if grad.numel() <= MAX_ROWS * grad.shape[-1] or not weight.is_contiguous() or not cpu.takes(grad, weight):
        return grad @ weight
    return cpu.PackedWeight(cpu.StoredWeight(weight), weight.shape[1]).product_transposed(grad)


def is_divided(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` divides that product."""
    return (
        0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and weight.numel() >= MIN_ELEMENTS
        and weight.dtype == x.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.shape[0] % PARTS == 0
        and not torch.is_autocast_enabled("cpu")
        and (torch.get_num_threads() > 1 or _weight_is_left(x, weight))
    )


def _weight_is_left(x: Tensor, weight: Tensor) -> bool:
    """With W as the left factor, MKL passes over it once for all rows; that is the faster for these."""
    num_rows = x.numel() // x.shape[-1]
    return num_rows == 4 or (num_rows in (2, 3) and weight.shape[0] >= weight.shape[1])


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """torch's product."""
    return F.linear(x, weight)


def linear_divided(x: Tensor, weight: Tensor, *, left: bool) -> Tensor:
    """The same in PARTS products, which must divide O; ``left`` says on which side W stands."""
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    num_rows = flat.shape[0]
    parts = weight.view(PARTS, out_features // PARTS, in_features)
    if left:
        y = torch.bmm(parts, flat.t().expand(PARTS, in_features, num_rows)).permute(2, 0, 1)
    else:
        y = torch.bmm(flat.expand(PARTS, num_rows, in_features), parts.mT).transpose(0, 1)
    return y.reshape(*x.shape[:-1], out_features)
