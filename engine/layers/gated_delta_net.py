"""The gated delta-net layer (arXiv:2412.06464), as Qwen3.5 has it.

Source: transformers' ``models/qwen3_5``. Queries, keys and values pass a causal convolution and SiLU; queries and keys
are normalised to length 1; the delta rule runs per value head; its output is normalised and gated by SiLU(z).

Shapes: T tokens, S sequences, D hidden size, H_k key and H_v value heads of widths K and V, W taps,
C = 2 H_k K + H_v V.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext, RecurrentStates, StateSave
from engine.layers.linear import Linear
from engine.layers.norm import GatedRMSNorm
from engine.ops.causal_conv import causal_conv
from engine.ops.delta_rule import (
    ChunkPlan,
    chunk_gated_delta_rule,
    gated_delta_step,
    l2_normalize,
    plan_chunks,
    state_dtype,
)
from engine.quantization.base import SchemeMap

DeltaInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, g, beta; each [T, ...]."""


class CausalConv(nn.Module):
    """Holds the taps under the name and shape that checkpoints have: weight [C, 1, W]."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=dtype), requires_grad=False)


class GatedDeltaNet(nn.Module):
    """The layer that takes attention's place in most layers of a hybrid.

    Args:
        name: full module name, prefix of the projections' names.
        layer_index: index among the recurrent layers, of ctx.states.
    """

    def __init__(
        self, config: ModelConfig, name: str, layer_index: int, schemes: SchemeMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape = config.linear_attention
        assert shape is not None

        def linear(suffix: str, in_features: int, out_features: int) -> Linear:
            full = f"{name}.{suffix}"
            return Linear(in_features, out_features, name=full, scheme=schemes.for_module(full), dtype=dtype)

        self.in_proj_qkv = linear("in_proj_qkv", config.hidden_size, shape.conv_dim)
        self.in_proj_z = linear("in_proj_z", config.hidden_size, shape.value_dim)
        self.in_proj_b = linear("in_proj_b", config.hidden_size, shape.num_value_heads)
        self.in_proj_a = linear("in_proj_a", config.hidden_size, shape.num_value_heads)
        self.out_proj = linear("out_proj", shape.value_dim, config.hidden_size)
        self.conv1d = CausalConv(shape.conv_dim, shape.conv_width, dtype)
        # In float32 whatever the type of the model: the decay is exp(-exp(A_log) ...).
        self.A_log = nn.Parameter(torch.empty(shape.num_value_heads, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(shape.num_value_heads, dtype=torch.float32), requires_grad=False)
        self.norm = GatedRMSNorm(shape.value_head_dim, config.norm_eps, dtype=dtype)
        self.shape = shape
        self.layer_index = layer_index

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]. With ctx.states, the states of the batch's sequences are read and advanced."""
        shape, num_tokens = self.shape, x.shape[0]
        batch = _batch(ctx)
        z = self.in_proj_z(x, ctx).view(num_tokens, shape.num_value_heads, shape.value_head_dim)
        b, a = self.in_proj_b(x, ctx), self.in_proj_a(x, ctx)
        dtype = state_dtype(x)
        beta = b.to(dtype).sigmoid()
        g = -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        if ctx.states is not None and batch.fresh is not None:
            for tensor in (ctx.states.windows[self.layer_index], ctx.states.matrices[self.layer_index]):
                tensor.index_fill_(0, batch.fresh, 0)  # what an earlier sequence left there
        mixed = F.silu(self._convolve(self.in_proj_qkv(x, ctx), ctx, batch))
        q, k, v = torch.split(mixed, [shape.key_dim, shape.key_dim, shape.value_dim], dim=-1)
        q = l2_normalize(q.view(num_tokens, -1, shape.key_head_dim)) * shape.key_head_dim**-0.5
        k = l2_normalize(k.view(num_tokens, -1, shape.key_head_dim))
        v = v.view(num_tokens, -1, shape.value_head_dim)
        if ctx.states is None:
            assert batch.plan is not None
            out, _, _ = chunk_gated_delta_rule(q, k, v, g, beta, batch.plan)
        else:
            out = self._advance((q, k, v, g, beta), ctx.states, batch)
        return self.out_proj(self.norm(out, z).view(num_tokens, -1), ctx)  # type: ignore[no-any-return]

    def _convolve(self, qkv: Tensor, ctx: ForwardContext, batch: _Batch) -> Tensor:
        weight = self.conv1d.weight.squeeze(1)
        if ctx.states is None:
            return causal_conv(qkv, weight, ctx.seq_starts)[0]
        windows = ctx.states.windows[self.layer_index]
        captures = [(save.row, save.num_tokens) for save in ctx.state_saves]
        out, after, captured = causal_conv(qkv, weight, ctx.seq_starts, windows.index_select(0, batch.slots), captures)
        windows.index_copy_(0, batch.slots, after.to(windows.dtype))
        for save, window in zip(ctx.state_saves, captured, strict=True):
            windows[save.slot] = window
        return out

    def _advance(self, inputs: DeltaInputs, states: RecurrentStates, batch: _Batch) -> Tensor:
        """The delta rule over q, k, v, g, beta, each [T, ...], from the slots and back into them."""
        matrices = states.matrices[self.layer_index]
        out: Tensor | None = None
        if batch.plan is not None:
            assert batch.plan_slots is not None
            rows = batch.plan_rows
            q, k, v, g, beta = inputs if rows is None else tuple(x.index_select(0, rows) for x in inputs)
            initial = matrices.index_select(0, batch.plan_slots)
            part, after, captured = chunk_gated_delta_rule(q, k, v, g, beta, batch.plan, initial)
            matrices.index_copy_(0, batch.plan_slots, after)
            for save, state in zip(batch.plan_saves, captured, strict=True):
                matrices[save.slot] = state
            if rows is None:
                return part
            out = torch.empty_like(inputs[2]).index_copy_(0, rows, part)
        if out is None:
            out = torch.empty_like(inputs[2])
        for row, slot, count in batch.steps:
            q, k, v, g, beta = (x[row : row + count] for x in inputs)
            state = matrices[slot : slot + count]
            out[row : row + count], _ = gated_delta_step(q, k, v, g, beta, state, inplace=True)
        for source, target in batch.step_saves:
            matrices[target].copy_(matrices[source])
        return out


