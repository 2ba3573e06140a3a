"""Kernels that training has of its own: gradients against autograd through the references, in float64 on the CPU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.cross_entropy import nll_and_gradient
from engine.ops.elementwise import ACTIVATIONS, gated_activation
from engine.ops.norm import gated_rms_norm, rms_norm
from engine.ops.root_norm import root_norm_reference
from tests.gpu.checks import Worst, check
from tests.gpu.elementwise import needs_triton
from tests.gpu.kernels import ROUNDING, TYPES, Numbers, wide


def nodes(output: Tensor) -> str:
    """Name of the function that made a tensor."""
    assert output.grad_fn is not None
    return output.grad_fn.name()


@check
def norm_gradients(device: torch.device) -> float:
    """Of RMSNorm by w and by 1 + w and of the gated norm, for x and the gate: odd widths, strided input and strided
    gradients."""
    needs_triton(device)
    worst = Worst()
    shapes: list[tuple[int, ...]] = [(1, 16), (3, 5, 24), (7, 33), (2, 1000), (50, 3, 4)]
    if device.type == "cuda":
        shapes += [(4096, 16, 128), (513, 5120)]
    for shape, dtype in itertools.product(shapes, TYPES):
        draw = Numbers(device, len(shape))
        spread = (*shape[:-1], 2 * shape[-1])
        x = draw.normal(*spread, dtype=dtype, scale=3.0)[..., : shape[-1]]
        gate = draw.normal(*spread, dtype=dtype, scale=2.0)[..., shape[-1] :]
        grad = draw.normal(*spread, dtype=dtype)[..., : shape[-1]]
        weight = draw.normal(shape[-1], dtype=dtype)
        x_, gate_, weight_, grad_ = wide(x, gate, weight, grad)
        for kind in ("plain", "shifted", "gated"):
            given = [t.detach().requires_grad_() for t in ((x, gate) if kind == "gated" else (x,))]
            exact = [t.detach().requires_grad_() for t in ((x_, gate_) if kind == "gated" else (x_,))]
            if kind == "gated":
                got = gated_rms_norm(given[0], given[1], weight, 1e-6)
            else:
                got = rms_norm(given[0], weight, 1e-6, shifted=kind == "shifted")
            factors = weight_ + 1.0 if kind == "shifted" else weight_
            expected = root_norm_reference(exact[0], factors, count=shape[-1], eps=1e-6)
            if kind == "gated":
                expected = expected * F.silu(exact[1])
            what = f"{kind} {list(shape)} {dtype}"
            assert nodes(got) == "_RMSNormBackward", f"{what}: {nodes(got)}"
            worst.compare(got, expected, ROUNDING[dtype], what)
            found = torch.autograd.grad(got, given, grad)
            wanted = torch.autograd.grad(expected, exact, grad_)
            for name, got_, wanted_ in zip(("x", "gate"), found, wanted, strict=False):
                assert got_.dtype == dtype
                worst.compare(got_, wanted_, ROUNDING[dtype], f"gradient of {name}, {what}")
    return worst.figure


@check
def gated_activation_gradients(device: torch.device) -> float:
    """Of each activation with a kernel, for the gate and what it multiplies, up to where exp overflows."""
    needs_triton(device)
    worst = Worst()
    shapes: list[tuple[int, ...]] = [(1, 8), (3, 5, 24), (4, 1100), (2, 1)]
    if device.type == "cuda":
        shapes += [(513, 3584)]
    for shape, dtype, name in itertools.product(shapes, TYPES, ("silu", "sigmoid", "gelu_new")):
        draw = Numbers(device, len(shape))
        gate = draw.normal(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=4.0)[..., shape[-1] :]
        if gate.numel() > 1:
            gate[0, ..., 0], gate[0, ..., -1] = 200.0, -200.0
        up, grad = draw.normal(*shape, dtype=dtype), draw.normal(*shape, dtype=dtype)
        given = [t.detach().requires_grad_() for t in (gate, up)]
        exact = [t.requires_grad_() for t in wide(gate, up)]
        got, expected = gated_activation(given[0], given[1], name), ACTIVATIONS[name](exact[0]) * exact[1]
        what = f"{name} {list(shape)} {dtype}"
        assert nodes(got) == "_GatedActivationBackward", f"{what}: {nodes(got)}"
        worst.compare(got, expected, ROUNDING[dtype], what)
        found = torch.autograd.grad(got, given, grad)
        wanted = torch.autograd.grad(expected, exact, *wide(grad))
        for part, got_, wanted_ in zip(("gate", "up"), found, wanted, strict=True):
            worst.compare(got_, wanted_, ROUNDING[dtype], f"gradient of {part}, {what}")
    return worst.figure


@check
def softmax_gradients(device: torch.device) -> float:
    """The loss, and its gradient in the place of the logits, in one block and in several; rows that lie apart, targets
    at both ends, logits far from 0. A row that is not finite spoils no other."""
    needs_triton(device)
    worst = Worst()
    shapes = [(1, 7), (5, 300), (3, 9000)]
    if device.type == "cuda":
        shapes += [(135, 248320)]
    for num, width in shapes:
        draw = Numbers(device, num)
        logits = draw.normal(num, 2 * width, scale=4.0)[:, :width]
        logits[0] += 300.0
        logits[-1] -= 300.0
        targets = torch.randint(width, (num,), generator=draw.generator).to(device)
        targets[0], targets[-1] = 0, width - 1
        (exact,) = (t.requires_grad_() for t in wide(logits))
        expected = F.cross_entropy(exact, targets.cpu(), reduction="sum")
        (gradient,) = torch.autograd.grad(expected, exact)
        nll, out = nll_and_gradient(logits, targets, logits)
        assert out.data_ptr() == logits.data_ptr()
        worst.compare(nll, expected, 1e-5, f"loss of {num} x {width}")
        worst.compare(out, gradient, 1e-5, f"gradient of {num} x {width}")
    logits = Numbers(device).normal(3, 20)
    logits[1, 4] = float("nan")
    _, out = nll_and_gradient(logits, targets.new_zeros(3), logits)
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]
    return worst.figure
