"""The low-rank update in training: equal to the plain operations, in place, with a gradient of each of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.lora.adapter import Adapter, LoRABatch
from engine.ops import cpu
from engine.ops.low_rank import add_low_rank, low_rank_linear

TOKENS, INPUTS, OUTPUTS, RANK = 6, 11, 9, 3


def tensors(dtype: torch.dtype = torch.float32, master: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (TOKENS, INPUTS), "a": (RANK, INPUTS), "b": (OUTPUTS, RANK), "w": (OUTPUTS, INPUTS)}
    made = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    return {name: t.to(master if name in "ab" else dtype) for name, t in made.items()}


@dataclass(frozen=True, slots=True)
class Frozen:
    """A weight [O, I] as a FrozenProduct."""

    weight: Tensor

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


def plain(layer: Frozen, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropped: Tensor | None = None) -> Tensor:
    """The reference."""
    return add_low_rank(layer.product(x), x if dropped is None else dropped, a, b, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "needs", [("x", "a", "b"), ("a", "b"), ("x", "a"), ("x", "dropped", "a", "b"), ("a", "b", "dropped")]
)
def test_value_and_gradients_are_those_of_the_plain_operations(dtype: torch.dtype, needs: tuple[str, ...]) -> None:
    """Whatever wants a gradient, and with dropout; A and B keep their own type."""
    found = []
    for function in (low_rank_linear, plain):
        given = tensors(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        given["dropped"] = given["x"] * (given["x"] > 0)
        leaves = [given[name].requires_grad_() for name in needs]
        dropped = given["dropped"] if "dropped" in needs else None
        out = function(Frozen(given["w"]), given["x"], given["a"], given["b"], 0.5, dropped)
        direction = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        found.append([out, *torch.autograd.grad(out, leaves, direction)])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        narrow = dtype == torch.bfloat16  # in which the two gradients of x are rounded before and behind their sum
        torch.testing.assert_close(ours, expected, rtol=0.016 if narrow else 1e-5, atol=0.02 if narrow else 1e-5)


def test_autocast_takes_the_plain_operations() -> None:
    """In which two types meet."""
    given = tensors()
    a = given["a"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = low_rank_linear(Frozen(given["w"]), given["x"], a, given["b"], 0.5)
        assert torch.equal(out, plain(Frozen(given["w"]), given["x"], a, given["b"], 0.5))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), a)[0].dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_gives_what_its_adapter_gives(dropout: float) -> None:
    """As one adapter for all tokens and as segments of it, with the dropout masks of one generator."""
    given = tensors()
    pair = (given["a"].requires_grad_(), given["b"])
    adapter = Adapter("tone", 1, RANK, 6.0, modules={"m": pair}, dropout=dropout)
    y = F.linear(given["x"], given["w"])

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    delta = adapter.delta("m", given["x"], generator())
    assert delta is not None
    for segments in ([(adapter, 0, TOKENS)], [(adapter, 0, TOKENS // 2), (adapter, TOKENS // 2, TOKENS)]):
        batch = LoRABatch(segments, TOKENS, generator())
        torch.testing.assert_close(batch.linear("m", given["x"], Frozen(given["w"])), y + delta)
        batch = LoRABatch(segments, TOKENS, generator())
        torch.testing.assert_close(batch.add("m", given["x"], y.clone()), y + delta)
    batch = LoRABatch([(adapter, 0, TOKENS)], TOKENS)
    assert torch.equal(batch.linear("other", given["x"], Frozen(given["w"])), y)
    assert batch.add("other", given["x"], y) is y


kernels = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")


def made(tokens: int, inputs: int, outputs: int, rank: int) -> tuple[Frozen, list[Tensor]]:
    """A weight; x, A and B."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((outputs, inputs), (tokens, inputs), (rank, inputs), (outputs, rank))
    weight, *given = (torch.randn(*size, generator=generator) for size in sizes)
    return Frozen(weight), given


@kernels
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 21])
def test_the_kernels_are_the_plain_operations_in_float64(level: None, rank: int) -> None:
    """With a part of a tile of rows, ranks and columns, and with several parts of tokens; the gradient has strides."""
    for tokens, inputs, outputs in ((1, 7, 5), (5, 17, 65), (35, 64, 16), (300, 33, 200)):
        layer, given = made(tokens, inputs, outputs, rank)
        seed = torch.randn(tokens, 2 * outputs)[:, ::2]
        assert cpu.takes(*given)
        for needs in (slice(0, 3), slice(1, 3)):
            leaves = [t.detach().clone() for t in given]
            wide = [t.double() for t in given]
            for t in (*leaves[needs], *wide[needs]):
                t.requires_grad_()
            out, expected = low_rank_linear(layer, *leaves, 0.7), plain(Frozen(layer.weight.double()), *wide, 0.7)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-4)
            found = torch.autograd.grad(out, leaves[needs], seed)
            wanted = torch.autograd.grad(expected, wide[needs], seed.double())
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=4e-4)


@kernels
def test_neither_threads_nor_other_rows_change_a_bit() -> None:
    layer, (x, a, b) = made(700, 96, 160, 8)
    y, gradient = layer.product(x), torch.randn(700, 160)
    found = []
    try:
        for threads in (1, 3):
            cpu.set_num_threads(threads)
            out, d_x = y.clone(), torch.ones_like(x)
            low = cpu.low_rank(out, x, a, b, 0.5)
            found.append([out, low, d_x, *cpu.low_rank_gradient(gradient, x, low, a, b, 0.5, d_x)])
    finally:
        cpu.set_num_threads(1)
    for alone, shared in zip(*found, strict=True):
        assert torch.equal(alone, shared)
    for row in (0, 101, 699):
        out = y[row : row + 1].clone()
        cpu.low_rank(out, x[row : row + 1], a, b, 0.5)
        assert torch.equal(out[0], found[0][0][row])


@pytest.mark.parametrize(("tokens", "inputs", "outputs", "rank"), [(4500, 3, 5, 2), (300, 1500, 70_000, 300)])
def test_sums_over_many_tokens_and_of_large_factors(tokens: int, inputs: int, outputs: int, rank: int) -> None:
    """Where tokens are cut into the most parts, and where parts would take too much memory."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, outputs, generator=generator)
    low, d_x = torch.randn(tokens, rank, generator=generator), torch.zeros(tokens, inputs)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    d_a, d_b = cpu.low_rank_gradient(gradient, x, low, a, b, 0.5, d_x)
    d_low = 0.5 * gradient @ b
    for found, wanted in ((d_x, d_low @ a), (d_a, d_low.mT @ x), (d_b, gradient.mT @ low)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))
