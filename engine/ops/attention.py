"""Attention over packed tokens, with or without the block cache.

Shapes: T tokens, S sequences, H_q query heads, H_kv key/value heads, G = H_q / H_kv, D head_dim, L key length, P block
size. The plain reference is ``attention_reference``; ``attention`` gives the same through
``torch.nn.functional.scaled_dot_product_attention``, or, for sequences that have one new token, through a kernel.
Proof: tests/unit/test_attention.py, test_cpu_ops.py and test_triton_kernels.py there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.context import ForwardContext, PagedCache
from engine.ops import causal_attention, cpu
from engine.ops.backends import uses_triton_forward
from engine.ops.transfer import to_device


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One sequence, every score in float32.

    Args:
        q: [n, H_q, D], the last n tokens of the sequence.
        k, v: [m, H_kv, D], m >= n.
        window: tokens that a query sees, itself included.
        softcap: scores become softcap * tanh(scores / softcap).
    Returns: [n, H_q, D] in the type of q.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(groups, dim=1)
    values = v.float().repeat_interleave(groups, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = _mask(q.shape[0], k.shape[0], causal, window, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(dim=-1), values).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: ForwardContext,
    layer_index: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Each sequence of the batch attends to its own tokens; with a cache, k and v are stored first.

    Args:
        q: [T, H_q, D]. k, v: [T, H_kv, D], the new tokens' alone.
        layer_index: index among the attention layers, of ctx.cache.
    Returns: [T, H_q, D].
    """
    cached = () if ctx.cache is None else (ctx.cache.keys[layer_index], ctx.cache.values[layer_index])
    if softcap is None and q.shape[2] <= cpu.MAX_WIDTH and cpu.takes(q, k, v, *cached):
        return _by_cpu_kernels(q, k, v, ctx, layer_index, scale, window)
    if ctx.cache is None:
        whole = window is None or window >= max(ctx.seq_lens())
        if ctx.causal and softcap is None and whole and causal_attention.takes(q, k, v):
            return causal_attention.causal_attention(q, k, v, _starts_and_lens(ctx)[0], scale)
        return _uncached(q, k, v, ctx, scale, window, softcap)
    assert ctx.slot_mapping is not None
    assert ctx.block_tables is not None
    cache = ctx.cache
    keys, values = cache.keys[layer_index], cache.values[layer_index]
    by_triton = uses_triton_forward(q, k, v)
    if by_triton:
        from engine.ops.triton import paged_attention

        paged_attention.store(k, v, keys, values, ctx.slot_mapping)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if ctx.decode is not None:
            inputs = (ctx.decode.rows, ctx.block_tables, ctx.decode.kv_lens)
            paged_attention.decode_attention(q, keys, values, *inputs, out, scale=scale, window=window, softcap=softcap)
            return out
    else:
        keys.flatten(0, 1).index_copy_(0, ctx.slot_mapping, k)
        values.flatten(0, 1).index_copy_(0, ctx.slot_mapping, v)
        out = torch.empty_like(q)
    decodes = _decodes(ctx)
    if decodes and by_triton:
        inputs = _decode_inputs(ctx, decodes)
        paged_attention.decode_attention(q, keys, values, *inputs, out, scale=scale, window=window, softcap=softcap)
    elif decodes and softcap is None:
        out = _decode(q, cache, ctx, layer_index, decodes, scale, window, out)
    else:
        decodes = []
    skip = set(decodes)
    for s in range(ctx.num_sequences):
        if s in skip:
            continue
        start, end, kv_len = ctx.seq_starts[s], ctx.seq_starts[s + 1], ctx.kv_lens[s]
        if kv_len == end - start:  # nothing cached before: the new keys are all keys
            keys, values = k[start:end], v[start:end]
        else:
            blocks = ctx.block_tables[s, : -(-kv_len // cache.block_size)]
            keys = _blocks(cache.keys[layer_index], blocks)[:kv_len]
            values = _blocks(cache.values[layer_index], blocks)[:kv_len]
        out[start:end] = _one(q[start:end], keys, values, ctx, scale, window, softcap)
    return out


def _starts_and_lens(ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """seq_starts [S + 1] and kv_lens [S], int64 on the CPU; the same for all layers."""
    assert ctx.scratch is not None
    if "starts and lens" not in ctx.scratch:
        ctx.scratch["starts and lens"] = (torch.tensor(list(ctx.seq_starts)), torch.tensor(list(ctx.kv_lens)))
    found: tuple[Tensor, Tensor] = ctx.scratch["starts and lens"]
    return found


def _by_cpu_kernels(
    q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, layer_index: int, scale: float, window: int | None
) -> Tensor:
    """Tensors that ``cpu.takes``. A step of single tokens has a kernel that splits their keys among the threads."""
    if ctx.cache is None:
        starts, lens = _starts_and_lens(ctx)
        return cpu.tiled_attention(q, k, v, starts, lens, scale=scale, causal=ctx.causal, window=window)
    assert ctx.slot_mapping is not None
    assert ctx.block_tables is not None
    keys, values, tables = ctx.cache.keys[layer_index], ctx.cache.values[layer_index], ctx.block_tables
    if ctx.decode is not None:
        lens = ctx.decode.kv_lens
        return cpu.decode_attention(q, k, v, keys, values, ctx.slot_mapping, tables, lens, scale=scale, window=window)
    starts, lens = _starts_and_lens(ctx)
    cache = (keys, values, tables, ctx.slot_mapping)
    return cpu.tiled_attention(q, k, v, starts, lens, cache=cache, scale=scale, causal=ctx.causal, window=window)


def _decodes(ctx: ForwardContext) -> list[int]:
    """Sequences with one new token and a past; they run as one batch."""
    starts = ctx.seq_starts
    return [s for s in range(ctx.num_sequences) if starts[s + 1] - starts[s] == 1 and ctx.kv_lens[s] > 1]


def _decode_inputs(ctx: ForwardContext, decodes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, block tables and lengths of some sequences of a batch, on the device; the same for all layers."""
    assert ctx.scratch is not None
    assert ctx.block_tables is not None
    if "decode inputs" not in ctx.scratch:
        device = ctx.block_tables.device
        chosen = to_device(decodes, device)
        ctx.scratch["decode inputs"] = (
            to_device([ctx.seq_starts[s] for s in decodes], device),
            ctx.block_tables.index_select(0, chosen),
            to_device([ctx.kv_lens[s] for s in decodes], device),
        )
    inputs: tuple[Tensor, Tensor, Tensor] = ctx.scratch["decode inputs"]
    return inputs


def _decode(
    q: Tensor,
    cache: PagedCache,
    ctx: ForwardContext,
    layer_index: int,
    decodes: list[int],
    scale: float,
    window: int | None,
    out: Tensor,
) -> Tensor:
    """One query per sequence. The G queries that share a key head are taken as G query positions, so no key is copied
    per head; all of them see the same keys, so one mask row per sequence serves."""
    assert ctx.scratch is not None
    assert ctx.block_tables is not None
    key = ("decode", window)
    if key not in ctx.scratch:
        lens = [ctx.kv_lens[s] for s in decodes]
        num_blocks = -(-max(lens) // cache.block_size)
        device = q.device
        whole = len(decodes) == ctx.num_tokens
        rows = None if whole else torch.tensor([ctx.seq_starts[s] for s in decodes], device=device)
        tables = ctx.block_tables if whole else ctx.block_tables[torch.tensor(decodes, device=device)]
        columns = torch.arange(num_blocks * cache.block_size, device=device)
        kv_lens = torch.tensor(lens, device=device)[:, None]
        mask = columns < kv_lens
        if window is not None:
            mask &= columns >= kv_lens - window
        blocks = tables[:, :num_blocks].flatten()
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=device).masked_fill_(~mask, float("-inf"))
        stale = (columns >= kv_lens).flatten().nonzero()[:, 0]
        ctx.scratch[key] = (rows, blocks, bias[:, None, None, :], stale)
    rows, blocks, bias, stale = ctx.scratch[key]
    num_sequences = len(decodes)
    num_kv_heads, head_dim = cache.keys[layer_index].shape[2:]
    queries = (q if rows is None else q[rows]).view(num_sequences, num_kv_heads, -1, head_dim)

    def gathered(blocks_of_layer: Tensor) -> Tensor:
        # What others left behind the sequence's end is masked, yet enters products: were it NaN, so would they be.
        rows = _blocks(blocks_of_layer, blocks).index_fill_(0, stale, 0.0)
        return rows.view(num_sequences, -1, num_kv_heads, head_dim).transpose(1, 2)

    keys, values = gathered(cache.keys[layer_index]), gathered(cache.values[layer_index])
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
    result = result.reshape(num_sequences, -1, head_dim)
    if rows is None:
        return result
    out[rows] = result
    return out


def _blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """Rows of some blocks end to end: cache [B, P, H_kv, D], blocks [n]: [n * P, H_kv, D].

    index_select, because on the CPU it copies whole blocks where advanced indexing copies element by element (5 times
    slower).
    """
    return cache.index_select(0, blocks).flatten(0, 1)


def _uncached(
    q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Whole sequences. Those of like length are padded into one batch, else they run one by one."""
    lengths = ctx.seq_lens()
    longest, num_sequences = max(lengths), len(lengths)
    windowed = window is not None and longest > window
    if softcap is not None or windowed or num_sequences == 1 or longest * num_sequences > 1.5 * ctx.num_tokens:
        parts = []
        for s in range(num_sequences):
            start, end = ctx.seq_starts[s], ctx.seq_starts[s + 1]
            parts.append(_one(q[start:end], k[start:end], v[start:end], ctx, scale, window, softcap))
        return parts[0] if num_sequences == 1 else torch.cat(parts)
    # Padding follows the tokens, so a causal query never sees it; an encoder's needs a mask.
    if longest * num_sequences == ctx.num_tokens:
        gather, scatter, mask = None, None, None
    else:
        assert ctx.scratch is not None
        if "padding" not in ctx.scratch:
            columns = torch.arange(longest)
            lens = torch.tensor(lengths)[:, None]
            starts = torch.tensor(ctx.seq_starts[:-1])[:, None]
            valid = columns < lens
            index = (starts + columns.clamp(max=longest)).where(valid, starts)
            position = torch.arange(num_sequences)[:, None] * longest + columns
            ctx.scratch["padding"] = (
                index.flatten().to(q.device),
                position[valid].to(q.device),
                None if ctx.causal else valid[:, None, None, :].to(q.device),
            )
        gather, scatter, mask = ctx.scratch["padding"]

    def batched(x: Tensor) -> Tensor:
        rows = x if gather is None else x[gather]
        return rows.view(num_sequences, longest, *x.shape[1:]).transpose(1, 2)

    result = F.scaled_dot_product_attention(
        batched(q),
        batched(k),
        batched(v),
        attn_mask=mask,
        is_causal=ctx.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    result = result.transpose(1, 2).flatten(0, 1)
    return result if scatter is None else result[scatter]


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: ForwardContext,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One sequence: q [n, H_q, D] are its last n tokens, k and v [m, H_kv, D] all of it."""
    if softcap is not None:
        return attention_reference(q, k, v, scale=scale, causal=ctx.causal, window=window, softcap=softcap)
    n, m = q.shape[0], k.shape[0]
    mask = None
    plain_causal = ctx.causal and n == m and (window is None or m <= window)
    if not plain_causal and not (ctx.causal and n == 1 and (window is None or m <= window)):
        key = ("mask", n, m, window)
        assert ctx.scratch is not None
        if key not in ctx.scratch:
            ctx.scratch[key] = _mask(n, m, ctx.causal, window, q.device)
        mask = ctx.scratch[key]
    result = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=plain_causal and n > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return result[0].transpose(0, 1)


def _mask(n: int, m: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """[n, m], True where a query may see a key; None where it may see all. The queries are the last n positions."""
    queries = torch.arange(m - n, m, device=device)[:, None]
    keys = torch.arange(m, device=device)
    mask = None
    if causal:
        mask = keys <= queries
    if window is not None:
        near = keys > queries - window if causal else (keys - queries).abs() < window
        mask = near if mask is None else mask & near
    return mask
