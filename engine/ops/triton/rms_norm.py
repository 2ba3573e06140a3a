"""Root mean square normalisation of rows, with the weight shifted or not, with a SiLU gate or without.

Shapes: N rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton import rows_of

BLOCK_ELEMENTS = 2048
"""Numbers that a program holds where rows are narrow, so that heads of 128 do not take a program each."""


@triton.jit
def _rms_norm(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    width,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    eps,
    SHIFTED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program normalises ROWS whole rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    from_x = rows // x_inner * x_outer_stride + rows % x_inner * x_inner_stride
    x = tl.load(x_ptr + from_x[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if SHIFTED:
        weight += 1.0
    y = x / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)[:, None] * weight[None, :]
    if GATED:
        from_gate = rows // gate_inner * gate_outer_stride + rows % gate_inner * gate_inner_stride
        gate = tl.load(gate_ptr + from_gate[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(
    x_ptr,
    y_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    num_rows,
    width,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    y_inner,
    y_outer_stride,
    y_inner_stride,
    eps,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes ROWS whole rows. The norm is of the sum as it is stored."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    from_x = rows // x_inner * x_outer_stride + rows % x_inner * x_inner_stride
    from_y = rows // y_inner * y_outer_stride + rows % y_inner * y_inner_stride
    x = tl.load(x_ptr + from_x[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + from_y[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    stored = (x + y).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, stored, mask=inside)
    total = stored.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if SHIFTED:
        weight += 1.0
    out = total / tl.sqrt(tl.sum(total * total, axis=1) / width + eps)[:, None] * weight[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    x_ptr,
    gate_ptr,
    grad_ptr,
    weight_ptr,
    d_x_ptr,
    d_gate_ptr,
    num_rows,
    width,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    grad_inner,
    grad_outer_stride,
    grad_inner_stride,
    eps,
    SHIFTED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes ROWS whole rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    from_x = rows // x_inner * x_outer_stride + rows % x_inner * x_inner_stride
    from_grad = rows // grad_inner * grad_outer_stride + rows % grad_inner * grad_inner_stride
    x = tl.load(x_ptr + from_x[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    weighted = tl.load(grad_ptr + from_grad[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if SHIFTED:
        weight += 1.0
    weighted *= weight[None, :]
    inverse = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps))[:, None]
    if GATED:
        from_gate = rows // gate_inner * gate_outer_stride + rows % gate_inner * gate_inner_stride
        gate = tl.load(gate_ptr + from_gate[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        d_gate = weighted * x * inverse * s * (1.0 + gate * (1.0 - s))
        tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
        weighted *= gate * s
    along = (tl.sum(weighted * x, axis=1) / width)[:, None]
    d_x = inverse * (weighted - x * inverse * inverse * along)
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, shifted: bool = False, gate: Tensor | None = None) -> Tensor:
    """x [..., D], gate alike: in the type of gate, or of x without one."""
    like = x if gate is None else gate
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows == 0:
        return out
    x, *x_rows = rows_of(x)
    gate_or_x, *gate_rows = (x, *x_rows) if gate is None else rows_of(gate)
    block = triton.next_power_of_2(width)
    rows = max(1, min(BLOCK_ELEMENTS // block, triton.next_power_of_2(num_rows)))
    _rms_norm[(triton.cdiv(num_rows, rows),)](
        x,
        gate_or_x,
        weight,
        out,
        num_rows,
        width,
        *x_rows,
        *gate_rows,
        eps,
        SHIFTED=shifted,
        GATED=gate is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, *, shifted: bool = False) -> tuple[Tensor, Tensor]:
    """x + y and its norm, for x and y [..., D] of one type, which both are of."""
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows == 0:
        return total, out
    x, *x_rows = rows_of(x)
    y, *y_rows = rows_of(y)
    block = triton.next_power_of_2(width)
    rows = max(1, min(BLOCK_ELEMENTS // block, triton.next_power_of_2(num_rows)))
    _add_rms_norm[(triton.cdiv(num_rows, rows),)](
        x,
        y,
        weight,
        total,
        out,
        num_rows,
        width,
        *x_rows,
        *y_rows,
        eps,
        SHIFTED=shifted,
        ROWS=rows,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return total, out


def rms_norm_backward(
    x: Tensor, weight: Tensor, grad: Tensor, eps: float, *, shifted: bool = False, gate: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and gate, in their types, for that of ``rms_norm``'s result, [..., D]."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows == 0:
        return d_x, d_gate
    x, *x_rows = rows_of(x)
    gate_or_x, *gate_rows = (x, *x_rows) if gate is None else rows_of(gate)
    grad, *grad_rows = rows_of(grad)
    block = triton.next_power_of_2(width)
    rows = max(1, min(BLOCK_ELEMENTS // block, triton.next_power_of_2(num_rows)))
    _rms_norm_backward[(triton.cdiv(num_rows, rows),)](
        x,
        gate_or_x,
        grad,
        weight,
        d_x,
        d_x if d_gate is None else d_gate,
        num_rows,
        width,
        *x_rows,
        *gate_rows,
        *grad_rows,
        eps,
        SHIFTED=shifted,
        GATED=gate is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return d_x, d_gate
