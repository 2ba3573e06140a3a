"""Norms by the root of a sum of squares: equal to torch's, the backward proven in float64, and wrong ones caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.norm import rms_norm
from engine.ops.root_norm import _RootNorm, root_norm, root_norm_reference

RIGHT = _RootNorm.backward
Case = tuple[str | None, int, float]
CASES: list[Case] = [(None, 1, 0.25), (None, 6, 1.0), ("weight", 6, 1.0), ("weight", 1, 3.0)]
"""Weight or none, count, scale."""


def make(case: Case) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, generator=generator, dtype=torch.float64) if case[0] else None
    return x, weight, {"count": case[1], "eps": 0.1, "scale": case[2]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_are_those_of_the_plain_operations(case: Case) -> None:
    x, weight, options = make(case)
    expected = root_norm_reference(x, weight, **options)
    with torch.no_grad():
        torch.testing.assert_close(root_norm(x, weight, **options), expected)
    ours = root_norm(x, weight, **options)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad), torch.autograd.grad(expected, x, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_value_is_that_of_the_plain_operations_to_the_last_bit(case: Case, dtype: torch.dtype) -> None:
    """With and without a backward, on whole vectors and on what is left of them."""
    _, weight, options = make(case)
    for rows, columns in ((3, 6), (64, 128), (5, 1001)):
        generator = torch.Generator().manual_seed(columns)
        x = 3.0 * torch.randn(rows, columns, generator=generator).to(dtype)
        scales = None if weight is None else torch.randn(columns, generator=generator).to(dtype)
        expected = root_norm_reference(x, scales, **options)
        assert torch.equal(root_norm(x, scales, **options), expected)
        assert torch.equal(root_norm(x.requires_grad_(), scales, **options), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    x, weight, options = make(case)
    assert torch.autograd.gradcheck(lambda v: root_norm(v, weight, **options), (x,))


def test_rms_norm_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 64, generator=generator), torch.randn(64, generator=generator)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))


def test_a_weight_that_is_trained_gets_its_gradient() -> None:
    x, weight, options = make(CASES[2])
    assert weight is not None
    weight.requires_grad_()
    ours, expected = (f(x, weight, **options) for f in (root_norm, root_norm_reference))
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), weight), torch.autograd.grad(expected.sum(), weight))


class _Context:
    """What backward reads, with something in it changed."""

    def __init__(self, ctx: Any, **changes: Any) -> None:
        self.saved_tensors = changes.get("saved", ctx.saved_tensors)
        self.count = changes.get("count", ctx.count)
        self.scale = changes.get("scale", ctx.scale)


def _post_norm(ctx: Any, grad: Tensor) -> Any:
    x, inverse, weight = ctx.saved_tensors
    return RIGHT(_Context(ctx, saved=(x * inverse, inverse, weight)), grad)


def _no_projection(ctx: Any, grad: Tensor) -> Any:
    return RIGHT(_Context(ctx, count=1e9), grad)


def _no_weight(ctx: Any, grad: Tensor) -> Any:
    x, inverse, _ = ctx.saved_tensors
    return RIGHT(_Context(ctx, saved=(x, inverse, None)), grad)


def _no_factor(ctx: Any, grad: Tensor) -> Any:
    return RIGHT(_Context(ctx, count=1), grad)


def _sign(ctx: Any, grad: Tensor) -> Any:
    return RIGHT(_Context(ctx, count=-ctx.count), grad)


def _no_scale(ctx: Any, grad: Tensor) -> Any:
    return RIGHT(_Context(ctx, scale=1.0), grad)


MUTATIONS = [
    ("the value after the norm for the one before", _post_norm),
    ("without the change of the norm", _no_projection),
    ("without the weight", _no_weight),
    ("sum for mean", _no_factor),
    ("sign of the change of the norm", _sign),
    ("without the scale", _no_scale),
]
"""Backwards of ``_RootNorm`` that are deliberately wrong: each must be caught in one of the cases at least."""


@pytest.mark.parametrize("mutation", [function for _, function in MUTATIONS], ids=[name for name, _ in MUTATIONS])
def test_gradcheck_catches_a_wrong_backward(monkeypatch: pytest.MonkeyPatch, mutation: Any) -> None:
    monkeypatch.setattr(_RootNorm, "backward", staticmethod(mutation))
    caught = []
    for case in CASES:
        x, weight, options = make(case)
        check = lambda v, w=weight, o=options: root_norm(v, w, **o)  # noqa: E731
        caught.append(not torch.autograd.gradcheck(check, (x,), raise_exception=False))
    assert any(caught)
