"""The low-rank update in training: equal to the plain operations, in place, with a gradient of each of its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.lora.adapter import Adapter, LoRABatch
from engine.ops import cpu
from engine.ops.low_rank import add_low_rank, add_low_rank_reference

TOKENS, INPUTS, OUTPUTS, RANK = 6, 11, 9, 3


def tensors(dtype: torch.dtype = torch.float32, master: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (TOKENS, INPUTS), "a": (RANK, INPUTS), "b": (OUTPUTS, RANK), "w": (OUTPUTS, INPUTS)}
    made = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    return {name: t.to(master if name in "ab" else dtype) for name, t in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs_x", [True, False])
def test_value_and_gradients_are_those_of_the_plain_operations(dtype: torch.dtype, needs_x: bool) -> None:
    """Over a product that needs a gradient and over one that does not; A and B keep their own type."""
    found = []
    for function in (add_low_rank, add_low_rank_reference):
        given = tensors(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
        leaves = [given[name].requires_grad_() for name in (("x", "a", "b") if needs_x else ("a", "b"))]
        out = function(F.linear(given["x"], given["w"]), given["x"], given["a"], given["b"], 0.5)
        direction = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        found.append([out, *torch.autograd.grad(out, leaves, direction)])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected)


def test_the_product_is_written_in_place() -> None:
    """No second tensor of its size is made; without gradients y stays as it was."""
    given = tensors()
    y = F.linear(given["x"], given["w"])
    before = y.clone()
    assert add_low_rank(y, given["x"], given["a"], given["b"], 0.5).data_ptr() != y.data_ptr()
    assert torch.equal(y, before)
    out = add_low_rank(y, given["x"], given["a"].requires_grad_(), given["b"], 0.5)
    assert out.data_ptr() == y.data_ptr()


def test_views_and_autocast_take_the_plain_operations() -> None:
    """What a Function cannot write in place, and two types at once, give the reference's values and gradients."""
    given = tensors()
    a = given["a"].requires_grad_()
    stacked = F.linear(given["x"], given["w"]).view(2, TOKENS // 2, OUTPUTS)
    out = add_low_rank(stacked.view(TOKENS, OUTPUTS), given["x"], a, given["b"], 0.5)
    expected = add_low_rank_reference(stacked.view(TOKENS, OUTPUTS), given["x"], a, given["b"], 0.5)
    assert torch.equal(out, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = add_low_rank(F.linear(given["x"], given["w"]), given["x"], a, given["b"], 0.5)
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
        out = LoRABatch(segments, TOKENS, generator()).add("m", given["x"], y.clone())
        torch.testing.assert_close(out, y + delta)
    assert LoRABatch([(adapter, 0, TOKENS)], TOKENS).add("other", given["x"], y) is y


kernels = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")


def made(tokens: int, inputs: int, outputs: int, rank: int) -> list[Tensor]:
    """y, x, A and B."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((tokens, outputs), (tokens, inputs), (rank, inputs), (outputs, rank))
    return [torch.randn(*size, generator=generator) for size in sizes]


@kernels
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 21])
@pytest.mark.parametrize("needs_x", [True, False])
def test_the_kernels_are_the_plain_operations_in_float64(level: None, rank: int, needs_x: bool) -> None:
    """With a part of a tile of rows, ranks and columns, and with several parts of tokens."""
    for tokens, inputs, outputs in ((1, 7, 5), (5, 17, 65), (35, 64, 16), (300, 33, 200)):
        y, *given = made(tokens, inputs, outputs, rank)
        seed = torch.randn(tokens, 2 * outputs)[:, ::2]
        assert cpu.takes(y, *given)
        leaves = [t.requires_grad_(needs_x or place > 0) for place, t in enumerate(given)]
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
        expected = add_low_rank_reference(y.double(), *wide, 0.7)
        out = add_low_rank(y, *leaves, 0.7)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        found = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], seed)
        wanted = torch.autograd.grad(expected, [t for t in wide if t.requires_grad], seed.double())
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-4)


@kernels
def test_neither_threads_nor_other_rows_change_a_bit() -> None:
    y, x, a, b = made(700, 96, 160, 8)
    gradient = torch.randn(700, 160)
    found = []
    for threads in (1, 3):
        cpu.set_num_threads(threads)
        out = y.clone()
        low = cpu.low_rank(out, x, a, b, 0.5)
        found.append([out, low, *cpu.low_rank_gradient(gradient, x, low, a, b, 0.5, wants_x=True)])
    cpu.set_num_threads(1)
    for alone, shared in zip(*found, strict=True):
        assert torch.equal(alone, shared)
    for row in (0, 101, 699):
        out = y[row : row + 1].clone()
        cpu.low_rank(out, x[row : row + 1], a, b, 0.5)
        assert torch.equal(out[0], found[0][0][row])
