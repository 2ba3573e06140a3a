"""The causal convolution against torch's conv1d: packed, in steps of any size, windows handed on, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.causal_conv import causal_conv

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
