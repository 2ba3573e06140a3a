"""Root mean square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.ops.norm import add_rms_norm, gated_rms_norm, rms_norm


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
        return rms_norm(x, self.weight, self.eps, shifted=self.shifted)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and ``forward`` of it; both [..., dim]."""
        return add_rms_norm(x, y, self.weight, self.eps, shifted=self.shifted)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * w * silu(gate): the norm at the end of a gated delta-net. Its weight is never shifted."""

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., dim], normalised over the last axis; the type of gate is kept."""
        return gated_rms_norm(x, gate, self.weight, self.eps)
