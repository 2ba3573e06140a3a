"""Low-rank updates of runs of rows, each run with an adapter of its own (the shape of prompts: arXiv:2311.03285).

Runs are cut into tiles of rows, and a program multiplies a tile, so that all runs of a module are two launches however
many there are. A first kernel makes x A^T in parts along the inputs, a second sums the parts and adds B times them.

Shapes: T rows, I inputs, O outputs, r rank, S runs, N tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 32
"""Rows of a tile."""

MAX_RANK = 256

PART = 1024
"""Inputs that a program goes through: more programs where there are few tiles."""


@triton.jit
def _shrink(
    x_ptr,
    tiles_ptr,
    addresses_ptr,
    ranks_ptr,
    parts_ptr,
    num_rows,
    x_stride,
    table_stride,
    rank_stride,
    width,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program multiplies PART inputs of a tile: parts [parts, T, BLOCK_R]."""
    tile = tiles_ptr + tl.program_id(0) * 3
    run = tl.load(tile)
    address = tl.load(addresses_ptr + run * table_stride)
    if address != 0:
        a_ptr = address.to(tl.pointer_type(x_ptr.dtype.element_ty))
        rank = tl.load(ranks_ptr + run * rank_stride)
        rows = tl.load(tile + 1) + tl.arange(0, TILE)
        in_rows = rows < tl.load(tile + 2)
        rs = tl.arange(0, BLOCK_R)
        low = tl.zeros([TILE, BLOCK_R], tl.float32)
        for start in range(0, PART, BLOCK_I):
            columns = tl.program_id(1) * PART + start + tl.arange(0, BLOCK_I)
            inside = columns < width
            x_at = x_ptr + rows[:, None] * x_stride + columns[None, :]
            x = tl.load(x_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
            a_at = a_ptr + rs[None, :] * width + columns[:, None]
            a = tl.load(a_at, mask=(rs < rank)[None, :] & inside[:, None], other=0.0)
            if WIDE:
                x, a = x.to(tl.float32), a.to(tl.float32)
            low += tl.dot(x, a, input_precision="ieee")
        at = (tl.program_id(1).to(tl.int64) * num_rows + rows[:, None]) * BLOCK_R + rs[None, :]
        tl.store(parts_ptr + at, low, mask=in_rows[:, None])


@triton.jit
def _expand(
    y_ptr,
    tiles_ptr,
    addresses_ptr,
    ranks_ptr,
    scalings_ptr,
    parts_ptr,
    num_rows,
    y_stride,
    table_stride,
    rank_stride,
    width,
    num_parts,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program adds to BLOCK_O outputs of a tile."""
    tile = tiles_ptr + tl.program_id(0) * 3
    run = tl.load(tile)
    address = tl.load(addresses_ptr + run * table_stride)
    if address != 0:
        b_ptr = address.to(tl.pointer_type(y_ptr.dtype.element_ty))
        rank = tl.load(ranks_ptr + run * rank_stride)
        rows = tl.load(tile + 1) + tl.arange(0, TILE)
        in_rows = rows < tl.load(tile + 2)
        rs = tl.arange(0, BLOCK_R)
        low = tl.zeros([TILE, BLOCK_R], tl.float32)
        for part in range(num_parts):
            at = (part * num_rows + rows[:, None]) * BLOCK_R + rs[None, :]
            low += tl.load(parts_ptr + at, mask=in_rows[:, None], other=0.0)
        low *= tl.load(scalings_ptr + run * rank_stride)
        outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside = outputs < width
        b_at = b_ptr + outputs[None, :] * rank + rs[:, None]
        b = tl.load(b_at, mask=inside[None, :] & (rs < rank)[:, None], other=0.0)
        if WIDE:
            b = b.to(tl.float32)
        y_at = y_ptr + rows[:, None] * y_stride + outputs[None, :]
        both = in_rows[:, None] & inside[None, :]
        y = tl.load(y_at, mask=both, other=0.0).to(tl.float32) + tl.dot(low.to(b.dtype), b, input_precision="ieee")
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=both)


def add_segments(
    y: Tensor, x: Tensor, tiles: Tensor, addresses: Tensor, ranks: Tensor, scalings: Tensor, max_rank: int
) -> None:
    """Adds to y [T, O] in place.

    Args:
        x: [T, I] in the type of y and of the factors.
        tiles: [N, 3] int64, contiguous: a run, the first of at most TILE_ROWS rows of it, and the end of the run.
        addresses: [S, 2] int64, of A [r, I] and B [O, r], contiguous; 0: the run's adapter has no such module.
        ranks, scalings: [S] int64 and float32, with one stride.
        max_rank: no rank is larger; at most MAX_RANK.
    """
    num_rows, inputs = x.shape
    outputs = y.shape[1]
    assert x.stride(1) == y.stride(1) == 1
    assert addresses.stride(1) == 1
    assert ranks.stride(0) == scalings.stride(0)
    assert max_rank <= MAX_RANK
    block_r = max(16, triton.next_power_of_2(max_rank))
    num_parts = triton.cdiv(inputs, PART)
    parts = torch.empty(num_parts, num_rows, block_r, dtype=torch.float32, device=x.device)
    a, b = addresses.unbind(1)
    # The interpreter multiplies no matrices of bfloat16.
    wide = not isinstance(_shrink, triton.JITFunction)
    _shrink[(len(tiles), num_parts)](
        x,
        tiles,
        a,
        ranks,
        parts,
        num_rows,
        x.stride(0),
        addresses.stride(0),
        ranks.stride(0),
        inputs,
        TILE=TILE_ROWS,
        PART=PART,
        BLOCK_R=block_r,
        BLOCK_I=64,
        WIDE=wide,
        num_warps=4,
    )
    block_o = min(64, max(16, triton.next_power_of_2(outputs)))
    _expand[(len(tiles), triton.cdiv(outputs, block_o))](
        y,
        tiles,
        b,
        ranks,
        scalings,
        parts,
        num_rows,
        y.stride(0),
        addresses.stride(0),
        ranks.stride(0),
        outputs,
        num_parts,
        TILE=TILE_ROWS,
        BLOCK_R=block_r,
        BLOCK_O=block_o,
        WIDE=wide,
        num_warps=4,
    )
