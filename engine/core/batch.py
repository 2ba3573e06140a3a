"""From scheduled sequences to packed tensors.

Shapes: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise

import torch
from torch import Tensor

from engine.context import DecodeInputs, ForwardContext, PagedCache, RecurrentStates, StateSave
from engine.lora.adapter import Adapter, LoRABatch


def pack(
    tokens: Seq[Seq[int]],
    computed: Seq[int],
    block_tables: Seq[Seq[int]],
    adapters: Seq[Adapter | None],
    cache: PagedCache,
    device: torch.device,
    *,
    states: RecurrentStates | None = None,
    state_slots: Seq[int] = (),
    state_saves: Seq[StateSave] = (),
) -> tuple[Tensor, ForwardContext]:
    """One step's input.

    Args:
        tokens: per sequence, the ids to process now, at least one.
        computed: per sequence, how many of its tokens the cache already holds.
        block_tables: per sequence, blocks that hold all its tokens, the new ones included.
        adapters: per sequence; equal neighbours share one low-rank product.
        states, state_slots, state_saves: see ForwardContext; for models with recurrent layers.
    Returns: token ids [T] int64 and the context.
    """
    starts = [0]
    positions: list[int] = []
    slots: list[int] = []
    flat: list[int] = []
    size = cache.block_size
    for ids, first, table in zip(tokens, computed, block_tables, strict=True):
        flat.extend(ids)
        starts.append(len(flat))
        span = range(first, first + len(ids))
        positions.extend(span)
        slots.extend(table[p // size] * size + p % size for p in span)
    kv_lens = [first + len(ids) for ids, first in zip(tokens, computed, strict=True)]
    width = max(-(-kv_len // size) for kv_len in kv_lens)
    tables = [list(table[:width]) + [0] * (width - len(table)) for table in block_tables]
    ctx = ForwardContext(
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_starts=starts,
        kv_lens=kv_lens,
        cache=cache,
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        decode=_decode_inputs(starts, kv_lens, state_slots, device) if not state_saves else None,
        states=states,
        state_slots=state_slots,
        state_saves=state_saves,
        lora=lora_batch(adapters, starts),
        scratch={},
    )
    return torch.tensor(flat, dtype=torch.int64, device=device), ctx


def _decode_inputs(
    starts: Seq[int], kv_lens: Seq[int], state_slots: Seq[int], device: torch.device
) -> DecodeInputs | None:
    """None unless each sequence has one new token and a past."""
    if starts[-1] != len(kv_lens) or min(kv_lens) < 2:
        return None
    slots = torch.tensor(state_slots, dtype=torch.int64, device=device) if state_slots else None
    rows = torch.arange(len(kv_lens), device=device)
    return DecodeInputs(rows, torch.tensor(kv_lens, dtype=torch.int64, device=device), slots)


def lora_batch(adapters: Seq[Adapter | None], starts: Seq[int]) -> LoRABatch | None:
    """The adapters of packed sequences, neighbours with the same one merged; None where all run on the base."""
    segments: list[tuple[Adapter, int, int]] = []
    for adapter, (start, end) in zip(adapters, pairwise(starts), strict=True):
        if adapter is None:
            continue
        if segments and segments[-1][0] is adapter and segments[-1][2] == start:
            segments[-1] = (adapter, segments[-1][1], end)
        else:
            segments.append((adapter, start, end))
    return LoRABatch(segments, starts[-1]) if segments else None
