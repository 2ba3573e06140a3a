"""Root mean square normalisation (arXiv:1910.07467) and layer normalisation (arXiv:1607.06450), computed in float32, or
in float64 for inputs of that type.

Shapes: D width. Proof: tests/parity for the torch form; tests/unit/test_triton_kernels.py and test_cpu_ops.py for the
kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import cpu, fused_gradients
from engine.ops.backends import uses_triton_forward
from engine.ops.elementwise import add
from engine.ops.root_norm import root_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, shifted: bool = False) -> Tensor:
    """x / rms(x) * weight, or * (1 + weight) where ``shifted``; x [..., D], weight [D], the type of x is kept."""
    if uses_triton_forward(x, weight):
        from engine.ops.triton import rms_norm as kernels

        return kernels.rms_norm(x, weight, eps, shifted=shifted)
    if fused_gradients.takes(x) and not weight.requires_grad:
        return fused_gradients.rms_norm(x, weight, eps, shifted=shifted)
    if cpu.takes(x, weight):
        return cpu.rms_norm(x, weight, eps, shifted=shifted)
    wide = widen(x)
    weight = weight.to(wide.dtype)
    if shifted:
        weight = weight + 1.0
    return _rms_norm(wide, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, *, shifted: bool = False) -> tuple[Tensor, Tensor]:
    """x + y, and ``rms_norm`` of it: what a residual and the norm behind it are; both [..., D]."""
    if x.shape == y.shape and x.dtype == y.dtype and uses_triton_forward(x, y, weight):
        from engine.ops.triton import rms_norm as kernels

        return kernels.add_rms_norm(x, y, weight, eps, shifted=shifted)
    total = add(x, y)
    return total, rms_norm(total, weight, eps, shifted=shifted)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight * silu(gate); x and gate [..., D], the type of gate is kept."""
    if uses_triton_forward(x, gate, weight):
        from engine.ops.triton import rms_norm as kernels

        return kernels.rms_norm(x, weight, eps, gate=gate)
    if fused_gradients.takes(x, gate) and gate.dtype != torch.float64 and not weight.requires_grad:
        return fused_gradients.rms_norm(x, weight, eps, gate=gate)
    if cpu.takes(x, gate, weight):
        return cpu.rms_norm(x, weight, eps, shifted=False, gate=gate)
    if fused_gradients.takes_on_cpu(x, gate, weight) and not weight.requires_grad:
        return fused_gradients.rms_norm(x, weight, eps, gate=gate)
    wide = widen(x)
    normed = _rms_norm(wide, weight.to(wide.dtype), eps)
    return (normed * F.silu(gate.to(wide.dtype))).to(gate.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(s - mean(s)) / sqrt(var(s) + eps) * weight + bias over the last axis, of s = x + added + residual.

    Args:
        x: [..., D]. weight, bias: [D].
        added: [D], such as the bias of the product that gave x. residual: like x.
    """
    given = [t for t in (added, residual) if t is not None]
    if cpu.takes(x, weight, bias, *given):
        return cpu.layer_norm(x, weight, bias, eps, added, residual)
    for term in given:
        x = x + term
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch has one kernel for this on CUDA, and plain operations on a CPU."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return root_norm(x, weight, count=x.shape[-1], eps=eps)


def widen(x: Tensor) -> Tensor:
    """x in float32; float64 stays, so that gradients can be checked in it."""
    return x if x.dtype == torch.float64 else x.float()