@dataclass(slots=True)
class _Batch:
    """Index tensors that every recurrent layer of one forward needs.

    Attributes:
        slots: [S], of all sequences.
        fresh: slots of sequences without a past, or None.
        plan: of the sequences with more than one new token, or None if there is none.
        plan_rows: their tokens, or None for all tokens. plan_slots, plan_saves: theirs.
        steps: (first token, first slot, count) of runs of sequences with one new token, whose tokens and slots both
            follow each other: such a run is advanced in place.
        step_saves: (slot, slot to copy it to) after the steps.
    """

    slots: Tensor
    fresh: Tensor | None
    plan: ChunkPlan | None
    plan_rows: Tensor | None
    plan_slots: Tensor | None
    plan_saves: list[StateSave]
    steps: list[tuple[int, int, int]]
    step_saves: list[tuple[int, int]]


def _batch(ctx: ForwardContext) -> _Batch:
    """Made by the first layer that asks."""
    assert ctx.scratch is not None
    if "gated_delta_net" not in ctx.scratch:
        ctx.scratch["gated_delta_net"] = _make_batch(ctx)
    batch: _Batch = ctx.scratch["gated_delta_net"]
    return batch


def _make_batch(ctx: ForwardContext) -> _Batch:
    device, lengths, slots = ctx.positions.device, ctx.seq_lens(), list(ctx.state_slots)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    if ctx.states is None:
        plan = plan_chunks(lengths, device=device)
        return _Batch(empty, None, plan, None, None, [], [], [])
    assert len(slots) == len(lengths), "a slot per sequence"
    fresh = [slot for slot, n, total in zip(slots, lengths, ctx.kv_lens, strict=True) if n == total]
    steps: list[tuple[int, int, int]] = []
    planned: list[int] = []
    for s, length in enumerate(lengths):
        row, slot = ctx.seq_starts[s], slots[s]
        if length > 1:
            planned.append(s)
        elif steps and (steps[-1][0] + steps[-1][2], steps[-1][1] + steps[-1][2]) == (row, slot):
            steps[-1] = (*steps[-1][:2], steps[-1][2] + 1)
        else:
            steps.append((row, slot, 1))
    batch = _Batch(
        slots=torch.tensor(slots, device=device),
        fresh=torch.tensor(fresh, device=device) if fresh else None,
        plan=None,
        plan_rows=None,
        plan_slots=None,
        plan_saves=[save for save in ctx.state_saves if lengths[save.row] > 1],
        steps=steps,
        step_saves=[(slots[save.row], save.slot) for save in ctx.state_saves if lengths[save.row] == 1],
    )
    if planned:
        index = {s: i for i, s in enumerate(planned)}
        captures = [(index[save.row], save.num_tokens) for save in batch.plan_saves]
        batch.plan = plan_chunks([lengths[s] for s in planned], captures, device=device)
        batch.plan_slots = torch.tensor([slots[s] for s in planned], device=device)
        if len(planned) < len(lengths):
            spans = list(pairwise(ctx.seq_starts))
            batch.plan_rows = torch.cat([torch.arange(*spans[s], device=device) for s in planned])
    return batch
