"""Rotary position embedding of all heads of a token in one pass (arXiv:2104.09864), dimension i paired with i + R / 2.

Shapes: T tokens, H heads, D head_dim, R rotated dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes ROWS heads of a token. What is not rotated is copied."""
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ds = tl.arange(0, BLOCK)
    inside = (heads < HEADS)[:, None] & (ds < HEAD_DIM)[None, :]
    half: tl.constexpr = ROTATED // 2
    turned = ds < ROTATED
    partner = tl.where(ds < half, ds + half, ds - half)
    row = x_ptr + t * token_stride + heads[:, None] * head_stride
    x = tl.load(row + ds[None, :], mask=inside, other=0.0)
    other = tl.load(row + partner[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
    # Rounded to the type of x, as the torch form has them.
    cos = tl.load(cos_ptr + t * ROTATED + ds, mask=turned, other=1.0).to(x.dtype).to(tl.float32)
    sin = tl.load(sin_ptr + t * ROTATED + ds, mask=turned, other=0.0).to(x.dtype).to(tl.float32)
    sin = tl.where(ds < half, -sin, sin)
    y = x.to(tl.float32) * cos[None, :] + other * sin[None, :]
    to = out_ptr + (t * HEADS + heads[:, None]) * HEAD_DIM + ds[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=inside)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As engine.layers.rope.apply_rope; cos and sin [T, R] float32, contiguous."""
    num_tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    assert x.stride(2) == 1
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    block = triton.next_power_of_2(head_dim)
    rows = min(triton.next_power_of_2(heads), max(1, 1024 // block))
    _rope[(num_tokens, triton.cdiv(heads, rows))](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        HEADS=heads,
        HEAD_DIM=head_dim,
        ROTATED=cos.shape[-1],
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    return out
