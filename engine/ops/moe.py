"""Grouped matrix products: each row by the matrix of its group.

Shapes: M rows sorted by group, G groups, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of group j times weight[j] transposed.

    On CUDA, narrow types take one launch for all groups and never wait for the counts. Elsewhere each group that has
    rows is one product, of which there are at most M: on a CPU that is as fast as torch's grouped product, and it works
    for every type.

    Args:
        x: [M, I], rows of group 0 first.
        weight: [G, O, I].
        counts: [G] integers that sum to M.
    Returns: [M, O]; differentiable with respect to x and weight.
    """
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and _aligned(weight):
        return grouped_linear_fused(x, weight, counts)
    return grouped_linear_reference(x, weight, counts)


def grouped_linear_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One product per group that has rows."""
    # A gradient of weight[group] would be as large as all of weight, once for each group.
    matrices = weight.unbind() if weight.requires_grad else weight
    parts = []
    start = 0
    hit = counts.nonzero().flatten().tolist()
    for group, count in zip(hit, counts[hit].tolist(), strict=True):
        parts.append(F.linear(x[start : start + count], matrices[group]))
        start += count
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


def grouped_linear_fused(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def _aligned(weight: Tensor) -> bool:
    """Whether torch's grouped product takes the matrices: rows and columns in multiples of 16 bytes. Small ranks of
    low-rank factors are not."""
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
