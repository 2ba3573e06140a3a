"""Root mean square normalisation (arXiv:1910.07467), computed in float32."""

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
        weight = self.weight.float()
        if self.shifted:
            weight = weight + 1.0
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps).to(x.dtype)
