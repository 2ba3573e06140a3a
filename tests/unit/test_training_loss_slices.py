"""The loss in pieces: value and gradient of the whole, whatever the cut; a wrong gradient is caught."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.jobs import Pause
from engine.training import loss_slices
from engine.training.loss import chunked_cross_entropy
from engine.training.loss_slices import Loss, nll_slices

VOCAB = 17


def setup(dtype: torch.dtype = torch.float64, num: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, 5, generator=generator, dtype=dtype)
    weight = torch.randn(VOCAB, 5, generator=generator, dtype=dtype)
    targets = torch.randint(VOCAB, (num,), generator=generator)
    return hidden, weight, targets


def drained(slices: Generator[Pause, None, Loss]) -> tuple[Loss, list[str]]:
    kinds = []
    while True:
        try:
            kinds.append(next(slices).kind)
        except StopIteration as end:
            return end.value, kinds


def sliced(hidden: Tensor, weight: Tensor, targets: Tensor, **more: Any) -> Loss:
    """The loss through a head with a soft cap of 2."""

    def head(x: Tensor, start: int, end: int) -> Tensor:
        return torch.tanh(F.linear(x, weight[start:end])) * 2

    return drained(nll_slices(hidden, targets, head, VOCAB, gradient=True, **more))[0]


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("part", [1, 3, 17, 100])
@pytest.mark.parametrize("softmax", [1, 5, 100])
def test_value_and_gradient_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int, part: int, softmax: int
) -> None:
    """However positions and vocabulary are cut, in float64."""
    monkeypatch.setattr(loss_slices, "SOFTMAX_PIECE_ELEMENTS", softmax * VOCAB)
    hidden, weight, targets = setup()
    leaf = hidden.clone().requires_grad_()
    whole = chunked_cross_entropy(leaf, targets, lambda x: torch.tanh(F.linear(x, weight)) * 2, VOCAB)
    (expected,) = torch.autograd.grad(whole, leaf)
    value, gradient = sliced(hidden, weight, targets, chunk_bytes=4 * VOCAB * rows, part_elements=5 * part)
    assert gradient is not None
    assert value == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected)


def test_a_part_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails for a gradient that lacks one part of the vocabulary."""
    right = torch.autograd.grad
    calls = []

    def wrong(outputs: Any, inputs: Any, grads: Any = None, **more: Any) -> Any:
        calls.append(1)
        result = right(outputs, inputs, grads, **more)
        return (torch.zeros_like(result[0]),) if len(calls) == 3 else result

    hidden, weight, targets = setup()
    _, expected = sliced(hidden, weight, targets, part_elements=5 * 3)
    monkeypatch.setattr(torch.autograd, "grad", wrong)
    _, gradient = sliced(hidden, weight, targets, part_elements=5 * 3)
    assert not torch.allclose(gradient, expected)  # type: ignore[arg-type]


def test_without_gradient() -> None:
    """The value alone, and no graph."""
    hidden, weight, targets = setup()
    graphs = []

    def head(x: Tensor, start: int, end: int) -> Tensor:
        part = F.linear(x, weight[start:end])
        graphs.append(part.requires_grad)
        return part

    (value, gradient), kinds = drained(nll_slices(hidden, targets, head, VOCAB, gradient=False, part_elements=5 * 6))
    assert gradient is None
    assert graphs == [False] * 3
    assert "head gradient" not in kinds
    assert value == pytest.approx(F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum").item())


def test_narrow_types_are_summed_in_float32() -> None:
    """bfloat16 states: the gradient is bfloat16, and as close to that of float32 as one product in bfloat16 is."""
    hidden, weight, targets = setup(torch.float32, 64)

    def head(x: Tensor, start: int, end: int) -> Tensor:
        return F.linear(x, weight[start:end].to(x.dtype)).float()

    (_, wide), _ = drained(nll_slices(hidden, targets, head, VOCAB, gradient=True))
    (_, narrow), _ = drained(nll_slices(hidden.bfloat16(), targets, head, VOCAB, gradient=True, part_elements=5))
    assert wide is not None
    assert narrow is not None
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wide).norm() / wide.norm()) < 0.02


def test_no_positions() -> None:
    """A batch without tokens to learn has loss 0 and an empty gradient."""
    hidden, weight, targets = setup()
    value, gradient = sliced(hidden[:0], weight, targets[:0])
    assert value == 0.0
    assert gradient is not None
    assert gradient.shape == (0, 5)
