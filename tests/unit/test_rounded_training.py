"""Products that training takes by integers: forward as serving's, gradient as that of the stored weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import engine.ops.quantized as ops
from engine.layers.linear import Linear
from engine.loading.gguf_blocks import BLOCK_TYPES
from engine.ops import cpu
from engine.ops.cpu import gemm
from engine.quantization.base import LinearScheme
from engine.quantization.gguf import GGUFBlocks
from tests.unit.test_quantization_schemes import IDS, SCHEMES, fill

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

KINDS = ("q4_1", "q8_0", "q6_k")
OUT, IN, ROWS = 40, 256, 37


def make(scheme: LinearScheme) -> Linear:
    module = Linear(IN, OUT, name="layer.proj", scheme=scheme)
    if not isinstance(scheme, GGUFBlocks):
        fill(module, scheme)
        return module
    with torch.no_grad():
        module.get_parameter("weight_q").random_(0, 127)
        module.get_parameter("weight_scale").normal_()
        if scheme.block.has_offsets:
            module.get_parameter("weight_offset").normal_()
    return module


@pytest.fixture(params=[*SCHEMES, *(GGUFBlocks(BLOCK_TYPES[kind]) for kind in KINDS)], ids=[*IDS, *KINDS])
def module(request: pytest.FixtureRequest) -> Linear:
    return make(request.param)


def apply(module: Linear, x: Tensor, *, allowed: bool) -> Tensor:
    with gemm.int8_activations(allowed):
        return module.scheme.apply(module, x)


def test_the_forward_is_that_of_serving_and_the_gradient_that_of_the_weight(
    module: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding of x counts as the identity: the gradient is the same as without it, to the bit."""
    monkeypatch.setattr(ops, "CPU_CHUNK_ELEMENTS", 7 * IN)
    x = torch.randn(ROWS, IN)
    with torch.no_grad():
        served, by_floats = apply(module, x, allowed=True), apply(module, x, allowed=False)
    assert not torch.equal(served, by_floats)
    x.requires_grad_()
    trained = apply(module, x, allowed=True)
    assert torch.equal(trained, served)
    seeds = torch.randn(ROWS, OUT)
    (gradient,) = torch.autograd.grad(trained, x, seeds)  # outside of the block
    wide = module.scheme.dequantize(module).double()
    torch.testing.assert_close(gradient.double(), seeds.double() @ wide, rtol=1e-4, atol=1e-5 * float(wide.abs().max()))
    exact = apply(module, x, allowed=False)
    assert torch.equal(torch.autograd.grad(exact, x, seeds)[0], gradient)
    assert not torch.equal(exact, trained)


def test_parts_are_columns_of_the_whole(module: Linear) -> None:
    """As the head is multiplied in parts, which may begin anywhere."""
    x = torch.randn(ROWS, IN, requires_grad=True)
    whole = apply(module, x, allowed=True)
    with gemm.int8_activations(True):
        parts = [module.scheme.apply_part(module, x, *bounds) for bounds in ((0, 7), (7, 8), (8, OUT))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    seeds = torch.randn(ROWS, OUT)
    sums = [torch.autograd.grad(p, x, s)[0] for p, s in zip(parts, seeds.split([7, 1, OUT - 8], 1), strict=True)]
    torch.testing.assert_close(sum(sums), torch.autograd.grad(whole, x, seeds)[0], rtol=1e-4, atol=1e-3)


def test_autocast_multiplies_by_floats(module: Linear) -> None:
    """The kernels give float32, which is not what autocast is on for."""
    x = torch.randn(ROWS, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = apply(module, x, allowed=True), apply(module, x, allowed=False)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)
