"""Grouped products of experts: both forms, empty groups, gradients."""

from __future__ import annotations

import pytest
import torch

from engine.ops.moe import grouped_linear, grouped_linear_fused, grouped_linear_reference


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0]], ids=str)
def test_both_forms_equal_single_products(counts: list[int]) -> None:
    """Each row by the matrix of its group; groups without rows are passed over."""
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 8, generator=gen), torch.randn(4, 16, 8, generator=gen)
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    expected = torch.stack([weight[g] @ row for g, row in zip(groups, x, strict=True)])
    for form in (grouped_linear, grouped_linear_reference, grouped_linear_fused):
        torch.testing.assert_close(form(x, weight, torch.tensor(counts)), expected, atol=1e-5, rtol=1e-5)


def test_gradients() -> None:
    """float64 gradcheck with respect to rows and matrices."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=gen, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, generator=gen, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 4])
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, counts), (x, weight))
