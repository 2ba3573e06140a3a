"""What a check is, and how figures are compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Check = Callable[[torch.device], float]
"""Takes the device, returns the worst figure as a part of what is allowed; raises AssertionError above 1, and Skipped
where something is not installed."""

CHECKS: dict[str, Check] = {}
"""By name, in the order in which they are defined."""


class Skipped(Exception):
    """Says what is missing."""


def check(function: Check) -> Check:
    """Registers a check under its module's and its own name."""
    CHECKS[f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"] = function
    return function


def needs(package: str) -> None:
    """Skips a check where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed")


@dataclass(slots=True)
class Worst:
    """The largest of many errors, each as a part of its bound."""

    figure: float = 0.0

    def compare(self, got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
        """max |got - expected| may be ``tolerance`` of max |expected|, which counts as 1e-3 at least."""
        assert got.shape == expected.shape, f"{what}: shape {list(got.shape)} for {list(expected.shape)}"
        got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
        assert bool(got.isfinite().all()), f"{what}: not finite"
        if not expected.numel():
            return
        scale = max(expected.abs().max().item(), 1e-3)
        self.add((got - expected).abs().max().item() / scale, tolerance, what)

    def add(self, error: float, bound: float, what: str) -> None:
        """An error that may be as large as the bound."""
        assert error <= bound, f"{what}: error {error:.3g}, at most {bound:.3g} is right"
        self.figure = max(self.figure, error / bound)
