"""Kernels that go over tensors once, against their references in float64 on the CPU."""

from __future__ import annotations

import itertools

import torch

from engine.layers.rope import apply_rope
from engine.ops import backends
from engine.ops.elementwise import ACTIVATIONS, gated_activation
from tests.gpu.checks import Worst, check, needs
from tests.gpu.kernels import ROUNDING, TYPES, Numbers, wide


def needs_triton(device: torch.device) -> None:
    """The check is of a Triton kernel."""
    if not backends.uses_triton(device):
        needs("triton")
        raise AssertionError("the Triton kernels are not in use")


@check
def gated_activations(device: torch.device) -> float:
    """All activations, of even and of strided rows, up to where exp overflows."""
    needs_triton(device)
    worst = Worst()
    shapes: list[tuple[int, ...]] = [(1, 8), (3, 5, 24), (4, 1100), (0, 8), (2, 1)]
    if device.type == "cuda":
        shapes += [(513, 3584)]
    for shape, dtype, name in itertools.product(shapes, TYPES, ("silu", "swish", "sigmoid", "gelu_new", "relu")):
        draw = Numbers(device, len(shape))
        gate = draw.normal(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=4.0)[..., shape[-1] :]
        if gate.numel() > 1:
            gate[0, ..., 0], gate[0, ..., -1] = 200.0, -200.0
        up = draw.normal(*shape, dtype=dtype)
        gate_, up_ = wide(gate, up)
        with torch.inference_mode():
            got = gated_activation(gate, up, name)
        assert got.dtype == dtype
        worst.compare(got, ACTIVATIONS[name](gate_) * up_, ROUNDING[dtype], f"{name} {list(shape)} {dtype}")
    return worst.figure


@check
def rotations(device: torch.device) -> float:
    """Whole heads and a part of each, heads that lie in wider rows, and numbers of heads that are no power of 2."""
    needs_triton(device)
    worst = Worst()
    # (tokens, heads, width, rotated)
    shapes = [(1, 1, 8, 8), (3, 5, 24, 24), (4, 9, 16, 4), (2, 3, 20, 10), (0, 2, 8, 8)]
    if device.type == "cuda":
        shapes += [(513, 8, 256, 64), (128, 32, 128, 128)]
    for (num, heads, width, rotated), dtype in itertools.product(shapes, TYPES):
        draw = Numbers(device, num)
        x = draw.normal(num, heads, 2 * width, dtype=dtype)[..., :width]
        angles = draw.normal(num, rotated // 2, scale=3.0).repeat(1, 2)
        # In the narrow type both forms take these as rounded.
        cos, sin = angles.cos().to(dtype).float(), angles.sin().to(dtype).float()
        with torch.inference_mode():
            got = apply_rope(x, cos, sin)
        assert got.dtype == dtype
        what = f"{num} x {heads} heads of {width}, {rotated} rotated, {dtype}"
        worst.compare(got, apply_rope(*wide(x, cos, sin)), ROUNDING[dtype], what)
    return worst.figure
