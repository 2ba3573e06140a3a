"""Each kernel against its reference in float64 on the CPU, over odd shapes, scattered slots and both types."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import backends
from engine.ops.causal_conv import causal_conv, causal_conv_step_slots
from engine.ops.delta_rule import (
    FlaPlan,
    chunk_gated_delta_rule,
    gated_delta_rule,
    gated_delta_step_slots,
    gates,
    l2_normalize,
    plan_chunks,
    plan_delta_rule,
    recurrent_gated_delta_rule,
)
from engine.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from tests.gpu.checks import Worst, check, needs

TYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
"""What an output of that type may differ by, as a part of the largest; sums run in float32 in both."""


class Numbers:
    """Random tensors: made in float64 on the CPU, rounded, and handed out on a device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale + shift
        return drawn.to(dtype).to(self.device)

    def some(self, count: int, among: int) -> Tensor:
        """``count`` different numbers from 1 to ``among`` - 1, in no order."""
        return (torch.randperm(among - 1, generator=self.generator)[:count] + 1).to(self.device)


def wide(*tensors: Tensor) -> list[Tensor]:
    """The same numbers in float64 on the CPU."""
    return [x.detach().cpu().double() for x in tensors]


def delta_shapes(device: torch.device) -> Iterator[tuple[int, int, int, int, int]]:
    """(sequences, key heads, value heads, key width, value width)."""
    yield from [(1, 1, 1, 16, 16), (2, 2, 2, 8, 24), (2, 2, 4, 12, 20), (3, 1, 3, 7, 5), (2, 2, 6, 33, 17)]
    if device.type == "cuda":
        yield from [(1, 16, 16, 128, 128), (128, 16, 32, 128, 128), (7, 4, 8, 256, 64)]


@check
def delta_step(device: torch.device) -> float:
    """Out and states of the step over slots; the states of other slots, and rows of other tokens, stay as they are."""
    if backends.uses_triton(device):
        return _delta_step(device)
    needs("triton")
    raise AssertionError("the Triton step is not in use")


@check
def delta_step_in_torch(device: torch.device) -> float:
    """The same of the form that serves where Triton is not installed."""
    with backends.allow(triton=False):
        return _delta_step(device)


def _delta_step(device: torch.device) -> float:
    worst = Worst()
    for (num, key_heads, heads, width, value_width), dtype in itertools.product(delta_shapes(device), TYPES):
        draw = Numbers(device, num)
        tokens = num + 2
        # q, k and v as the layer has them: parts of one tensor.
        sizes = [key_heads * width, key_heads * width, heads * value_width]
        q, k, v = draw.normal(tokens, sum(sizes), dtype=dtype).split(sizes, dim=-1)
        q, k, v = q.view(tokens, -1, width), k.view(tokens, -1, width), v.view(tokens, -1, value_width)
        a = draw.normal(tokens, heads, dtype=dtype, scale=4.0)
        a[0, 0] = 60.0  # beyond where softplus must not overflow
        b = draw.normal(tokens, heads, dtype=dtype, scale=2.0)
        a_log, dt_bias = draw.normal(heads), draw.normal(heads)
        matrices = draw.normal(num + 4, heads, width, value_width)
        rows, slots = draw.some(num, tokens), draw.some(num, num + 4)
        out = torch.full((tokens, heads, value_width), 7.0, dtype=dtype, device=device)
        before = matrices.clone()
        with torch.inference_mode():
            gated_delta_step_slots(q, k, v, a, b, a_log, dt_bias, matrices, rows, slots, out)

        at, of = rows.cpu(), slots.cpu()
        q_, k_, v_, a_, b_ = (x[at] for x in wide(q, k, v, a, b))
        inputs = (l2_normalize(q_) * width**-0.5, l2_normalize(k_), v_, *gates(a_, b_, *wide(a_log, dt_bias)))
        expected, states = recurrent_gated_delta_rule(*inputs, list(range(num + 1)), wide(before)[0][of])
        what = f"{num} x {key_heads}/{heads} heads of {width} x {value_width}, {dtype}"
        worst.compare(out.cpu()[at], expected, ROUNDING[dtype], f"out, {what}")
        worst.compare(matrices.cpu()[of], states, 1e-5, f"states, {what}")
        others = torch.ones(num + 4, dtype=torch.bool)
        others[of] = False
        assert torch.equal(matrices.cpu()[others], before.cpu()[others]), f"other slots changed, {what}"
        unwritten = torch.ones(tokens, dtype=torch.bool)
        unwritten[at] = False
        assert bool((out.cpu()[unwritten] == 7.0).all()), f"other rows were written, {what}"
    return worst.figure


@check
def conv_step(device: torch.device) -> float:
    """Out and windows of the convolution's step, for 1 to 5 taps."""
    if not backends.uses_triton(device):
        needs("triton")
        raise AssertionError("the Triton step is not in use")
    return _conv_step(device)


@check
def conv_step_in_torch(device: torch.device) -> float:
    """The same of the form that serves where Triton is not installed."""
    with backends.allow(triton=False):
        return _conv_step(device)


