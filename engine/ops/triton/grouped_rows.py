"""A few rows times a weight of 4- or 8-bit integers in groups: each weight is read once, as it is stored.

    w = (q - zero) * scale + offset, a scale, zero and offset for each group along the inputs

Of two 4-bit values a byte, the lower half is the first. So the even inputs are multiplied by the lower halves and the
odd ones by the upper, and no value changes its place.

Shapes: T rows, I inputs, O outputs, S group size, G = I / S groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 256
"""Beyond it products take longer than making the weight wide, which lets them run in the libraries."""


@triton.jit
def _spread(ptr, at, inside, SHARE: tl.constexpr):
    """Numbers [O, G] of groups as [O, G * SHARE]: one for each of a group's columns."""
    numbers = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    wide = tl.broadcast_to(numbers[:, :, None], [numbers.shape[0], numbers.shape[1], SHARE])
    return tl.reshape(wide, [numbers.shape[0], numbers.shape[1] * SHARE])


@triton.jit
def _grouped_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    offset_ptr,
    y_ptr,
    num_rows,
    inputs,
    outputs,
    x_stride,
    PER_BYTE: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program takes BLOCK_O outputs of ROWS rows, BLOCK_G groups at a time."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows, in_columns = rows < num_rows, columns < outputs
    groups = inputs // GROUP
    width = inputs // PER_BYTE
    SHARE: tl.constexpr = GROUP // PER_BYTE
    BLOCK_B: tl.constexpr = BLOCK_G * SHARE
    sums = tl.zeros([ROWS, BLOCK_O], tl.float32)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        of_groups = columns[:, None] * groups + group[None, :]
        in_groups = in_columns[:, None] & (group < groups)[None, :]
        scale = _spread(scale_ptr, of_groups, in_groups, SHARE)
        at = start * SHARE + tl.arange(0, BLOCK_B)
        inside = at < width
        stored = tl.load(
            weight_ptr + columns[:, None] * width + at[None, :], mask=in_columns[:, None] & inside[None, :], other=0
        )
        less = scale * SHIFT
        if HAS_ZERO:
            less += _spread(zero_ptr, of_groups, in_groups, SHARE) * scale
        if HAS_OFFSET:
            less -= _spread(offset_ptr, of_groups, in_groups, SHARE)
        of_x = x_ptr + rows[:, None] * x_stride + at[None, :] * PER_BYTE
        in_x = in_rows[:, None] & inside[None, :]
        for half in tl.static_range(PER_BYTE):
            values = stored
            if PER_BYTE == 2:
                values = (stored >> (4 * half)) & 15
            x = tl.load(of_x + half, mask=in_x, other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            weight = (values.to(tl.float32) * scale - less).to(x.dtype)
            sums += tl.dot(x, tl.trans(weight), input_precision="ieee")
    tl.store(
        y_ptr + rows[:, None] * outputs + columns[None, :],
        sums.to(y_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def takes(x: Tensor) -> bool:
    """Whether ``linear`` is for inputs of that shape."""
    return x.stride(-1) == 1 and 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    offset: Tensor | None = None,
    shift: int = 0,
) -> Tensor:
    """x w^T: [..., O] in the type of x, in which the weight is rounded.

    Args:
        x: [..., I].
        values: [O, I] int8, or [O, I / 2] uint8 of two values a byte, each q + shift.
        scale: [O, G], of any floating type; S a power of 2, at least 16.
        zero, offset: [O, G], of any floating types; None: 0.
    """
    inputs = x.shape[-1]
    outputs, groups = scale.shape
    group, per_byte = inputs // groups, 2 if values.dtype == torch.uint8 else 1
    assert values.shape == (outputs, inputs // per_byte)
    assert all(t is None or t.is_contiguous() for t in (values, scale, zero, offset))
    assert group * groups == inputs
    assert group >= 16
    flat = x.reshape(-1, inputs)
    num_rows = len(flat)
    y = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    rows = min(64, max(16, triton.next_power_of_2(num_rows)))
    # Narrow blocks where there are few rows, so that a small weight too is read by all of a GPU.
    block_o = 16 if rows == 16 and outputs <= 8192 else 64
    _grouped_rows[(triton.cdiv(outputs, block_o), triton.cdiv(num_rows, rows))](
        flat,
        values,
        scale,
        scale if zero is None else zero,
        scale if offset is None else offset,
        y,
        num_rows,
        inputs,
        outputs,
        flat.stride(0),
        PER_BYTE=per_byte,
        SHIFT=shift,
        GROUP=group,
        HAS_ZERO=zero is not None,
        HAS_OFFSET=offset is not None,
        ROWS=rows,
        BLOCK_O=block_o,
        BLOCK_G=max(1, 128 * per_byte // group),  # 128 bytes of a row at a time
        # The interpreter multiplies no matrices of bfloat16.
        WIDE=not isinstance(_grouped_rows, triton.JITFunction),
        num_warps=4,
    )
    return y.view(*x.shape[:-1], outputs)
