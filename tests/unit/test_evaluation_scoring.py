"""Moments, slice sizes, NLL and KL against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core.slice_budget import FIRST_SLICE_TOKENS, SliceBudget
from engine.evaluation.perplexity import RunningMean
from engine.evaluation.scoring import token_kl, token_nll

GROUPS = st.lists(st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=7), min_size=1, max_size=9)


@given(GROUPS, st.sampled_from([0.0, 1e6]))
def test_running_mean_equals_that_of_all_values(groups: list[list[float]], shift: float) -> None:
    """Mean and standard error do not depend on the grouping, and stand a large common offset."""
    running = RunningMean()
    for group in groups:
        running.add(torch.tensor(group, dtype=torch.float64) + shift)
    values = torch.tensor([v + shift for group in groups for v in group], dtype=torch.float64)
    assert running.count == len(values)
    assert running.mean == pytest.approx(values.mean().item(), rel=1e-12, abs=1e-12)
    if len(values) == 1:
        assert running.standard_error is None
    else:
        expected = values.std().item() / math.sqrt(len(values))
        assert running.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_slices_grow_to_the_budget_and_shrink_from_it() -> None:
    """At 1 ms a token and 50 ms a slice, slices settle at 50 tokens; a machine that turns slower gets smaller ones."""
    budget = SliceBudget(0.05, 2048)
    assert budget.tokens == FIRST_SLICE_TOKENS
    for _ in range(5):
        budget.observe(budget.tokens, budget.tokens * 0.001)
    assert budget.tokens == 50
    for _ in range(20):
        budget.observe(budget.tokens, budget.tokens * 0.01)
    assert budget.tokens == 5


def test_slices_are_larger_while_nobody_is_served() -> None:
    """Idle, a slice may take ten times as long; the first request brings it back to its target."""
    serving = False
    budget = SliceBudget(0.05, 2048, lambda: serving)
    for _ in range(5):
        budget.observe(budget.tokens, budget.tokens * 0.001)
    assert budget.tokens == 500
    serving = True
    assert budget.tokens == 50


def test_slices_at_most_double_and_keep_their_bounds() -> None:
    """One reading that was too good does not make a huge slice; the limits hold for any reading."""
    budget = SliceBudget(0.05, 300)
    budget.observe(128, 1e-9)
    assert budget.tokens == 256
    budget.observe(256, 0.0)
    assert budget.tokens == 300
    for _ in range(60):
        budget.observe(1, 1e6)
    assert budget.tokens == 1
    assert SliceBudget(0.05, 16).tokens == 16


def test_token_nll_and_kl() -> None:
    """Against the definitions in float64; KL of equal logits is 0, and a shift of all logits changes nothing."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, 50, generator=generator) * 3 for _ in range(2))
    targets = torch.arange(6)
    log_p, log_q = (x.double().log_softmax(-1) for x in (p, q))
    assert torch.allclose(token_nll(p, targets), -log_p[torch.arange(6), targets], atol=1e-5)
    assert torch.allclose(token_kl(p, q), (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-5)
    assert token_kl(p, p + 7.0).abs().max() < 1e-5
    assert not torch.allclose(token_kl(p, q), token_kl(q, p), atol=1e-2)
