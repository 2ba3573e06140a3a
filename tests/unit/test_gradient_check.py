"""The gradient checker on functions whose derivatives are known, and on checks that would prove nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.verification.gradients import TOLERANCE, CentralDifferences, check_gradients


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Cube(torch.autograd.Function):
    """x^3 whose derivative may be spoiled."""

    spoil: Any = staticmethod(lambda gradient: gradient)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Cube.spoil(3 * x**2 * grads[0])  # type: ignore[no-any-return]


def cube(inputs: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = Cube.apply(inputs["x"])  # type: ignore[no-untyped-call]
    return result


def test_a_right_gradient_passes_with_the_values_that_calculus_gives() -> None:
    """Several outputs and inputs; what is reported of each tensor is its derivative."""
    inputs = {"x": random(5, 3), "y": random(3, seed=1)}
    found = check_gradients(lambda t: (t["x"] @ t["y"], t["y"].exp().sum()), inputs)
    assert found.passed
    assert found.error < 1e-8
    assert set(found.worst) == {"x", "y"}
    differences = CentralDifferences(lambda t: t["x"].square().sum(), {"x": inputs["x"]})
    projection = differences.projected(torch.ones((), dtype=torch.float64))
    for place in (0, 7):
        expected = 2 * inputs["x"].flatten()[place] * projection
        assert differences.derivative("x", place, 1e-5) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: g * (1 + 1e-5),
        lambda g: g * -1,
        lambda g: g + 1e-4,
        lambda g: g.roll(1, 0),
        lambda g: g * 0,
        lambda g: g * float("nan"),
        lambda g: g * float("inf"),
    ],
    ids=["one in 100,000", "sign", "shift", "rows moved", "zero", "nan", "inf"],
)
def test_a_wrong_gradient_does_not_pass(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """However small or gross; one that is zero where the differences are not is wrong, not meaningless."""
    assert check_gradients(cube, {"x": random(40, 3)}).passed
    monkeypatch.setattr(Cube, "spoil", staticmethod(spoil))
    found = check_gradients(cube, {"x": random(40, 3)})
    assert not found.passed
    assert found.worst_entry.tensor == "x"
    assert "x " in str(found.worst_entry)


def test_a_single_wrong_entry_is_found_by_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is neither among the largest nor on a stride still takes part in the direction through all."""
    x = random(1000)
    monkeypatch.setattr(Cube, "spoil", staticmethod(lambda g: torch.where(x == x[501], 1.1 * g, g)))
    found = check_gradients(cube, {"x": x}, top=2, strided=2)
    assert found.worst_entry.index is None
    assert TOLERANCE < found.error < 0.1


def test_the_best_step_counts() -> None:
    """A function with curvature at the scale of one step, and one so large that rounding swamps the smallest, pass."""
    x = random(20)
    assert check_gradients(lambda t: (3e2 * t["x"]).sin(), {"x": x}).passed
    assert check_gradients(lambda t: t["x"].square() + 1e6, {"x": x}).passed


def test_a_gradient_that_is_zero_proves_nothing() -> None:
    """B = 0: the gradient of A is zero for whatever backward. So is that of an input that is not used."""
    a, b, x = random(2, 4), torch.zeros(3, 2, dtype=torch.float64), random(5, 4)
    with pytest.raises(FailedPreconditionError, match="gradient of lora_A is zero everywhere"):
        check_gradients(lambda t: x @ t["lora_A"].T @ t["lora_B"].T, {"lora_A": a, "lora_B": b})
    with pytest.raises(FailedPreconditionError, match="gradient of unused"):
        check_gradients(lambda t: t["x"] * 2, {"x": x, "unused": a})
    with pytest.raises(FailedPreconditionError, match="gradient of x"):
        check_gradients(lambda t: torch.ones(2, dtype=torch.float64), {"x": x})


def test_only_float64_is_checked() -> None:
    """Inputs and outputs alike, by name; and at least one input."""
    with pytest.raises(InvalidArgumentError, match=r"x is torch\.float32 of shape \[2\]"):
        check_gradients(lambda t: t["x"], {"x": torch.ones(2)})
    with pytest.raises(InvalidArgumentError, match=r"an output is torch\.float32"):
        check_gradients(lambda t: t["x"].float(), {"x": random(2)})
    with pytest.raises(InvalidArgumentError, match="at least one tensor"):
        check_gradients(lambda t: random(2), {})
    with pytest.raises(InvalidArgumentError, match="at least one entry"):
        check_gradients(lambda t: t["x"], {"x": random(0)})


def test_differences_are_computed_once() -> None:
    """Checks of several backwards of one function share them."""
    calls = []

    def function(inputs: Mapping[str, Tensor]) -> Tensor:
        calls.append(None)
        return inputs["x"] ** 2

    inputs = {"x": random(6)}
    differences = CentralDifferences(function, inputs)
    first = check_gradients(function, inputs, differences=differences)
    num_calls = len(calls)
    assert check_gradients(function, inputs, differences=differences) == first
    assert len(calls) == num_calls + 1  # the forward that autograd sees