def _conv_step(device: torch.device) -> float:
    worst = Worst()
    shapes = [(1, 5, 2), (2, 37, 4), (3, 300, 4), (5, 64, 3), (4, 16, 1), (2, 8, 5)]
    if device.type == "cuda":
        shapes += [(1, 6144, 4), (128, 8192, 4)]
    for (num, channels, taps), dtype in itertools.product(shapes, TYPES):
        draw = Numbers(device, num)
        x, weight = draw.normal(num, channels, dtype=dtype), draw.normal(channels, taps, dtype=dtype)
        # A window holds inputs, so numbers of their type.
        windows = draw.normal(num + 3, taps - 1, channels, dtype=dtype).float()
        slots = draw.some(num, num + 3)
        before, of = windows.clone(), slots.cpu()
        with torch.inference_mode():
            out = causal_conv_step_slots(x, weight, windows, slots)
        x_, weight_, before_ = wide(x, weight, before)
        y, after, _ = causal_conv(x_, weight_, list(range(num + 1)), before_[of])
        what = f"{num} x {channels}, {taps} taps, {dtype}"
        # In torch every product and sum is rounded.
        bound = ROUNDING[dtype] * (1 if backends.uses_triton(device) else taps)
        worst.compare(out, F.silu(y), bound, f"out, {what}")
        assert torch.equal(windows.cpu()[of].double(), after), f"windows, {what}"
        others = torch.ones(num + 3, dtype=torch.bool)
        others[of] = False
        assert torch.equal(windows.cpu()[others], before.cpu()[others]), f"other windows changed, {what}"
    return worst.figure


@check
def norms(device: torch.device) -> float:
    """RMSNorm by w and by 1 + w, of a sum, and the gated norm, of rows of odd widths and of strided input."""
    if not backends.uses_triton(device):
        needs("triton")
        raise AssertionError("the Triton norms are not in use")
    worst = Worst()
    shapes: list[tuple[int, ...]] = [(1, 16), (3, 5, 24), (7, 33), (2, 1000), (0, 8), (50, 3, 4)]
    if device.type == "cuda":
        shapes += [(4096, 16, 128), (513, 5120)]
    for shape, dtype in itertools.product(shapes, TYPES):
        draw = Numbers(device, len(shape))
        x = draw.normal(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=3.0)[..., : shape[-1]]
        gate = draw.normal(*shape[:-1], 3 * shape[-1], dtype=dtype, scale=2.0)[..., shape[-1] : 2 * shape[-1]]
        weight = draw.normal(shape[-1], dtype=dtype)
        x_, gate_, weight_ = wide(x, gate, weight)
        with torch.inference_mode():
            results: list[tuple[str, Tensor, Tensor]] = [
                ("plain", rms_norm(x, weight, 1e-6), rms_norm(x_, weight_, 1e-6)),
                ("shifted", rms_norm(x, weight, 1e-6, shifted=True), rms_norm(x_, weight_, 1e-6, shifted=True)),
                ("gated", gated_rms_norm(x, gate, weight, 1e-6), gated_rms_norm(x_, gate_, weight_, 1e-6)),
                ("wide", gated_rms_norm(x.float(), gate, weight, 1e-6), gated_rms_norm(x_, gate_, weight_, 1e-6)),
            ]
            total, normed = add_rms_norm(x, gate, weight, 1e-6, shifted=True)
            results.append(("sum", total, x_ + gate_))
            results.append(("of a sum", normed, rms_norm(*wide(total), weight_, 1e-6, shifted=True)))
        for kind, got, expected in results:
            assert got.dtype == dtype
            worst.compare(got, expected, ROUNDING[dtype], f"{kind} {list(shape)} {dtype}")
    return worst.figure


def chunk_cases(device: torch.device) -> Iterator[tuple[list[int], list[tuple[int, int]], tuple[int, int, int, int]]]:
    """(lengths, captures, (key heads, value heads, key width, value width))."""
    yield [5, 70], [], (2, 4, 16, 16)
    yield [70, 3, 130], [(0, 64), (2, 5), (2, 80), (1, 3)], (1, 3, 16, 32)
    yield [65], [(0, 64)], (2, 2, 24, 16)
    if device.type == "cuda":
        yield [2048, 1, 777], [(0, 1024), (2, 768)], (16, 32, 128, 128)


