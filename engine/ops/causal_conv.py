"""Depthwise causal convolution over packed tokens, with the window that a sequence carries from step to step.

Shapes: T packed tokens, S sequences, C channels, W taps. A window is the W - 1 inputs before a sequence's next token,
[S, W - 1, C]; zeros before its first. Proof: tests/unit/test_causal_conv.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu
from engine.ops.backends import uses_triton_forward
from engine.ops.fused_gradients import SLOPES

BLOCK_ELEMENTS = 1 << 17
"""Of the output, made at one time on a CPU."""


def causal_conv(
    x: Tensor,
    weight: Tensor,
    seq_starts: Sequence[int],
    windows: Tensor | None = None,
    captures: Sequence[tuple[int, int]] = (),
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y_t = sum_j weight[:, j] x_{t - W + 1 + j}.

    Args:
        x: [T, C].
        weight: [C, W].
        seq_starts: S + 1 offsets, from 0 to T.
        windows: [S, W - 1, C] of any type; None: zeros.
        captures: (sequence, number of its leading tokens) after which the window is wanted.
        silu: of y, the activation that follows in gated delta-nets.
    Returns: y [T, C] in the type of x; the windows after each sequence [S, W - 1, C]; the captured ones, each
        [W - 1, C]. Windows are in the type of x.
    """
    num_sequences, carried = len(seq_starts) - 1, weight.shape[1] - 1
    if windows is None:
        windows = x.new_zeros(num_sequences, carried, x.shape[1])
    windows = windows.to(x.dtype)
    if _kernel_takes(x, weight.shape[1]) and cpu.takes(x, weight, windows):
        return _by_kernel(x, weight, seq_starts, windows, captures, silu=silu)
    y, after, captured = _by_taps(x, weight, seq_starts, windows, captures)
    return (F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y), after, captured


def causal_conv_sequences(x: Tensor, weight: Tensor, seq_starts: Sequence[int], *, silu: bool = False) -> Tensor:
    """``causal_conv`` of whole sequences, in training and without; on the CPU its gradient keeps x alone."""
    wanted = x.requires_grad and torch.is_grad_enabled() and not weight.requires_grad
    if wanted and _has_gradient(x, weight):
        return _WholeSequences.apply(x, weight, seq_starts, silu)  # type: ignore[no-any-return, no-untyped-call]
    return causal_conv(x, weight, seq_starts, silu=silu)[0]


def _has_gradient(x: Tensor, weight: Tensor) -> bool:
    """By the kernel, or in float64, in which it is checked, by torch."""
    if x.is_cpu and x.dtype == weight.dtype == torch.float64:
        return True
    return _kernel_takes(x, weight.shape[1]) and cpu.takes(x.detach(), weight)


class _WholeSequences(torch.autograd.Function):
    """With y before SiLU and d_t = dy_t silu'(y_t): dx_t = sum_j weight[:, j] d_{t + W - 1 - j}, the same convolution
    in the other direction of time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seq_starts: Sequence[int], silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seq_starts, ctx.silu = list(seq_starts), silu
        return causal_conv(x, weight, seq_starts, silu=silu)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if _kernel_takes(x, weight.shape[1]) and cpu.takes(x, weight, grad):
            starts = torch.tensor(ctx.seq_starts)
            return cpu.conv_gradient(x, weight.mT.contiguous(), grad, starts, silu=ctx.silu), None, None, None
        if ctx.silu:
            y = causal_conv(x, weight, ctx.seq_starts)[0]
            grad = grad * SLOPES["silu"](y)[1]
        backwards = [len(x) - at for at in reversed(ctx.seq_starts)]
        return causal_conv(grad.flip(0), weight, backwards)[0].flip(0), None, None, None


def _kernel_takes(x: Tensor, taps: int) -> bool:
    """Whether the kernel for CPUs computes with these shapes."""
    return taps <= cpu.MAX_TAPS and x.numel() > 0 and x.stride(-1) == 1


def _by_kernel(
    x: Tensor,
    weight: Tensor,
    seq_starts: Sequence[int],
    windows: Tensor,
    captures: Sequence[tuple[int, int]],
    *,
    silu: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``causal_conv`` in one pass over x, which is not copied."""
    carried, by_tap, windows = weight.shape[1] - 1, weight.mT.contiguous(), windows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for s, (start, end) in enumerate(pairwise(seq_starts)):
        cpu.conv(x[start:end], by_tap, windows[s], y[start:end], silu=silu)

    def window_after(sequence: int, num_tokens: int) -> Tensor:
        start = seq_starts[sequence]
        new = x[start + max(0, num_tokens - carried) : start + num_tokens]
        return new if len(new) == carried else torch.cat((windows[sequence, len(new) :], new))

    after = torch.stack([window_after(s, end - start) for s, (start, end) in enumerate(pairwise(seq_starts))])
    return y, after, [window_after(s, n) for s, n in captures]


