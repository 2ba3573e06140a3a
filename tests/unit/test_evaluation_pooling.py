"""Pooling, truncation and normalisation of packed hidden states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import OutOfRangeError, ShapeError
from engine.layers.pooling import finish, pool


def packed(lengths: list[int], width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    hidden = torch.randn(sum(lengths), width, generator=generator)
    return hidden, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_each_row_is_its_own_sequences(lengths: list[int]) -> None:
    """mean, cls and last of packed sequences equal those of each sequence taken by itself."""
    hidden, cu_seqlens = packed(lengths)
    parts = hidden.split(lengths)
    assert torch.allclose(pool(hidden, cu_seqlens, "mean"), torch.stack([p.mean(0) for p in parts]), atol=1e-6)
    assert torch.equal(pool(hidden, cu_seqlens, "cls"), torch.stack([p[0] for p in parts]))
    assert torch.equal(pool(hidden, cu_seqlens, "last"), torch.stack([p[-1] for p in parts]))


def test_mean_is_taken_in_float32() -> None:
    """4,096 values of 1.0078125 in bfloat16 keep their mean, which a bfloat16 sum would lose."""
    hidden = torch.full((4096, 2), 1.0078125, dtype=torch.bfloat16)
    mean = pool(hidden, torch.tensor([0, 4096]), "mean")
    assert mean.dtype == torch.float32
    assert torch.allclose(mean, torch.full((1, 2), 1.0078125), rtol=1e-6)


def test_offsets_that_do_not_cover_the_tokens_are_rejected() -> None:
    with pytest.raises(ShapeError, match="offsets from 0 to 5"):
        pool(torch.zeros(5, 2), torch.tensor([0, 4]), "mean")


def test_truncation_comes_before_normalisation() -> None:
    """[3, 4, 12] kept to two dimensions is [0.6, 0.8]."""
    vectors = torch.tensor([[3.0, 4.0, 12.0]])
    assert torch.allclose(finish(vectors, dimensions=2, normalize=True), torch.tensor([[0.6, 0.8]]))
    assert torch.equal(finish(vectors, dimensions=2, normalize=False), torch.tensor([[3.0, 4.0]]))
    assert torch.allclose(finish(vectors, dimensions=None, normalize=True).norm(), torch.tensor(1.0))
    assert torch.equal(finish(torch.zeros(1, 3), dimensions=3, normalize=True), torch.zeros(1, 3))


@pytest.mark.parametrize("dimensions", [0, -1, 4, 1 << 40])
def test_dimensions_are_checked(dimensions: int) -> None:
    with pytest.raises(OutOfRangeError, match=rf"dimensions is {dimensions}; accepted: an integer in \[1, 3\]"):
        finish(torch.zeros(1, 3), dimensions=dimensions, normalize=True)
