"""Products by integer arithmetic: the activations are rounded to int8, the weights are integers as they are stored.

Only x is rounded, each row in groups of 32 inputs with a scale of their own (16 where the weight's groups are such);
sums of a group are exact, sums of groups are float32, in order. So every level of instructions computes the same, and a
row of the result does not depend on the other rows. Up to four rows have a kernel that packs nothing (rounded.inl) and
adds the groups up in another order: the same integers, and a difference in the last bits.

On one thread of a Zen 3 (AVX2; shapes of SmolLM2-135M and Qwen3.5-0.8B) it takes, of the time of the product by floats,
for weights of 8 and 4 bits: with 512 rows 0.7 and 0.4 (torch, of the widened weight); with 5 to 32 rows half and less;
with one row 0.5 to 0.9 and 0.5. Of the time of one row, two take 1.1 to 1.7, four 1.9 to 3.1.

It is used within ``int8_activations`` alone, which serving, scoring and the forward of training enter where the
engine's configuration allows it. Gradients are of the product by floats (engine.ops.quantized).

Shapes: M rows of x, K inputs, N outputs, g group size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from engine.ops.cpu import library
from engine.ops.cpu.library import takes

T = TypeVar("T")

LEVELS = ("none", "avx2", "avx-vnni", "avx512", "avx512-vnni")

LEAST_MAGNITUDE = 1e-30
"""A group of x without a larger magnitude counts as zeros: 127 / magnitude would not be safely finite."""


class _State(threading.local):
    allowed = False


_state = _State()


class int8_activations:
    """Within the block, products of this thread with weights of integers may round x to int8.

    Args:
        allowed: or may not; blocks nest.
    """

    __slots__ = ("_allowed", "_before")

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed

    def __enter__(self) -> None:
        self._before, _state.allowed = _state.allowed, self._allowed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.allowed = self._before


def with_int8_activations(allowed: bool, items: Iterable[T]) -> Iterator[T]:
    """The items of a generator that computes them, with each step of it within such a block and the caller outside."""
    iterator = iter(items)
    while True:
        with int8_activations(allowed):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def level() -> str:
    """Instructions that the products use on this machine: one of LEVELS."""
    return LEVELS[0] if library._library is None else LEVELS[library._library.whet_cpu_gemm_level()]


def allows_int8_activations() -> bool:
    """Whether this thread is within such a block that allows it."""
    return _state.allowed


def takes_rounded(x: Tensor) -> bool:
    """Whether ``PackedWeight.linear`` may round x [..., K]: allowed here, and ``takes`` takes x."""
    return _state.allowed and x.numel() > 0 and takes(x)


def rounded(x: Tensor, group: int = 32) -> Tensor:
    """What is multiplied in place of x [..., K] float32, exactly: [..., K] float64."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    largest = groups.abs().amax(dim=-1, keepdim=True)  # NaN where there is one
    counts = largest >= LEAST_MAGNITUDE
    # A tensor over a tensor: of a number over a tensor, torch makes a product with the reciprocal.
    inverse = torch.where(counts, torch.full_like(largest, 127.0) / largest, 0.0)
    scale = torch.where(counts | ~largest.isfinite(), largest / 127.0, 0.0)
    values = (groups * inverse).round().double() * scale.double()
    return torch.where(largest.isfinite(), values, torch.nan).reshape(x.shape)
