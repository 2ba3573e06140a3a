"""Gradients against central differences in float64.

The outputs of a function are projected on fixed random directions, so one scalar stands for all of them. Its gradient
by autograd is compared with differences at the entries where it is largest (where a fault is largest, too), at entries
spread over each tensor (where a missing term leaves a zero), and along one random direction through each whole tensor
(where every entry takes part).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.training.seeds import derive_seed

TOLERANCE = 1e-6
"""Largest accepted relative error. In float64 differences are good to about 1e-9, and a fault shows as 1e-2 or more."""

STEPS = (3e-5, 3e-4, 3e-6, 3e-3)
"""Relative to the root mean square of the tensor. Truncation decides at large steps and rounding at small ones, so the
least error over all of them counts; further ones are tried only until one is well within the tolerance or two agree."""

WELL_WITHIN = 0.01

FLOOR = 1e-2
"""Errors of entries that are smaller than this part of the tensor's largest are relative to that part: the differences
of a sum of all outputs resolve no better."""

Function = Callable[[Mapping[str, Tensor]], Tensor | Sequence[Tensor]]
"""Named inputs to one or several outputs, each float64; the same outputs for the same inputs."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One comparison.

    Attributes:
        tensor: name of the input.
        index: of the entry; None: along the random direction through the whole tensor.
        value: the derivative by autograd.
        reference: by differences, at the best step.
        error: |value - reference|, relative to the larger of them.
    """

    tensor: str
    index: tuple[int, ...] | None
    value: float
    reference: float
    error: float

    def __str__(self) -> str:
        place = "along a direction" if self.index is None else f"[{', '.join(map(str, self.index))}]"
        return f"{self.tensor} {place}: {self.value:.6g}, by differences {self.reference:.6g}, error {self.error:.2g}"


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """What a check found.

    Attributes:
        worst: the comparison with the largest error of each tensor.
        num_entries: comparisons in all.
    """

    worst: Mapping[str, Entry]
    num_entries: int
    tolerance: float

    @property
    def worst_entry(self) -> Entry:
        """The comparison with the largest error."""
        return max(self.worst.values(), key=lambda entry: entry.error)

    @property
    def error(self) -> float:
        """The largest relative error; infinite where anything was not finite."""
        return self.worst_entry.error

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return self.error <= self.tolerance


class CentralDifferences:
    """Derivatives of the projected outputs by differences, each computed once.

    They depend on the forward alone, so one object serves the checks of several backwards of one function.

    Args:
        inputs: float64; not written to.
        seed: of the projection and the directions.
    Raises:
        InvalidArgumentError: an input or output is not float64, or there is no input.
    """

    def __init__(self, function: Function, inputs: Mapping[str, Tensor], seed: int = 0) -> None:
        if not inputs:
            raise InvalidArgumentError("a gradient check needs at least one tensor; accepted: named tensors")
        for name, tensor in inputs.items():
            if tensor.dtype != torch.float64 or not tensor.numel():
                raise InvalidArgumentError(
                    f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; accepted: float64 of at least one entry"
                )
        self.inputs = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        self.seed = seed
        self._function = function
        self._projections: list[Tensor] = []
        self._known: dict[tuple[str, int | None, float], float] = {}
        self._projections = [_random(out, seed, f"output {i}") for i, out in enumerate(self._outputs(function))]

    def _outputs(self, function: Function) -> list[Tensor]:
        with torch.no_grad():
            return _listed(function(self.inputs))

    def projected(self, outputs: Tensor | Sequence[Tensor]) -> Tensor:
        """The scalar that is differentiated."""
        pairs = zip(_listed(outputs), self._projections, strict=True)
        return torch.stack([(out * direction).sum() for out, direction in pairs]).sum()

    def direction(self, name: str) -> Tensor:
        """The random direction through a whole input, of its shape."""
        return _random(self.inputs[name], self.seed, f"direction of {name}")

    def derivative(self, name: str, place: int | None, step: float) -> float:
        """At an entry, counted as the flattened tensor has them, or along ``direction``.

        Args:
            step: relative to the root mean square of the tensor.
        """
        key = (name, place, step)
        if key not in self._known:
            self._known[key] = self._derivative(*key)
        return self._known[key]

    def _derivative(self, name: str, place: int | None, step: float) -> float:
        tensor = self.inputs[name]
        size = step * float(tensor.square().mean().sqrt()) or step
        before = tensor.clone()
        found = []
        for sign in (1, -1):
            if place is None:
                tensor.add_(self.direction(name), alpha=sign * size)
            else:
                tensor.view(-1)[place] += sign * size
            found.append([out.clone() for out in self._outputs(self._function)])
            tensor.copy_(before)
        # The outputs are subtracted before they are summed: what does not change cancels to the bit.
        difference = [above - below for above, below in zip(*found, strict=True)]
        return float(self.projected(difference)) / (2 * size)


def check_gradients(
    function: Function,
    inputs: Mapping[str, Tensor],
    *,
    top: int = 3,
    strided: int = 3,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    differences: CentralDifferences | None = None,
) -> GradientCheck:
    """Compares the gradients of all inputs with differences.

    Args:
        function: differentiable by autograd; may draw no random numbers.
        inputs: float64, at a point where the function is smooth.
        top: entries of each tensor where the gradient is largest.
        strided: entries of each tensor at equal strides from a random first one.
        seed: of projection, directions and first entries.
        differences: of a function of the same forward at the same inputs; its seed goes before.
    Raises:
        InvalidArgumentError: an input or output is not float64, or there is no input.
        FailedPreconditionError: a gradient is zero everywhere and so are its differences (reason ZERO_GRADIENT): the
            check would hold for whatever backward; as for lora_A where lora_B is zero.
    """
    if differences is None:
        differences = CentralDifferences(function, inputs, seed)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in differences.inputs.items()}
    with torch.enable_grad():
        projected = differences.projected(function(leaves))
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if projected.requires_grad:
        gradients = torch.autograd.grad(projected, list(leaves.values()), allow_unused=True)
    worst: dict[str, Entry] = {}
    num_entries = 0
    for (name, leaf), found in zip(leaves.items(), gradients, strict=True):
        gradient = torch.zeros_like(leaf) if found is None else found.detach()
        entries = list(_entries(name, gradient, differences, top, strided, tolerance))
        if not gradient.any() and all(entry.reference == 0.0 for entry in entries):
            raise FailedPreconditionError(
                f"the gradient of {name} is zero everywhere, so its check would prove nothing; accepted: inputs on "
                "which the outputs depend (for lora_A, a lora_B that is not zero)",
                reason="ZERO_GRADIENT",
            )
        worst[name] = max(entries, key=lambda entry: entry.error)
        num_entries += len(entries)
    return GradientCheck(worst, num_entries, tolerance)


def _entries(
    name: str, gradient: Tensor, differences: CentralDifferences, top: int, strided: int, tolerance: float
) -> Iterator[Entry]:
    flat = gradient.flatten()
    largest = float(flat.abs().max())
    for place in _places(flat, top, strided, differences.seed):
        value = float(flat[place])
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), gradient.shape))
        yield _compare(name, index, place, value, FLOOR * largest, differences, tolerance)
    value = float((gradient * differences.direction(name)).sum())
    yield _compare(name, None, None, value, FLOOR * float(flat.norm()), differences, tolerance)


def _places(flat: Tensor, top: int, strided: int, seed: int) -> list[int]:
    """Of the largest magnitudes, then at equal strides."""
    largest: list[int] = flat.abs().nan_to_num(nan=math.inf).topk(min(top, len(flat))).indices.tolist()
    stride = max(1, len(flat) // max(1, strided))
    first = int(torch.randint(stride, (), generator=torch.Generator().manual_seed(seed)))
    return list(dict.fromkeys([*largest, *range(first, len(flat), stride)[:strided]]))


def _compare(
    name: str,
    index: tuple[int, ...] | None,
    place: int | None,
    value: float,
    floor: float,
    differences: CentralDifferences,
    tolerance: float,
) -> Entry:
    best = Entry(name, index, value, math.nan, math.inf)
    before = math.nan
    for step in STEPS:
        reference = differences.derivative(name, place, step)
        size = max(abs(value), abs(reference), floor)
        error = abs(value - reference) / size if size else 0.0
        if error < best.error:  # never where anything is NaN
            best = Entry(name, index, value, reference, error)
        # Two steps that agree have converged: if the value is another, further ones will not come to it.
        if best.error <= WELL_WITHIN * tolerance or abs(reference - before) <= WELL_WITHIN * tolerance * size:
            break
        before = reference
    return best


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    listed = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    for out in listed:
        if out.dtype != torch.float64:
            raise InvalidArgumentError(
                f"an output is {out.dtype}; accepted: float64, as differences drown in rounding in any other type"
            )
    return listed


def _random(like: Tensor, seed: int, what: str) -> Tensor:
    """Standard normal numbers of a shape, the same for the same seed and purpose."""
    generator = torch.Generator().manual_seed(derive_seed(seed, what))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