def _by_taps(
    x: Tensor, weight: Tensor, seq_starts: Sequence[int], windows: Tensor, captures: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``causal_conv`` without activation, in operations of torch."""
    num_sequences, carried = len(seq_starts) - 1, weight.shape[1] - 1
    if len(x) == num_sequences and not captures:  # one token each
        extended = torch.cat((windows, x[:, None]), dim=1)
        return (extended * weight.to(x.dtype).mT).sum(dim=1), extended[:, 1:], []
    # Each sequence behind its window, all in one tensor, so that a tap is one shifted product.
    parts: list[Tensor] = []
    for s, (start, end) in enumerate(pairwise(seq_starts)):
        parts += (windows[s], x[start:end])
    extended = torch.cat(parts)
    y = _taps(extended, weight.to(x.dtype))

    def window_after(sequence: int, num_tokens: int) -> Tensor:
        at = seq_starts[sequence] + sequence * carried + num_tokens
        return extended[at : at + carried]

    after = torch.stack([window_after(s, end - start) for s, (start, end) in enumerate(pairwise(seq_starts))])
    captured = [window_after(s, n) for s, n in captures]
    if num_sequences > 1:  # results at places of windows mix two sequences
        y = torch.cat([y[a + s * carried : b + s * carried] for s, (a, b) in enumerate(pairwise(seq_starts))])
    return y, after, captured


def causal_conv_step_slots(x: Tensor, weight: Tensor, windows: Tensor, slots: Tensor) -> Tensor:
    """One token of each of S sequences, each window in its slot, with SiLU on the result.

    Args:
        x: [S, C].
        weight: [C, W].
        windows: [slots, W - 1, C] float32, advanced in place.
        slots: [S] int64, each its own.
    Returns: silu(y) [S, C] in the type of x.
    """
    if uses_triton_forward(x, weight):
        from engine.ops.triton import conv_step

        return conv_step.causal_conv_step_slots(x, weight, windows, slots)
    if cpu.takes(x, weight, windows):
        return cpu.conv_step(x, weight, windows, slots)
    before = windows.index_select(0, slots).to(x.dtype)
    extended = torch.cat((before, x[:, None]), dim=1)
    windows.index_copy_(0, slots, extended[:, 1:].to(windows.dtype))
    return F.silu((extended * weight.to(x.dtype).mT).sum(dim=1))


def _taps(extended: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_j weight[:, j] extended[t + j]: [n + W - 1, C] to [n, C]."""
    if torch.is_grad_enabled():
        if weight.requires_grad:
            return taps_reference(extended, weight)
        if extended.requires_grad:
            return _Taps.apply(extended, weight)  # type: ignore[no-any-return, no-untyped-call]
    return _taps_in_blocks(extended, weight.unbind(dim=1))


def taps_reference(extended: Tensor, weight: Tensor) -> Tensor:
    """The same in operations that autograd knows."""
    carried = weight.shape[1] - 1
    length = len(extended) - carried
    y = extended[carried:] * weight[:, carried]
    for j in range(carried):
        y = torch.addcmul(y, extended[j : j + length], weight[:, j])
    return y


class _Taps(torch.autograd.Function):
    """The gradient of an input is the same sum over the gradients of later outputs, the taps in reverse; so nothing of
    the input is kept, and both directions are one pass."""

    @staticmethod
    def forward(ctx: Any, extended: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _taps_in_blocks(extended, weight.unbind(dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        nothing = grad.new_zeros(weight.shape[1] - 1, grad.shape[1])
        return _taps_in_blocks(torch.cat((nothing, grad, nothing)), weight.unbind(dim=1)[::-1]), None


def _taps_in_blocks(extended: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """Some rows at a time, so that they stay in the processor's cache from tap to tap; by the kernel where it can."""
    carried = len(taps) - 1
    length = len(extended) - carried
    y = extended.new_empty(length, extended.shape[1])
    if length > 0 and _kernel_takes(extended, len(taps)) and cpu.takes(extended, *taps):
        cpu.conv(extended[carried:], torch.stack(tuple(taps)), extended[:carried], y, silu=False)
        return y
    rows = length if extended.is_cuda else max(1, BLOCK_ELEMENTS // extended.shape[1])
    for start in range(0, length, rows):
        part = y[start : start + rows]
        torch.mul(extended[start + carried : start + carried + len(part)], taps[-1], out=part)
        for j in range(carried):
            part.addcmul_(extended[start + j : start + j + len(part)], taps[j])
    return y
