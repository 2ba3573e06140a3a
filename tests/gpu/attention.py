"""Attention over the block cache: the kernels against the reference on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.context import DecodeInputs, ForwardContext, PagedCache
from engine.ops import backends
from engine.ops.attention import attention, attention_reference
from tests.gpu.checks import Worst, check, needs
from tests.gpu.kernels import ROUNDING, TYPES, Numbers, wide


@dataclass(frozen=True)
class Case:
    """A batch. lengths: tokens that each sequence has, the new ones included. new: how many are new."""

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    heads: tuple[int, int, int]  # query heads, key heads, width
    block_size: int = 4
    table_width: int = 0  # 0: as wide as the longest sequence needs
    window: int | None = None
    softcap: float | None = None


def cases(device: torch.device) -> list[Case]:
    """Groups that are no power of 2, widths that are none, ends within a block, tables wider than any sequence, as
    captured steps have them, and one token beside prompts."""
    some = [
        Case((2, 70, 9), (1, 1, 1), (4, 2, 16), table_width=40),
        Case((66, 3), (1, 1), (3, 1, 24), block_size=16, window=5),
        Case((200,), (1,), (2, 2, 8), softcap=5.0, table_width=60),
        Case((130, 6, 40, 1), (1, 5, 1, 1), (6, 2, 20), window=33),
    ]
    if device.type == "cuda":
        some += [
            Case((1, 4000, 33, 1000), (1, 1, 1, 1), (8, 2, 256), block_size=16, table_width=2048),
            Case(tuple(range(1, 129)), (1,) * 128, (32, 8, 128), block_size=16, window=100),
            Case((20000,), (1,), (9, 3, 64), block_size=16),
            Case((700, 513, 2000), (1, 200, 1), (16, 8, 128), block_size=16),
        ]
    return some


def context(case: Case, draw: Numbers, cache: PagedCache) -> ForwardContext:
    """Sequences in blocks that are scattered over the cache."""
    device, size = draw.device, case.block_size
    starts = [0, *itertools.accumulate(case.new)]
    counts = [-(-length // size) for length in case.lengths]
    blocks = draw.some(sum(counts), cache.keys[0].shape[0]).tolist()
    tables = torch.zeros(len(counts), max(case.table_width, *counts), dtype=torch.int32)
    slots = []
    for s, (count, length, new) in enumerate(zip(counts, case.lengths, case.new, strict=True)):
        own, blocks = blocks[:count], blocks[count:]
        tables[s, :count] = torch.tensor(own)
        slots += [own[p // size] * size + p % size for p in range(length - new, length)]
    lens = torch.tensor(case.lengths, device=device)
    decodes = set(case.new) == {1}
    return ForwardContext(
        positions=torch.zeros(starts[-1], dtype=torch.int64, device=device),  # attention has no use for them
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_starts=starts,
        # What a captured step must not need, it does not get.
        kv_lens=() if decodes else case.lengths,
        cache=cache,
        block_tables=tables.to(device),
        slot_mapping=torch.tensor(slots, device=device),
        decode=DecodeInputs(torch.arange(len(counts), device=device), lens, None) if decodes else None,
        scratch={},
    )


@check
def decode_attention(device: torch.device) -> float:
    """One new token per sequence, alone and beside prompts: what is written to the cache, and what comes out. NaN in
    blocks of others, and behind a sequence's end, changes nothing."""
    if not backends.uses_triton(device):
        needs("triton")
        raise AssertionError("the Triton kernels are not in use")
    worst = Worst()
    for case, dtype in itertools.product(cases(device), TYPES):
        worst.figure = max(worst.figure, _attention(case, device, dtype))
    return worst.figure


def _attention(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    worst = Worst()
    draw = Numbers(device, len(case.lengths))
    num_heads, num_kv_heads, width = case.heads
    total, size = sum(case.new), case.block_size
    num_blocks = sum(-(-length // size) for length in case.lengths) + 3
    shape = (num_blocks, size, num_kv_heads, width)
    cache = PagedCache([draw.normal(*shape, dtype=dtype)], [draw.normal(*shape, dtype=dtype)], size)
    ctx = context(case, draw, cache)
    assert ctx.block_tables is not None
    assert ctx.slot_mapping is not None
    # q strided, as a part of a wider projection.
    q = draw.normal(total, num_heads, 2 * width, dtype=dtype)[..., :width]
    k, v = (draw.normal(total, num_kv_heads, width, dtype=dtype) for _ in range(2))
    expected_cache = [x.flatten(0, 1).index_copy(0, ctx.slot_mapping, new) for x, new in _pairs(cache, k, v)]
    held = torch.zeros(num_blocks * size, dtype=torch.bool, device=device)
    for length, table in zip(case.lengths, ctx.block_tables, strict=True):
        positions = torch.arange(length, device=device)
        held[table[positions // size].long() * size + positions % size] = True
    for x in (*cache.keys, *cache.values):
        x.flatten(0, 1)[~held] = float("nan")
    what = f"{case}, {dtype}"
    with torch.inference_mode():
        out = attention(q, k, v, ctx, 0, scale=0.3, window=case.window, softcap=case.softcap)
    for got, wanted in zip((*cache.keys, *cache.values), expected_cache, strict=True):
        assert torch.equal(got.flatten(0, 1)[held], wanted[held]), f"cache, {what}"
        assert bool(got.flatten(0, 1)[~held].isnan().all()), f"places of nobody were written, {what}"
    keys, values = wide(*expected_cache)
    parts = []
    for s, (length, table) in enumerate(zip(case.lengths, ctx.block_tables.cpu(), strict=True)):
        positions = torch.arange(length)
        at = table[positions // size].long() * size + positions % size
        query = q[ctx.seq_starts[s] : ctx.seq_starts[s + 1]].cpu().float()
        parts.append(
            attention_reference(
                query, keys[at].float(), values[at].float(), scale=0.3, window=case.window, softcap=case.softcap
            )
        )
    # Products of narrow numbers, and weights that are rounded to their type before the second product.
    worst.compare(out, torch.cat(parts), ROUNDING[dtype] * (1 if dtype == torch.float32 else 2), what)
    return worst.figure


def _pairs(cache: PagedCache, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (cache.keys[0], k), (cache.values[0], v)
