"""Attention of one new token per sequence over the block cache, and the writing of that cache.

The keys of a sequence are shared out among several programs, each of which takes the softmax of its part as the keys
come (arXiv:2205.14135); a second kernel brings the parts together, weighed by their sums of exponentials
(flash-decoding: pytorch.org/blog/flash-decoding). The grids depend on the shapes alone and every length is read on the
device, so a captured launch can be replayed for sequences of other lengths.

Shapes: T tokens, S sequences, H_q query heads, H_kv key/value heads, G = H_q / H_kv, D head_dim, B blocks of the cache,
P block size, W width of the block tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""As many programs keep a large GPU busy; keys are split no further than that."""

MAX_SPLITS = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    rows_ptr,
    tables_ptr,
    lens_ptr,
    parts_ptr,
    sums_ptr,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    table_stride,
    block_stride,
    token_stride,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program takes the G queries that share a key head over one part of the keys. WINDOW 0: all keys are seen. With
    one split the result goes out by rows; else as parts [S, H_q, SPLITS, D] with sums [S, H_q, SPLITS] (log2)."""
    s = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(rows_ptr + s).to(tl.int64)
    kv_len = tl.load(lens_ptr + s).to(tl.int32)
    first = tl.maximum(kv_len - WINDOW, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(kv_len - first, TILE), SPLITS) * TILE
    begin = first + split * share
    end = tl.minimum(begin + share, kv_len)

    gs = tl.arange(0, BLOCK_G)
    ds = tl.arange(0, BLOCK_D)
    in_g, in_d = gs < GROUPS, ds < HEAD_DIM
    in_q = in_g[:, None] & in_d[None, :]
    heads = head * GROUPS + gs
    q = tl.load(q_ptr + row * q_row_stride + heads[:, None] * q_head_stride + ds[None, :], mask=in_q, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    out = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        inside = positions < end
        block = tl.load(tables_ptr + s * table_stride + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = block * block_stride + (positions % BLOCK_SIZE) * token_stride + head * HEAD_DIM
        k = tl.load(keys_ptr + at[None, :] + ds[:, None], mask=in_d[:, None] & inside[None, :], other=0.0)
        v = tl.load(values_ptr + at[:, None] + ds[None, :], mask=inside[:, None] & in_d[None, :], other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            # tanh, in a form that does not overflow
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(inside[None, :], scores * LOG2_E, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    seen = total > 0.0  # a part without keys has no weight
    out = out / tl.where(seen, total, 1.0)[:, None]
    if SPLITS == 1:
        to = parts_ptr + row * out_row_stride + heads[:, None] * out_head_stride + ds[None, :]
        tl.store(to, out.to(parts_ptr.dtype.element_ty), mask=in_q)
    else:
        part = (s * (tl.num_programs(1) * GROUPS) + heads) * SPLITS + split
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + ds[None, :], out, mask=in_q)
        sums = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), -float("inf"))
        tl.store(sums_ptr + part, sums, mask=in_g)


@triton.jit
def _merge(
    parts_ptr,
    sums_ptr,
    rows_ptr,
    out_ptr,
    out_row_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program brings the parts of one query head together. Some part has keys, so the largest sum is finite."""
    s = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(rows_ptr + s).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    ds = tl.arange(0, BLOCK_D)
    in_d = ds < HEAD_DIM
    first = (s * tl.num_programs(1) + head) * SPLITS
    sums = tl.load(sums_ptr + first + splits)
    weights = tl.exp2(sums - tl.max(sums, axis=0))
    parts = tl.load(parts_ptr + (first + splits)[:, None] * HEAD_DIM + ds[None, :], mask=in_d[None, :], other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    to = out_ptr + row * out_row_stride + head * out_head_stride + ds
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=in_d)


@triton.jit
def _store(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    width,
    BLOCK: tl.constexpr,
):
    """A program writes BLOCK numbers of a token's keys, and of its values."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    k = tl.load(k_ptr + t * k_stride + columns, mask=inside)
    v = tl.load(v_ptr + t * v_stride + columns, mask=inside)
    tl.store(keys_ptr + slot * width + columns, k, mask=inside)
    tl.store(values_ptr + slot * width + columns, v, mask=inside)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes k and v [T, H_kv, D] into a layer's cache [B, P, H_kv, D], each token at slots [T], block * P + offset."""
    num_tokens, num_heads, head_dim = k.shape
    assert keys.is_contiguous()
    assert values.is_contiguous()
    for x in (k, v):
        assert x.stride(2) == 1
        assert x.stride(1) == head_dim
    width = num_heads * head_dim
    block = min(1024, triton.next_power_of_2(width))
    _store[(num_tokens, triton.cdiv(width, block))](
        k, v, keys, values, slots, k.stride(0), v.stride(0), width, BLOCK=block, num_warps=4
    )


def num_splits(num_sequences: int, num_kv_heads: int, max_tokens: int, tile: int) -> int:
    """Parts of a sequence's keys: a power of 2, from what is known without any length."""
    most = min(PROGRAMS // (num_sequences * num_kv_heads), MAX_SPLITS, -(-max_tokens // tile))
    return 1 << max(most, 1).bit_length() - 1


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    tables: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Attention of some rows of q over the cached tokens of their sequences, themselves included.

    Args:
        q: [T, H_q, D].
        keys, values: [B, P, H_kv, D], of one layer.
        rows: [S] int64, each sequence's row of q and out.
        tables: [S, W] int32, blocks of each sequence in order.
        kv_lens: [S] int64, tokens that each row sees, from 1 to W P.
        out: [T, H_q, D], written at those rows.
        window: tokens that a query sees, itself included.
        softcap: scores become softcap * tanh(scores / softcap).
    """
    num_sequences, width = tables.shape
    _, block_size, num_kv_heads, head_dim = keys.shape
    num_heads = q.shape[1]
    groups = num_heads // num_kv_heads
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert tables.stride(1) == q.stride(2) == out.stride(2) == 1
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = 64 if block_d <= 128 else 32
    splits = num_splits(num_sequences, num_kv_heads, width * block_size, tile)
    if splits == 1:
        parts, sums = out, out
    else:
        parts = torch.empty(num_sequences, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(num_sequences, num_heads, splits, dtype=torch.float32, device=q.device)
    _attend[(num_sequences, num_kv_heads, splits)](
        q,
        keys,
        values,
        rows,
        tables,
        kv_lens,
        parts,
        sums,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        scale,
        0.0 if softcap is None else softcap,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        SPLITS=splits,
        TILE=tile,
        BLOCK_G=max(16, triton.next_power_of_2(groups)),
        BLOCK_D=block_d,
        # The interpreter multiplies no matrices of bfloat16.
        WIDE=not isinstance(_attend, triton.JITFunction),
        num_warps=4,
    )
    if splits > 1:
        _merge[(num_sequences, num_heads)](
            parts,
            sums,
            rows,
            out,
            out.stride(0),
            out.stride(1),
            HEAD_DIM=head_dim,
            SPLITS=splits,
            BLOCK_D=block_d,
            num_warps=4,
        )
