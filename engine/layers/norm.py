"""Root mean square normalisation (arXiv:1910.07467), computed in float32, or in float64 for inputs of that type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * w, or * (1 + w) where ``shifted`` (Gemma 3, Qwen3.5).

    Args:
        shifted: the stored weight is the distance from 1.
    """

    def __init__(self, dim: int, eps: float, *, shifted: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.eps = eps
        self.shifted = shifted
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim], normalised over the last axis; the type of x is kept."""
        wide = widen(x)
        weight = self.weight.to(wide.dtype)
        if self.shifted:
            weight = weight + 1.0
        return F.rms_norm(wide, (x.shape[-1],), weight, self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * w * silu(gate): the norm at the end of a gated delta-net. Its weight is never shifted."""

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., dim], normalised over the last axis; the type of gate is kept."""
        wide = widen(x)
        normed = F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps)
        return (normed * F.silu(gate.to(wide.dtype))).to(gate.dtype)


def widen(x: Tensor) -> Tensor:
    """x in float32; float64 stays, so that gradients can be checked in it."""
    return x if x.dtype == torch.float64 else x.float()
