"""attention() against attention_reference: with and without the block cache, windows, soft caps, grouped heads."""

from __future__ import annotations

import pytest
import torch

from engine.context import ForwardContext, PagedCache, packed_context
from engine.ops import cpu
from engine.ops.attention import attention, attention_reference

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 16, 4


@pytest.fixture(autouse=True, params=["torch", "kernels"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels where there are some, and the form of torch that other devices and gradients take."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "takes", lambda *tensors: False)


def _qkv(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_tokens, h, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [[7], [5, 5], [6, 5, 6], [9, 1, 2]])
def test_uncached_equals_reference(causal: bool, window: int | None, softcap: float | None, lengths: list[int]) -> None:
    """Packed sequences see themselves alone, whichever of the paths (batched, padded, one by one) they take."""
    q, k, v = _qkv(sum(lengths), 0)
    ctx = packed_context(lengths, causal=causal)
    out = attention(q, k, v, ctx, 0, scale=0.3, window=window, softcap=softcap)
    for start, length in zip(ctx.seq_starts, lengths, strict=False):
        part = slice(start, start + length)
        expected = attention_reference(
            q[part], k[part], v[part], scale=0.3, causal=causal, window=window, softcap=softcap
        )
        torch.testing.assert_close(out[part], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "steps", [[[8], [1], [1]], [[3, 1], [4, 1], [1, 6], [1, 1]], [[5, 2, 1], [1, 1, 1], [1, 3, 1]]]
)
def test_cached_steps_equal_whole(window: int | None, softcap: float | None, steps: list[list[int]]) -> None:
    """Any split of the sequences into steps (prefill, chunks, decodes, mixed) gives what one whole forward gives."""
    num_sequences = len(steps[0])
    totals = [sum(step[s] for step in steps) for s in range(num_sequences)]
    whole = [_qkv(total, 10 + s) for s, total in enumerate(totals)]
    blocks_each = 4
    cache = PagedCache(
        # What a failed request may have left: none of it may be read.
        keys=[torch.full((1 + blocks_each * num_sequences, BLOCK, KV_HEADS, DIM), float("nan"))],
        values=[torch.full((1 + blocks_each * num_sequences, BLOCK, KV_HEADS, DIM), float("nan"))],
        block_size=BLOCK,
    )
    # Blocks of the sequences interleave, so that an error of addressing shows.
    tables = torch.tensor(
        [[1 + s + num_sequences * b for b in range(blocks_each)] for s in range(num_sequences)], dtype=torch.int32
    )
    done = [0] * num_sequences
    outs: list[list[torch.Tensor]] = [[] for _ in range(num_sequences)]
    for step in steps:
        starts = [0]
        for n in step:
            starts.append(starts[-1] + n)
        positions = torch.cat([torch.arange(done[s], done[s] + n) for s, n in enumerate(step)])
        owners = torch.repeat_interleave(torch.arange(num_sequences), torch.tensor(step))
        slots = tables[owners, positions // BLOCK].long() * BLOCK + positions % BLOCK
        parts = [[whole[s][i][done[s] : done[s] + n] for s, n in enumerate(step)] for i in range(3)]
        done = [d + n for d, n in zip(done, step, strict=True)]
        ctx = ForwardContext(
            positions=positions,
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            seq_starts=starts,
            kv_lens=list(done),
            cache=cache,
            block_tables=tables,
            slot_mapping=slots,
            scratch={},
        )
        q, k, v = (torch.cat(p) for p in parts)
        out = attention(q, k, v, ctx, 0, scale=0.25, window=window, softcap=softcap)
        for s in range(num_sequences):
            outs[s].append(out[starts[s] : starts[s + 1]])
    for s in range(num_sequences):
        expected = attention_reference(*whole[s], scale=0.25, window=window, softcap=softcap)
        torch.testing.assert_close(torch.cat(outs[s]), expected, atol=1e-5, rtol=1e-5)
