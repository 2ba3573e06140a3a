"""Products by plain weights: the way that few rows take gives what torch's product gives, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from engine.ops import cpu, dense
from engine.ops.dense import linear, linear_divided, linear_reference


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 5, 24)])
def test_the_divided_product_is_the_product(shape: tuple[int, ...], left: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(linear_divided(x, weight, left=left), linear_reference(x, weight))
    gradients = []
    for product in (lambda v: linear_divided(v, weight, left=left), lambda v: linear_reference(v, weight)):
        leaf = x.clone().requires_grad_()
        product(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17])
def test_few_rows_are_divided_and_equal(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real choice: which rows take which way, and that the result is that of torch up to rounding."""
    monkeypatch.setattr(dense, "MIN_ELEMENTS", 512)
    taken = []

    def watched(x: torch.Tensor, weight: torch.Tensor, *, left: bool) -> torch.Tensor:
        taken.append(left)
        return linear_divided(x, weight, left=left)

    monkeypatch.setattr(dense, "linear_divided", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 24, generator=generator)
    weight = torch.randn(40, 24, generator=generator)
    torch.testing.assert_close(linear(x, weight), linear_reference(x, weight), rtol=1e-5, atol=1e-5)
    assert taken == ([] if rows == 17 else [rows in (2, 3, 4)])


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
@pytest.mark.parametrize("shape", [(17, 24, 40), (2, 64, 129, 16), (130, 300, 70)])
def test_many_rows_are_the_kernels_in_value_and_gradient(level: None, shape: tuple[int, ...]) -> None:
    """With a gradient the same as without, to the bit; and W may be a part of another, as a head is taken in parts."""
    *rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(2)
    x, grad = torch.randn(*rows, inputs, generator=generator), torch.randn(*rows, outputs, generator=generator)
    weight = torch.randn(outputs + 3, inputs, generator=generator)[2:-1]
    leaf = x.clone().requires_grad_()
    out = linear(leaf, weight)
    assert "_LinearBackward" in type(out.grad_fn).__name__
    assert torch.equal(out, linear(x, weight))
    torch.testing.assert_close(out.double(), linear_reference(x.double(), weight.double()), rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(out, leaf, grad)
    torch.testing.assert_close(found.double(), grad.double() @ weight.double(), rtol=1e-5, atol=1e-4)


def test_a_weight_that_is_trained_has_its_gradient() -> None:
    x, weight = torch.randn(20, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8))


def test_other_types_and_odd_outputs_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(dense, "linear_divided", None)  # calling it would fail
    assert linear(torch.ones(4, 8), torch.ones(5, 8)).shape == (4, 5)
    assert linear(torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)).shape == (4, 8)
    assert linear(torch.ones(0, 8), torch.ones(8, 8)).shape == (0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(4, 8), torch.ones(8, 8)).dtype == torch.bfloat16
