"""An activation times its neighbour, in one pass: SwiGLU and its relatives (arXiv:2002.05202).

Shapes: N rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton import rows_of

ACTIVATIONS = {"silu": 0, "swish": 0, "sigmoid": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2}
"""Names of engine.ops.elementwise.ACTIVATIONS to what the kernel knows them by."""


@triton.jit
def _gated_activation(
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    from_gate = row // gate_inner * gate_outer_stride + row % gate_inner * gate_inner_stride
    from_up = row // up_inner * up_outer_stride + row % up_inner * up_inner_stride
    gate = tl.load(gate_ptr + from_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + from_up + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        active = gate * tl.sigmoid(gate)
    elif KIND == 1:
        active = tl.sigmoid(gate)
    else:
        # (1 + tanh(u)) / 2 is sigmoid(2 u); u = sqrt(2 / pi) (x + 0.044715 x^3)
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out_ptr + row * width + columns, (active * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_activation_backward(
    gate_ptr,
    up_ptr,
    grad_ptr,
    d_gate_ptr,
    d_up_ptr,
    width,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    grad_inner,
    grad_outer_stride,
    grad_inner_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    from_gate = row // gate_inner * gate_outer_stride + row % gate_inner * gate_inner_stride
    from_up = row // up_inner * up_outer_stride + row % up_inner * up_inner_stride
    from_grad = row // grad_inner * grad_outer_stride + row % grad_inner * grad_inner_stride
    gate = tl.load(gate_ptr + from_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + from_up + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + from_grad + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        s = tl.sigmoid(gate)
        active, slope = gate * s, s * (1.0 + gate * (1.0 - s))
    elif KIND == 1:
        active = tl.sigmoid(gate)
        slope = active * (1.0 - active)
    else:
        s = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        active = gate * s
        slope = s + active * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    at = row * width + columns
    tl.store(d_gate_ptr + at, (slope * up * grad).to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + at, (active * grad).to(d_up_ptr.dtype.element_ty), mask=inside)


def gated_activation(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """As engine.ops.elementwise.gated_activation, for gate and up [..., D] of one shape and type."""
    width = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not out.numel():
        return out
    gate, *gate_rows = rows_of(gate)
    up, *up_rows = rows_of(up)
    block = min(1024, triton.next_power_of_2(width))
    _gated_activation[(out.numel() // width, triton.cdiv(width, block))](
        gate,
        up,
        out,
        width,
        *gate_rows,
        *up_rows,
        KIND=ACTIVATIONS[name],
        BLOCK=block,
        num_warps=4,
    )
    return out


def gated_activation_backward(gate: Tensor, up: Tensor, grad: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, [..., D] in their types, for that of ``gated_activation``'s result."""
    width = gate.shape[-1]
    d_gate, d_up = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    if not d_gate.numel():
        return d_gate, d_up
    gate, *gate_rows = rows_of(gate)
    up, *up_rows = rows_of(up)
    grad, *grad_rows = rows_of(grad)
    block = min(1024, triton.next_power_of_2(width))
    _gated_activation_backward[(d_gate.numel() // width, triton.cdiv(width, block))](
        gate,
        up,
        grad,
        d_gate,
        d_up,
        width,
        *gate_rows,
        *up_rows,
        *grad_rows,
        KIND=ACTIVATIONS[name],
        BLOCK=block,
        num_warps=4,
    )
    return d_gate, d_up
