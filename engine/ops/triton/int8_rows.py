"""A few rows times a weight of int8 with a scale per output: each weight is read once, as it is stored.

Shapes: T rows, I inputs, O outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 256
"""Beyond it products take longer than making the weight wide, which lets them run in the libraries."""


@triton.jit
def _int8_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    num_rows,
    inputs,
    outputs,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program takes BLOCK_O outputs of ROWS rows."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows, in_columns = rows < num_rows, columns < outputs
    sums = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for start in range(0, inputs, BLOCK_I):
        at = start + tl.arange(0, BLOCK_I)
        inside = at < inputs
        x = tl.load(x_ptr + rows[:, None] * x_stride + at[None, :], mask=in_rows[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + columns[None, :] * inputs + at[:, None], mask=inside[:, None] & in_columns[None, :], other=0
        )
        if WIDE:
            x = x.to(tl.float32)
        sums += tl.dot(x, weight.to(x.dtype), input_precision="ieee")
    scale = tl.load(scale_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    y = sums * scale[None, :]
    tl.store(
        y_ptr + rows[:, None] * outputs + columns[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def takes(x: Tensor) -> bool:
    """Whether ``linear`` is for inputs of that shape."""
    return x.stride(-1) == 1 and 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (weight * scale)^T: [..., O] in the type of x.

    Args:
        x: [..., I].
        weight: [O, I] int8.
        scale: [O, 1], of any floating type.
    """
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs)
    assert weight.is_contiguous()
    assert scale.is_contiguous()
    num_rows = len(flat)
    y = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    rows = min(64, max(16, triton.next_power_of_2(num_rows)))
    # Narrow blocks where there are few rows, so that a small weight too is read by all of a GPU.
    block_o = 16 if rows == 16 and outputs <= 8192 else 64
    _int8_rows[(triton.cdiv(outputs, block_o), triton.cdiv(num_rows, rows))](
        flat,
        weight,
        scale,
        y,
        num_rows,
        inputs,
        outputs,
        flat.stride(0),
        ROWS=rows,
        BLOCK_O=block_o,
        BLOCK_I=128,
        # The interpreter multiplies no matrices of bfloat16.
        WIDE=not isinstance(_int8_rows, triton.JITFunction),
        num_warps=4,
    )
    return y.view(*x.shape[:-1], outputs)
