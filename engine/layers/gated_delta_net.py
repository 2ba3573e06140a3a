"""The gated delta-net layer (arXiv:2412.06464), as Qwen3.5 has it.

Source: transformers' ``models/qwen3_5``. Queries, keys and values pass a causal convolution and SiLU; queries and keys
are normalised to length 1; the delta rule runs per value head; its output is normalised and gated by SiLU(z).

Shapes: T tokens, S sequences, D hidden size, H_k key and H_v value heads of widths K and V, W taps,
C = 2 H_k K + H_v V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from engine.config import LinearAttentionConfig, ModelConfig
from engine.context import ForwardContext, RecurrentStates, StateSave
from engine.layers.joint import JointLinears
from engine.layers.linear import Linear
from engine.layers.norm import GatedRMSNorm
from engine.ops import delta_rule_gradient
from engine.ops.causal_conv import causal_conv, causal_conv_sequences, causal_conv_step_slots
from engine.ops.delta_rule import (
    DeltaPlan,
    gated_delta_rule,
    gated_delta_sequence,
    gated_delta_step,
    gated_delta_step_slots,
    gates,
    l2_normalize,
    plan_delta_rule,
    steps_by_index,
    takes_sequences,
)
from engine.quantization.base import SchemeMap

DeltaInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, a, b; each [T, ...], q and k neither scaled nor normalised."""


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
        self.in_proj = JointLinears(self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
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
        qkv, z, b, a = self.in_proj(x, ctx)
        z = z.view(num_tokens, shape.num_value_heads, shape.value_head_dim)
        batch = _batch(ctx, qkv, shape)
        if ctx.states is not None and batch.fresh is not None:
            for tensor in (ctx.states.windows[self.layer_index], ctx.states.matrices[self.layer_index]):
                tensor.index_fill_(0, batch.fresh, 0)  # what an earlier sequence left there
        mixed = self._convolve(qkv, ctx, batch)
        q, k, v = torch.split(mixed, [shape.key_dim, shape.key_dim, shape.value_dim], dim=-1)
        inputs = (
            q.view(num_tokens, -1, shape.key_head_dim),
            k.view(num_tokens, -1, shape.key_head_dim),
            v.view(num_tokens, -1, shape.value_head_dim),
            a,
            b,
        )
        if ctx.states is None:
            out = self._sequences(inputs, ctx, batch)
        else:
            out = self._advance(inputs, ctx.states, batch)
        return self.out_proj(self.norm(out, z).reshape(num_tokens, -1), ctx)  # type: ignore[no-any-return]

    def _convolve(self, qkv: Tensor, ctx: ForwardContext, batch: _Batch) -> Tensor:
        """The convolution and SiLU: [T, C]."""
        weight = self.conv1d.weight.squeeze(1)
        if ctx.states is None:
            return causal_conv_sequences(qkv, weight, ctx.seq_starts, silu=True)
        windows = ctx.states.windows[self.layer_index]
        if batch.plan is None and not batch.spans and batch.step_rows is not None:
            out = causal_conv_step_slots(qkv, weight, windows, batch.slots)
            _copy_slots(windows, batch.step_saves)
            return out
        captures = [(save.row, save.num_tokens) for save in ctx.state_saves]
        before = windows.index_select(0, batch.slots)
        out, after, captured = causal_conv(qkv, weight, ctx.seq_starts, before, captures, silu=True)
        windows.index_copy_(0, batch.slots, after.to(windows.dtype))
        for save, window in zip(ctx.state_saves, captured, strict=True):
            windows[save.slot] = window
        return out

    def _sequences(self, inputs: DeltaInputs, ctx: ForwardContext, batch: _Batch) -> Tensor:
        """The delta rule over whole sequences."""
        q, k, v, a, b = inputs
        if delta_rule_gradient.takes(q, k, v, a, b, self.A_log, self.dt_bias):
            return delta_rule_gradient.gated_delta_sequences(q, k, v, a, b, self.A_log, self.dt_bias, ctx.seq_starts)
        assert batch.plan is not None
        return self._chunks(inputs, batch.plan, None)[0]

    def _chunks(
        self, inputs: DeltaInputs, plan: DeltaPlan, initial: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        q, k, v, a, b = inputs
        return gated_delta_rule(q, k, v, *gates(a, b, self.A_log, self.dt_bias), plan, initial)

    def _advance(self, inputs: DeltaInputs, states: RecurrentStates, batch: _Batch) -> Tensor:
        """The delta rule over q, k, v, a, b, from the slots and back into them."""
        matrices = states.matrices[self.layer_index]
        out: Tensor | None = None
        if batch.plan is not None:
            assert batch.plan_slots is not None
            rows = batch.plan_rows
            chosen = inputs
            if rows is not None:
                q, k, v, a, b = (x.index_select(0, rows) for x in inputs)
                chosen = (q, k, v, a, b)
            part, after, captured = self._chunks(chosen, batch.plan, matrices.index_select(0, batch.plan_slots))
            matrices.index_copy_(0, batch.plan_slots, after)
            for save, state in zip(batch.plan_saves, captured, strict=True):
                matrices[save.slot] = state
            if rows is None:
                return part
            out = torch.empty_like(inputs[2], memory_format=torch.contiguous_format).index_copy_(0, rows, part)
        if out is None:
            out = torch.empty_like(inputs[2], memory_format=torch.contiguous_format)
        for span in batch.spans:
            q, k, v, a, b = (x[span.start : span.end] for x in inputs)
            state = matrices[span.slot]
            gated_delta_sequence(q, k, v, a, b, self.A_log, self.dt_bias, state, out[span.start : span.end])
            for slot in span.saves:
                matrices[slot] = state
        if batch.step_rows is not None:
            assert batch.step_slots is not None
            gated_delta_step_slots(*inputs, self.A_log, self.dt_bias, matrices, batch.step_rows, batch.step_slots, out)
        elif batch.steps:
            q, k, v, a, b = inputs
            q, k = l2_normalize(q, scale=q.shape[-1] ** -0.5), l2_normalize(k)
            g, beta = gates(a, b, self.A_log, self.dt_bias)
            for row, slot, count in batch.steps:
                q_, k_, v_, g_, beta_ = (x[row : row + count] for x in (q, k, v, g, beta))
                state = matrices[slot : slot + count]
                out[row : row + count], _ = gated_delta_step(q_, k_, v_, g_, beta_, state, inplace=True)
        _copy_slots(matrices, batch.step_saves)
        return out


def _copy_slots(tensor: Tensor, copies: tuple[Tensor, Tensor] | None) -> None:
    if copies is not None:
        source, target = copies
        tensor.index_copy_(0, target, tensor.index_select(0, source))


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens [start, end) of one sequence, whose state is in a slot and is copied to others after them."""

    start: int
    end: int
    slot: int
    saves: tuple[int, ...]


@dataclass(slots=True)
class _Batch:
    """Index tensors that every recurrent layer of one forward needs.

    Attributes:
        slots: [S], of all sequences.
        fresh: slots of sequences without a past, or None.
        spans: of the sequences with more than one new token, where ``gated_delta_sequence`` takes them.
        plan: of these sequences where it does not, or None if there is none.
        plan_rows: their tokens, or None for all tokens. plan_slots, plan_saves: theirs.
        steps: with torch on a CPU, (first token, first slot, count) of runs of sequences with one new token, whose
            tokens and slots both follow each other: such a run is advanced in place.
        step_rows, step_slots: else, tokens and slots of the sequences with one new token, or None.
        step_saves: slots, and those to copy them to after the steps, or None.
    """

    slots: Tensor
    fresh: Tensor | None
    spans: list[_Span]
    plan: DeltaPlan | None
    plan_rows: Tensor | None
    plan_slots: Tensor | None
    plan_saves: list[StateSave]
    steps: list[tuple[int, int, int]]
    step_rows: Tensor | None
    step_slots: Tensor | None
    step_saves: tuple[Tensor, Tensor] | None


def _batch(ctx: ForwardContext, qkv: Tensor, shape: LinearAttentionConfig) -> _Batch:
    """Made by the first layer that asks. qkv: of any layer."""
    assert ctx.scratch is not None
    if "gated_delta_net" not in ctx.scratch:
        ctx.scratch["gated_delta_net"] = _make_batch(ctx, qkv, shape)
    batch: _Batch = ctx.scratch["gated_delta_net"]
    return batch


def _make_batch(ctx: ForwardContext, qkv: Tensor, shape: LinearAttentionConfig) -> _Batch:
    by_index = steps_by_index(qkv)
    if by_index and ctx.decode is not None and (decode_slots := ctx.decode.state_slots) is not None:
        return _Batch(decode_slots, None, [], None, None, None, [], [], ctx.decode.rows, decode_slots, None)
    lengths, slots = ctx.seq_lens(), list(ctx.state_slots)

    def index(numbers: Sequence[int]) -> Tensor | None:
        return _index(numbers, qkv.device) if numbers else None

    if ctx.states is None:
        plan = plan_delta_rule(lengths, (), qkv, shape.key_head_dim)
        return _Batch(_index((), qkv.device), None, [], plan, None, None, [], [], None, None, None)
    assert len(slots) == len(lengths), "a slot per sequence"
    planned = [s for s, length in enumerate(lengths) if length > 1]
    stepped = [s for s, length in enumerate(lengths) if length == 1]
    step_saves = [(slots[save.row], save.slot) for save in ctx.state_saves if lengths[save.row] == 1]
    batch = _Batch(
        slots=_index(slots, qkv.device),
        fresh=index([slot for slot, n, total in zip(slots, lengths, ctx.kv_lens, strict=True) if n == total]),
        spans=[],
        plan=None,
        plan_rows=None,
        plan_slots=index([slots[s] for s in planned]),
        plan_saves=[save for save in ctx.state_saves if lengths[save.row] > 1],
        steps=[] if by_index else _runs([(ctx.seq_starts[s], slots[s]) for s in stepped]),
        step_rows=index([ctx.seq_starts[s] for s in stepped]) if by_index else None,
        step_slots=index([slots[s] for s in stepped]) if by_index else None,
        step_saves=None,
    )
    if step_saves:
        sources, targets = zip(*step_saves, strict=True)
        batch.step_saves = (_index(sources, qkv.device), _index(targets, qkv.device))
    if planned and takes_sequences(qkv, shape.key_head_dim, shape.value_head_dim):
        batch.spans = [span for s in planned for span in _spans(ctx, s)]
    elif planned:
        place = {s: i for i, s in enumerate(planned)}
        captures = [(place[save.row], save.num_tokens) for save in batch.plan_saves]
        batch.plan = plan_delta_rule([lengths[s] for s in planned], captures, qkv, shape.key_head_dim)
        if stepped:
            spans = list(pairwise(ctx.seq_starts))
            batch.plan_rows = index([row for s in planned for row in range(*spans[s])])
    return batch


def _spans(ctx: ForwardContext, sequence: int) -> list[_Span]:
    """The tokens of a sequence, cut where a state is to be saved."""
    first, end = ctx.seq_starts[sequence], ctx.seq_starts[sequence + 1]
    saves = [(first + save.num_tokens, save.slot) for save in ctx.state_saves if save.row == sequence]
    ends = sorted({end, *(at for at, _ in saves)})
    return [
        _Span(a, b, ctx.state_slots[sequence], tuple(slot for at, slot in saves if at == b))
        for a, b in pairwise([first, *ends])
    ]


def _runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(token, slot) of sequences with one new token to ``steps``."""
    runs: list[tuple[int, int, int]] = []
    for row, slot in pairs:
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (row, slot):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((row, slot, 1))
    return runs


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 on the device; the host does not wait for a CUDA device, as it would copying from pageable memory."""
    tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
