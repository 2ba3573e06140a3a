"""Chunked cross-entropy: equal to the whole, its gradient proven in float64, and a wrong gradient caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.training import loss as training_loss
from engine.training.loss import _ChunkedCrossEntropy, chunked_cross_entropy

VOCAB = 17
right_gradient = training_loss.nll_and_gradient


def setup(dtype: torch.dtype = torch.float64, num: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, 5, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, 5, generator=generator, dtype=dtype)
    targets = torch.randint(VOCAB, (num,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 3, 11, 100])
def test_value_and_gradient_are_those_of_the_whole(rows: int) -> None:
    """Whatever the chunk size, sum and gradient are those of one cross-entropy over all logits."""
    hidden, weight, targets = setup()
    whole = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    (expected,) = torch.autograd.grad(whole, hidden)
    total = chunked_cross_entropy(hidden, targets, lambda h: F.linear(h, weight), VOCAB, chunk_bytes=4 * VOCAB * rows)
    (gradient,) = torch.autograd.grad(total * 3.0, hidden)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient, 3.0 * expected)


def test_gradcheck_with_a_soft_cap() -> None:
    """The backward is the derivative of the forward, in float64, through a head that is not linear."""
    hidden, weight, targets = setup()

    def function(h: Tensor) -> Tensor:
        return chunked_cross_entropy(h, targets, lambda x: torch.tanh(F.linear(x, weight)) * 2, VOCAB, 4 * VOCAB * 4)

    assert torch.autograd.gradcheck(function, (hidden,))


@pytest.mark.parametrize("fault", ["scale", "shift", "sign of one row"])
def test_gradcheck_catches_a_wrong_backward(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A backward that is off by 1%, by a constant, or in one row does not pass the check above."""
    right = _ChunkedCrossEntropy.backward

    def wrong(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = right(ctx, grad_output)[0].clone()
        if fault == "scale":
            gradient *= 1.01
        elif fault == "shift":
            gradient += 0.01
        else:
            gradient[4] *= -1
        return gradient, None, None, None

    monkeypatch.setattr(_ChunkedCrossEntropy, "backward", staticmethod(wrong))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_gradcheck_with_a_soft_cap()


def _without_target(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    nll, _ = right_gradient(logits, targets, out)
    return nll, torch.softmax(logits, dim=-1)


def _of_next_target(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    nll, _ = right_gradient(logits, targets, torch.empty_like(out))
    return nll, right_gradient(logits, targets.roll(1), out)[1]


def _not_normalised(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    nll, gradient = right_gradient(logits, targets, out)
    return nll, gradient + 0.01 * logits.exp()


def _sign(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    nll, gradient = right_gradient(logits, targets, out)
    return nll, -gradient


MUTATIONS = [
    ("the target's term is missing", _without_target),
    ("the target is another position's", _of_next_target),
    ("probabilities that do not sum to 1", _not_normalised),
    ("sign", _sign),
]
"""Gradients of logits that are deliberately wrong: each must be caught."""


@pytest.mark.parametrize("mutation", [function for _, function in MUTATIONS], ids=[name for name, _ in MUTATIONS])
def test_gradcheck_catches_a_wrong_gradient_of_logits(monkeypatch: pytest.MonkeyPatch, mutation: Any) -> None:
    monkeypatch.setattr(training_loss, "nll_and_gradient", mutation)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_gradcheck_with_a_soft_cap()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_extreme_logits_give_what_torch_gives(scale: float) -> None:
    """Probabilities of 0 and of 1 among them: value and gradient in float32 are those of F.cross_entropy."""
    hidden, weight, targets = setup(torch.float32)
    results = []
    for whole in (True, False):
        if whole:
            value = F.cross_entropy(F.linear(hidden, weight * scale), targets, reduction="sum")
        else:
            value = chunked_cross_entropy(hidden, targets, lambda h: F.linear(h, weight * scale), VOCAB, 4 * VOCAB * 4)
        results.append((value.detach(), *torch.autograd.grad(value, hidden)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_logits_exist_a_chunk_at_a_time() -> None:
    """The head never sees more rows than the chunk's bytes allow."""
    hidden, weight, targets = setup()
    seen = []

    def head(h: Tensor) -> Tensor:
        seen.append(len(h))
        return F.linear(h, weight)

    chunked_cross_entropy(hidden, targets, head, VOCAB, chunk_bytes=4 * VOCAB * 4).backward()
    assert seen == [4, 4, 3]


def test_without_gradients_none_is_formed() -> None:
    """In evaluation the head runs without a graph."""
    hidden, weight, targets = setup()
    graphs = []

    def head(h: Tensor) -> Tensor:
        logits = F.linear(h, weight)
        graphs.append(logits.requires_grad)
        return logits

    with torch.no_grad():
        total = chunked_cross_entropy(hidden, targets, head, VOCAB, chunk_bytes=4 * VOCAB * 4)
    assert not total.requires_grad
    assert graphs == [False, False, False]


def test_narrow_types_are_summed_in_float32() -> None:
    """bfloat16 states give a float32 sum and a bfloat16 gradient."""
    hidden, weight, targets = setup(torch.float32, 600)
    narrow = hidden.detach().bfloat16().requires_grad_()
    total = chunked_cross_entropy(narrow, targets, lambda h: F.linear(h, weight.bfloat16()).float(), VOCAB, 4 * VOCAB)
    total.backward()
    assert total.dtype == torch.float32
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    whole = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    assert abs(float(total.detach()) - float(whole.detach())) < 0.01 * float(whole.detach())


def test_no_positions() -> None:
    """A batch without tokens to learn has loss 0 and a zero gradient."""
    hidden, weight, _ = setup()
    empty = hidden[:0]
    total = chunked_cross_entropy(empty, torch.zeros(0, dtype=torch.int64), lambda h: F.linear(h, weight), VOCAB)
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("vocab", [7, 1000, 5003])
def test_the_gradient_of_the_logits_may_take_their_place(vocab: int) -> None:
    """Sum and gradient are, to the bit, those formed beside the logits."""
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.tensor([0, 6, 3, 3, 1])
    expected_nll, expected = right_gradient(logits, targets, torch.empty_like(logits))
    nll, gradient = right_gradient(logits, targets, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(nll, expected_nll)
    assert torch.equal(gradient, expected)
