"""Low-rank updates of rows that each have an adapter of their own, or none (the shape of decoding: arXiv:2310.18547).

Factors are found by address, so adapters lie where they were loaded, and a captured launch serves whichever are in the
table then. A first kernel makes x A^T in parts along the inputs, a second sums the parts and adds B times them.

Shapes: T rows, I inputs, O outputs, r rank, N slots of adapters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
"""Numbers of a factor that a program holds at one time."""


@triton.jit
def _shrink(
    x_ptr,
    slots_ptr,
    addresses_ptr,
    ranks_ptr,
    parts_ptr,
    x_stride,
    table_stride,
    rank_stride,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A program multiplies BLOCK_I inputs of a row: parts [T, parts, BLOCK_R]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        address = tl.load(addresses_ptr + slot * table_stride)
        if address != 0:
            a_ptr = address.to(tl.pointer_type(x_ptr.dtype.element_ty))
            rank = tl.load(ranks_ptr + slot * rank_stride)
            rs = tl.arange(0, BLOCK_R)
            columns = part * BLOCK_I + tl.arange(0, BLOCK_I)
            inside = columns < width
            x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            both = (rs < rank)[:, None] & inside[None, :]
            a = tl.load(a_ptr + rs[:, None] * width + columns[None, :], mask=both, other=0.0).to(tl.float32)
            low = tl.sum(a * x[None, :], axis=1)
            tl.store(parts_ptr + (row * tl.num_programs(1) + part) * BLOCK_R + rs, low)


@triton.jit
def _expand(
    y_ptr,
    slots_ptr,
    addresses_ptr,
    ranks_ptr,
    scalings_ptr,
    parts_ptr,
    y_stride,
    table_stride,
    rank_stride,
    width,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """A program adds to BLOCK_O outputs of a row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        address = tl.load(addresses_ptr + slot * table_stride)
        if address != 0:
            b_ptr = address.to(tl.pointer_type(y_ptr.dtype.element_ty))
            rank = tl.load(ranks_ptr + slot * rank_stride)
            scaling = tl.load(scalings_ptr + slot * rank_stride)
            rs, ps = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
            at = (row * PARTS + ps[:, None]) * BLOCK_R + rs[None, :]
            low = tl.sum(tl.load(parts_ptr + at, mask=(ps < PARTS)[:, None], other=0.0), axis=0) * scaling
            outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
            inside = outputs < width
            both = inside[:, None] & (rs < rank)[None, :]
            b = tl.load(b_ptr + outputs[:, None] * rank + rs[None, :], mask=both, other=0.0).to(tl.float32)
            to = y_ptr + row * y_stride + outputs
            y = tl.load(to, mask=inside, other=0.0).to(tl.float32) + tl.sum(b * low[None, :], axis=1)
            tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_rows(
    y: Tensor, x: Tensor, slots: Tensor, addresses: Tensor, ranks: Tensor, scalings: Tensor, max_rank: int
) -> None:
    """Adds to y [T, O] in place.

    Args:
        x: [T, I] in the type of y and of the factors.
        slots: [T] int64, each row's adapter; -1: none.
        addresses: [N, 2] int64, of A [r, I] and B [O, r], contiguous; 0: the adapter has no such module.
        ranks, scalings: [N] int64 and float32, with one stride.
        max_rank: no rank is larger.
    """
    num_rows, inputs = x.shape
    outputs = y.shape[1]
    assert x.stride(1) == y.stride(1) == 1
    assert addresses.stride(1) == 1
    assert ranks.stride(0) == scalings.stride(0)
    block_r = triton.next_power_of_2(max_rank)
    block_i = min(max(TILE // block_r, 16), triton.next_power_of_2(inputs))
    block_o = min(max(TILE // block_r, 16), 256, triton.next_power_of_2(outputs))
    num_parts = triton.cdiv(inputs, block_i)
    parts = torch.empty(num_rows, num_parts, block_r, dtype=torch.float32, device=x.device)
    a, b = addresses.unbind(1)
    _shrink[(num_rows, num_parts)](
        x,
        slots,
        a,
        ranks,
        parts,
        x.stride(0),
        addresses.stride(0),
        ranks.stride(0),
        inputs,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_warps=4,
    )
    _expand[(num_rows, triton.cdiv(outputs, block_o))](
        y,
        slots,
        b,
        ranks,
        scalings,
        parts,
        y.stride(0),
        addresses.stride(0),
        ranks.stride(0),
        outputs,
        PARTS=num_parts,
        BLOCK_P=triton.next_power_of_2(num_parts),
        BLOCK_R=block_r,
        BLOCK_O=block_o,
        num_warps=4,
    )
