"""The causal convolution against torch's conv1d: packed, in steps of any size, windows handed on, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.causal_conv import _Taps, _taps_in_blocks, causal_conv, taps_reference

torch.set_num_threads(1)


def whole(x: Tensor, weight: Tensor) -> Tensor:
    """One sequence x [T, C] from its start."""
    taps = weight.shape[1]
    return F.conv1d(F.pad(x.T[None], (taps - 1, 0)), weight[:, None], groups=weight.shape[0])[0].T


def make(num_tokens: int, channels: int, taps: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, channels, generator=gen, dtype=torch.float64)
    return x, torch.randn(channels, taps, generator=gen, dtype=torch.float64)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("lengths", [[7], [1, 5, 2, 9], [1, 1, 1]], ids=str)
def test_packed_sequences_do_not_mix(
    lengths: list[int], taps: int, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence gets what it gets alone; windows are its last inputs, wherever they are wanted."""
    x, weight = make(sum(lengths), 6, taps)
    starts = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    captures = [(s, n) for s, length in enumerate(lengths) for n in range(1, length + 1)]
    monkeypatch.setattr("engine.ops.causal_conv.BLOCK_ELEMENTS", 12)  # two rows at a time
    for wanted in ((), captures):
        with torch.set_grad_enabled(gradients):
            y, after, captured = causal_conv(x, weight, starts, None, wanted)
        for s, length in enumerate(lengths):
            part = x[starts[s] : starts[s + 1]]
            torch.testing.assert_close(y[starts[s] : starts[s + 1]], whole(part, weight))
            padded = F.pad(part, (0, 0, taps - 1, 0))
            assert torch.equal(after[s], padded[length:])
        for (s, n), window in zip(wanted, captured, strict=True):
            padded = F.pad(x[starts[s] : starts[s + 1]], (0, 0, taps - 1, 0))
            assert torch.equal(window, padded[n : n + taps - 1])


def test_any_steps_equal_the_whole() -> None:
    """Two sequences side by side in steps of unlike sizes, one token among them."""
    a, weight = make(20, 5, 4)
    b = a.flip(0)
    windows = torch.zeros(2, 3, 5, dtype=torch.float64)
    got: tuple[list[Tensor], list[Tensor]] = ([], [])
    done = [0, 0]
    for step in ([3, 1], [1, 1], [2, 9], [1, 1], [13, 8]):
        x = torch.cat([a[done[0] : done[0] + step[0]], b[done[1] : done[1] + step[1]]])
        y, windows, _ = causal_conv(x, weight, [0, step[0], sum(step)], windows)
        for s, part in enumerate(y.split(step)):
            got[s].append(part)
            done[s] += step[s]
    assert done == [20, 20]
    torch.testing.assert_close(torch.cat(got[0]), whole(a, weight))
    torch.testing.assert_close(torch.cat(got[1]), whole(b, weight))


@pytest.mark.parametrize("lengths", [[4, 2], [1, 1]], ids=str)
def test_gradients(lengths: list[int]) -> None:
    """float64 gradcheck with respect to input, weight and windows."""
    x, weight = make(sum(lengths), 3, 4)
    windows = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    args = tuple(t.requires_grad_() for t in (x, weight, windows))
    starts = [0, lengths[0], sum(lengths)]
    assert torch.autograd.gradcheck(lambda x, w, s: causal_conv(x, w, starts, s)[:2], args)


def _checked(lengths: tuple[int, ...] = (4, 1, 3)) -> bool:
    """Gradients of inputs and of windows that are handed in, in float64, by differences."""
    x, weight = make(sum(lengths), 3, 4)
    starts = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    windows = torch.randn(len(lengths), 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (x.requires_grad_(), windows.requires_grad_())
    return torch.autograd.gradcheck(lambda a, w: causal_conv(a, weight, starts, w)[:2], inputs, raise_exception=False)


def test_gradcheck() -> None:
    assert _checked()


def test_the_function_is_the_reference() -> None:
    """Value and gradient of the hand-written pair are those that autograd finds in the plain operations."""
    x, weight = make(9, 4, 4)
    x.requires_grad_()
    ours, expected = _Taps.apply(x, weight), taps_reference(x, weight)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(expected, x, grad))


def test_taps_that_are_trained_get_their_gradient() -> None:
    x, weight = make(9, 4, 4)
    weight.requires_grad_()
    y, _, _ = causal_conv(x, weight, [0, 9])
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), weight), torch.autograd.grad(whole(x, weight).square().sum(), weight)
    )


def _backward(grad: Tensor, weight: Tensor, *, flip: bool = True, before: int = 3, after: int = 3) -> Tensor:
    padded = torch.cat((grad.new_zeros(before, grad.shape[1]), grad, grad.new_zeros(after, grad.shape[1])))
    taps = weight.unbind(dim=1)
    return _taps_in_blocks(padded, taps[::-1] if flip else taps)


MUTATIONS = [
    ("taps in the order of forward", lambda grad, weight: _backward(grad, weight, flip=False)),
    ("one step late", lambda grad, weight: _backward(grad, weight, before=4, after=2)),
    ("one step early, from the future", lambda grad, weight: _backward(grad, weight, before=2, after=4)),
    ("without the last tap", lambda grad, weight: _backward(grad, weight * torch.tensor([1.0, 1, 1, 0]).double())),
    ("sign", lambda grad, weight: -_backward(grad, weight)),
]
"""Backwards of ``_Taps`` that are deliberately wrong: each must be caught."""


@pytest.mark.parametrize("mutation", [function for _, function in MUTATIONS], ids=[name for name, _ in MUTATIONS])
def test_gradcheck_catches_a_wrong_backward(monkeypatch: pytest.MonkeyPatch, mutation: Any) -> None:
    def wrong(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return mutation(grad, ctx.saved_tensors[0]), None

    monkeypatch.setattr(_Taps, "backward", staticmethod(wrong))
    assert not _checked()