def _chunk_inputs(draw: Numbers, num_tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    key_heads, heads, width, value_width = shape
    q, k = (draw.normal(num_tokens, key_heads, width, dtype=dtype) for _ in range(2))
    v = draw.normal(num_tokens, heads, value_width, dtype=dtype)
    g = -torch.exp(draw.normal(num_tokens, heads, scale=1.5, shift=-1.5))
    return [q, k, v, g, draw.normal(num_tokens, heads).sigmoid()]


def _chunks(device: torch.device, dtype: torch.dtype, kind: type, bound: float, cases: Any) -> float:
    worst = Worst()
    for lengths, captures, shape in cases:
        draw = Numbers(device)
        inputs = _chunk_inputs(draw, sum(lengths), shape, dtype)
        initial = draw.normal(len(lengths), shape[1], *shape[2:])
        plan = plan_delta_rule(lengths, captures, inputs[2], shape[2])
        assert isinstance(plan, kind), f"the plan is a {type(plan).__name__}"
        with torch.inference_mode():
            out, after, captured = gated_delta_rule(*inputs, plan, initial)
        q, k, v, g, beta = wide(*inputs)
        q, k = l2_normalize(q) * shape[2] ** -0.5, l2_normalize(k)
        starts = [0, *itertools.accumulate(lengths)]
        expected, states = recurrent_gated_delta_rule(q, k, v, g, beta, starts, wide(initial)[0])
        what = f"{lengths} {shape} {dtype}"
        worst.compare(out, expected, bound, f"out, {what}")
        worst.compare(after, states, bound, f"states, {what}")
        assert len(captured) == len(captures)
        for (s, n), got in zip(captures, captured, strict=True):
            part = [x[starts[s] : starts[s] + n] for x in (q, k, v, g, beta)]
            _, state = recurrent_gated_delta_rule(*part, [0, n], wide(initial)[0][s : s + 1])  # type: ignore[arg-type]
            worst.compare(got, state[0], bound, f"state after {n} of sequence {s}, {what}")
    return worst.figure


@check
def chunks_in_torch(device: torch.device) -> float:
    """The chunked rule in torch, with states before and on the way."""
    cases = [case for case in chunk_cases(device) if sum(case[0]) < 1000]
    with backends.allow(fla=False):
        plain = type(plan_chunks([1]))
        return max(
            _chunks(device, torch.float32, plain, 1e-4, cases),
            _chunks(device, torch.bfloat16, plain, 2.0**-7, cases),
        )


@check
def chunks_by_fla(device: torch.device) -> float:
    """The chunked rule by flash-linear-attention: head sharing, scale, states before, after and on the way."""
    needs("fla")
    short = [case for case in chunk_cases(device) if sum(case[0]) < 1000]
    long = [case for case in chunk_cases(device) if sum(case[0]) >= 1000]
    figures = [_chunks(device, dtype, FlaPlan, 2e-2, short) for dtype in narrow(device)]
    return max(figures + [_long_by_fla(device, *case) for case in long])


def narrow(device: torch.device) -> tuple[torch.dtype, ...]:
    """Types that flash-linear-attention is used for; Triton's interpreter multiplies no matrices of bfloat16."""
    return (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,)


def _long_by_fla(
    device: torch.device, lengths: list[int], captures: list[tuple[int, int]], shape: tuple[int, int, int, int]
) -> float:
    """Thousands of tokens: against the chunks in torch, which other checks prove; the recurrence would take long."""
    worst = Worst()
    draw = Numbers(device)
    inputs = _chunk_inputs(draw, sum(lengths), shape, torch.bfloat16)
    initial = draw.normal(len(lengths), shape[1], *shape[2:])
    with torch.inference_mode():
        got = gated_delta_rule(*inputs, plan_delta_rule(lengths, captures, inputs[2], shape[2]), initial)
        wanted = gated_delta_rule(*(x.float() for x in inputs), plan_chunks(lengths, captures, device=device), initial)
    worst.compare(got[0], wanted[0], 2e-2, "out")
    worst.compare(got[1], wanted[1], 2e-2, "states")
    worst.compare(torch.stack(got[2]), torch.stack(wanted[2]), 2e-2, "states on the way")
    return worst.figure


@check
def gradients_of_chunks(device: torch.device) -> float:
    """Gradients of the chunked rule in torch on the device, against autograd through float64 on the CPU."""
    with backends.allow(fla=False):
        return _gradients(device, torch.float32, 1e-3)


@check
def gradients_by_fla(device: torch.device) -> float:
    """flash-linear-attention's gradients, against autograd through float64 on the CPU."""
    needs("fla")
    return max(_gradients(device, dtype, 4e-2) for dtype in narrow(device))


def _gradients(device: torch.device, dtype: torch.dtype, bound: float) -> float:
    worst = Worst()
    lengths, shape = [5, 70], (2, 4, 16, 16)
    draw = Numbers(device)
    inputs = [x.requires_grad_() for x in _chunk_inputs(draw, sum(lengths), shape, dtype)]
    weight = draw.normal(sum(lengths), shape[1], shape[3])
    plan = plan_delta_rule(lengths, (), inputs[2].detach(), shape[2])
    assert isinstance(plan, FlaPlan) == (dtype != torch.float32)
    out, _, _ = gated_delta_rule(*inputs, plan)
    (out.float() * weight).sum().backward()  # type: ignore[no-untyped-call]
    reference = [x.requires_grad_() for x in wide(*inputs)]
    q, k, v, g, beta = reference
    normalised = (l2_normalize(q) * shape[2] ** -0.5, l2_normalize(k), v, g, beta)
    expected, _, _ = chunk_gated_delta_rule(*normalised, plan_chunks(lengths))
    (expected * wide(weight)[0]).sum().backward()  # type: ignore[no-untyped-call]
    for name, got, wanted in zip(("q", "k", "v", "g", "beta"), inputs, reference, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        worst.compare(got.grad, wanted.grad, bound, f"gradient of {name}")
    return worst.figure
