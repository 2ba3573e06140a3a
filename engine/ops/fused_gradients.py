"""Norms and gated activations with backwards of their own, as training takes them on CUDA, and the activations and
gated norms on the CPU: one launch or pass forward and one backward, and nothing kept but what came in.

Each is a kernel where there are kernels for the device, and else the formula, which is the kernel's reference. Weights
are frozen: what wants a gradient for one takes autograd's way. Proof: tests/unit/test_function_gradients.py for the
formulas, tests/unit/test_triton_kernels.py for the kernels.

Shapes: D the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu
from engine.ops.backends import uses_triton


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels compute from x and the others, with gradients or without."""
    return uses_triton(x.device) and x.dtype != torch.float64 and all(t.device == x.device for t in others)


def takes_on_cpu(*tensors: Tensor) -> bool:
    """Whether the CPU kernels compute from these, of which one wants a gradient."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return False
    with torch.no_grad():
        return cpu.takes(*tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, shifted: bool = False, gate: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight, or * (1 + weight) where ``shifted``, and * silu(gate) with a gate.

    Args:
        x: [..., D]; gate: alike.
        weight: [D], of any floating type, without a gradient.

    Returns: [..., D] in the type of gate, or of x without one.
    """
    assert not weight.requires_grad
    return _RMSNorm.apply(x, gate, weight, eps, shifted)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """y = x r w s: dx = r h - x r^3 / D sum(h x) with h = w s dy, and dgate = x r w s' dy; s = silu(gate)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, shifted: bool) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.shifted = eps, shifted
        if takes(x):
            from engine.ops.triton import rms_norm as kernels

            return kernels.rms_norm(x, weight, eps, shifted=shifted, gate=gate)
        if gate is not None and not shifted and cpu.takes(x, gate, weight):
            return cpu.rms_norm(x, weight, eps, shifted=False, gate=gate)
        wide, factors, inverse, silu, _ = _norm_parts(x, gate, weight, eps, shifted)
        return (wide * inverse * factors * silu).to(x.dtype if gate is None else gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        if takes(x):
            from engine.ops.triton import rms_norm as kernels

            d_x, d_gate = kernels.rms_norm_backward(x, weight, grad, ctx.eps, shifted=ctx.shifted, gate=gate)
            return d_x, d_gate, None, None, None
        if gate is not None and not ctx.shifted and cpu.takes(x, gate, weight, grad):
            return *cpu.rms_norm_gradient(x, weight, grad, ctx.eps, gate), None, None, None
        wide, factors, inverse, silu, slope = _norm_parts(x, gate, weight, ctx.eps, ctx.shifted)
        weighted = grad.to(wide.dtype) * factors
        along = (weighted * silu * wide).mean(dim=-1, keepdim=True)
        d_x = (weighted * silu * inverse - wide * inverse.pow(3) * along).to(x.dtype)
        return d_x, None if gate is None else (weighted * wide * inverse * slope).to(gate.dtype), None, None, None


def _norm_parts(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, shifted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | float]:
    """x in the type of sums, the factors w, r, s and s'."""
    wide = x if x.dtype == torch.float64 else x.float()
    factors = weight.to(wide.dtype) + (1.0 if shifted else 0.0)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    silu, slope = (1.0, 0.0) if gate is None else _silu(gate.to(wide.dtype))
    return wide, factors, inverse, silu, slope


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = x.sigmoid()
    return x * s, s * (1.0 + x * (1.0 - s))


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    s = x.sigmoid()
    return s, s * (1.0 - s)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    # (1 + tanh(u)) / 2 is sigmoid(2 u); u = sqrt(2 / pi) (x + 0.044715 x^3)
    double = 2.0 * (2.0 / torch.pi) ** 0.5
    s = (double * (x + 0.044715 * x.pow(3))).sigmoid()
    return x * s, s + x * s * (1.0 - s) * double * (1.0 + 3 * 0.044715 * x.square())


SLOPES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "swish": _silu,
    "sigmoid": _sigmoid,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""Names of engine.ops.elementwise.ACTIVATIONS to the function and its derivative."""


def gated_activation(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """activation(gate) * up; both [..., D], of one type; ``name`` one of SLOPES."""
    return _GatedActivation.apply(gate, up, name)  # type: ignore[no-any-return, no-untyped-call]


class _GatedActivation(torch.autograd.Function):
    """y = f(gate) up: dgate = f'(gate) up dy and dup = f(gate) dy."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = name
        if takes(gate):
            from engine.ops.triton import gated_activation as kernels

            return kernels.gated_activation(gate, up, name)
        if cpu.takes(gate, up):
            return cpu.gated_activation(gate, up, name)
        wide = gate if gate.dtype == torch.float64 else gate.float()
        return (SLOPES[name](wide)[0] * up).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if takes(gate):
            from engine.ops.triton import gated_activation as kernels

            return *kernels.gated_activation_backward(gate, up, grad, ctx.activation), None
        if cpu.takes(gate, up, grad):
            return *cpu.gated_activation_gradient(gate, up, grad, ctx.activation), None
        value, slope = SLOPES[ctx.activation](gate if gate.dtype == torch.float64 else gate.float())
        return (slope * up * grad).to(gate.dtype), (value * grad).to(up.dtype), None
