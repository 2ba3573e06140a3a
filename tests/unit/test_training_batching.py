"""Batches are a function of seed and step; micro-batches keep every example whole, in order and within their bound."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.training.batching import BatchOrder, MicroBatch, micro_batches
from engine.training.dataset import Examples
from tests.training_runs import random_examples


@given(num=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 2**63 - 1), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_every_example_once(num: int, size: int, seed: int, shuffle: bool) -> None:
    """The batches of an epoch are a permutation of the examples, each full but the last."""
    order = BatchOrder(num, size, seed, shuffle)
    for epoch in range(3):
        steps = range(1 + epoch * order.steps_per_epoch, 1 + (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert Counter(i for batch in batches for i in batch) == Counter(range(num))
        assert all(len(batch) == size for batch in batches[:-1])
        assert order.epoch_of(steps[-1]) == epoch + 1
        if not shuffle:
            assert [i for batch in batches for i in batch] == list(range(num))


def test_order_is_the_same_from_any_step_and_differs_between_epochs_and_seeds() -> None:
    """A fresh order asked for step 17 alone gives what one that went through all steps gives."""
    walked = BatchOrder(20, 4, 7, True)
    all_batches = [walked.batch(step) for step in range(1, 21)]
    assert BatchOrder(20, 4, 7, True).batch(17) == all_batches[16]
    assert all_batches[0:5] != all_batches[5:10]
    assert BatchOrder(20, 4, 8, True).batch(1) != all_batches[0]


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    max_tokens=st.integers(1, 60),
    parts=st.integers(1, 14),
    packing=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_micro_batches_cover_the_batch(lengths: list[int], max_tokens: int, parts: int, packing: bool) -> None:
    """All tokens in order; no forward above the bound unless one example alone is; at least ``parts`` forwards."""
    examples = list(Examples.of(random_examples(lengths)))
    cut = list(micro_batches(examples, max_tokens=max_tokens, parts=parts, packing=packing))
    assert torch.cat([m.token_ids for m in cut]).tolist() == [t for e in examples for t in e.token_ids.tolist()]
    assert [n for m in cut for n in m.lengths] == lengths
    assert all(m.num_tokens <= max_tokens or len(m.lengths) == 1 for m in cut)
    assert len(cut) >= min(parts, len(lengths))
    assert sum(m.num_loss_tokens for m in cut) == sum(e.num_loss_tokens for e in examples)
    if not packing:
        assert all(len(m.lengths) == 1 for m in cut)


def test_rows_predict_their_own_example() -> None:
    """Each row's target is the next token of the same example; the first token of an example is never a target, even
    where its mask says so."""
    examples = random_examples([5, 4, 6])
    examples[1].loss_mask[:] = [True] * 4
    batch = MicroBatch.of(list(Examples.of(examples)))
    expected = []
    start = 0
    for example in examples:
        for i in range(1, len(example.token_ids)):
            if example.loss_mask[i]:
                expected.append((start + i - 1, example.token_ids[i]))
        start += len(example.token_ids)
    assert list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)) == expected


@pytest.mark.parametrize("size", [3, 5])
def test_epoch_fraction(size: int) -> None:
    """The epoch that a step reports is the share of examples seen."""
    order = BatchOrder(10, size, 0, True)
    assert order.epoch_of(0) == 0.0
    assert order.epoch_of(1) == pytest.approx(size / 10)
