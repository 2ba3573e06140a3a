"""Multiplication by a weight that is stored narrow, and its gradient.

Shapes: O out_features, I in_features, N rows of the input, all leading dimensions taken together.

The weight is made wide a few rows at a time, used while those rows are in the processor's cache, and dropped. Nothing
of it is kept for the backward, which makes the rows again; so training over a quantized base needs no more memory for
weights than serving does.

Where the CPU kernels may round x to int8 (engine.ops.cpu.gemm), the forward is their product of integers, the one that
serving computes. The backward is that of the product by floats all the same: the gradient of x is exact for the stored
W, and the rounding of x, whose derivative is zero almost everywhere, counts as the identity (the straight-through
estimator, arXiv:1308.3432). Proof: tests/unit/test_rounded_training.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu

WeightRows = Callable[[int, int, torch.dtype], Tensor]
"""(start, end, dtype) to rows [end - start, I] of W in that type."""

CPU_CHUNK_ELEMENTS = 1 << 20
"""Elements of W that are wide at a time: 4 MiB of float32, which stays in the cache between making and using it."""

DEVICE_CHUNK_ELEMENTS = 1 << 27
"""The same on a GPU, where each chunk costs launches; bounds the memory for the largest heads alone."""


def quantized_linear(x: Tensor, rows: WeightRows, out_features: int, packed: cpu.PackedWeight | None = None) -> Tensor:
    """x W^T for a W that ``rows`` makes, differentiable with respect to x.

    Args:
        x: [..., I].
        rows: reads W; called again in the backward, so its tensors must not change in between.
        out_features: O.
        packed: the same W for the CPU kernels, which multiply by it, rounding x where they may, and give the gradient,
            all in float32; None: they cannot read it.

    Returns: [..., O] in the type of x, or of autocast where that is on; the product is that of W in that type.
    """
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # as F.linear does, but for W as well before it is made
    if x.requires_grad and torch.is_grad_enabled():
        return _QuantizedLinear.apply(x, rows, out_features, packed)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(x, rows, out_features, packed)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: WeightRows, out_features: int, packed: cpu.PackedWeight | None) -> Tensor:
        ctx.rows, ctx.packed = rows, packed
        return _forward(x, rows, out_features, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return input_gradient(grad, ctx.rows, ctx.packed), None, None, None


def input_gradient(grad: Tensor, rows: WeightRows, packed: cpu.PackedWeight | None = None) -> Tensor:
    """Of ``quantized_linear`` for x: grad [..., O] times W, [..., I]."""
    if packed is not None and cpu.takes(grad):
        return packed.product_transposed(grad)
    return _backward(grad, rows)


def _forward(x: Tensor, rows: WeightRows, out_features: int, packed: cpu.PackedWeight | None) -> Tensor:
    # Gradients are off here, also where x wants one.
    if packed is not None and packed.has_integers and cpu.takes_rounded(x):
        return packed.linear(x, rounds=True)
    if packed is not None and cpu.takes(x):
        return packed.product(x)
    step = _chunk_rows(x, x.shape[-1])
    if step >= out_features:
        return F.linear(x, rows(0, out_features, x.dtype))
    y = x.new_empty(*x.shape[:-1], out_features)
    for start in range(0, out_features, step):
        end = min(start + step, out_features)
        y[..., start:end] = F.linear(x, rows(start, end, x.dtype))
    return y


def _backward(grad: Tensor, rows: WeightRows) -> Tensor:
    """grad [..., O] times W: [..., I]."""
    out_features = grad.shape[-1]
    first = rows(0, 1, grad.dtype)
    step = _chunk_rows(grad, first.shape[-1])
    if step >= out_features:
        return grad @ rows(0, out_features, grad.dtype)
    # Partial sums of a narrow type would lose what the product of the whole keeps.
    total_dtype = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
    total = torch.zeros(*grad.shape[:-1], first.shape[-1], dtype=total_dtype, device=grad.device)
    for start in range(0, out_features, step):
        end = min(start + step, out_features)
        total += grad[..., start:end] @ rows(start, end, grad.dtype)
    return total.to(grad.dtype)


def _chunk_rows(like: Tensor, in_features: int) -> int:
    elements = CPU_CHUNK_ELEMENTS if like.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    return max(1, elements // in_features)


def unpack_int4(packed: Tensor, num_values: int) -> Tensor:
    """Signed 4-bit values from bytes of two, the lower half first, stored with an offset of 8.

    Args:
        packed: [..., P] of any integer type, read as little-endian bytes.
        num_values: values to take along the last dimension.

    Returns: [..., num_values] int8 in [-8, 7].
    """
    pairs = _as_bytes(packed)
    values = torch.empty(*pairs.shape, 2, dtype=torch.int8, device=packed.device)
    halves = values.view(torch.uint8)
    torch.bitwise_and(pairs, 15, out=halves[..., 0])
    torch.bitwise_right_shift(pairs, 4, out=halves[..., 1])
    return values.view(*pairs.shape[:-1], -1)[..., :num_values].sub_(8)


def unpack_int8(packed: Tensor, num_values: int) -> Tensor:
    """Signed bytes that are stored with an offset of 128; see unpack_int4."""
    return (_as_bytes(packed)[..., :num_values] ^ 128).view(torch.int8)


def _as_bytes(packed: Tensor) -> Tensor:
    """[..., P] integers as their bytes in memory."""
    # Flat, since a dimension of size 1 may have any stride, which view would mind.
    return packed.reshape(-1).view(torch.uint8).view(*packed.shape[:-1], -1)
