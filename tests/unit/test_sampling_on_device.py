"""The sampler for devices chooses what the plain sampler chooses, and never looks at what it computes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.core.sequence import Sequence
from engine.errors import ShapeError
from engine.sampling import on_device
from engine.sampling.base import processors
from engine.sampling.on_device import DeviceSampler, choose, parameters
from engine.sampling.sampler import Sampler
from tests.unit.test_sampling_sampler import make, random_logits

KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}],
    "drawn": [{}, {"temperature": 0.3}, {"min_p": 0.2, "temperature": 1.7}, {"temperature": 0.0}],
    "filtered": [
        {"top_k": 3},
        {"top_k": 40, "temperature": 2.0},
        {"top_p": 0.4},
        {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "temperature": 0.8},
        {"top_k": 10_000},
        {"temperature": 0.0, "top_k": 2, "top_p": 0.5},
        {},
    ],
}


def sequences(kind: str, rows: int, seed: int) -> list[Sequence]:
    """Of one kind, with seeds and lengths of their own."""
    chosen = random.Random(seed)
    return [
        make(output=(1,) * chosen.randrange(5), seed=chosen.randrange(1000), **chosen.choice(KINDS[kind]))[0]
        for _ in range(rows)
    ]


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the numbers of rows that went to the plain sampler."""
    rows: list[int] = []

    class Counting(Sampler):
        def sample(self, logits: torch.Tensor, sequences: Any) -> Any:
            rows.append(len(sequences))
            return super().sample(logits, sequences)

    monkeypatch.setattr(on_device, "Sampler", Counting)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [64, 3000])
def test_the_same_tokens(kind: str, vocab_size: int, handed_on: list[int]) -> None:
    sampler = DeviceSampler()
    for seed in range(20):
        logits = random_logits(16, seed, vocab_size)
        chosen = sequences(kind, 16, seed)
        wanted = Sampler().sample(logits.clone(), chosen).token_ids
        assert sampler.sample(logits, chosen).token_ids == wanted
    if kind != "filtered" or vocab_size == 64:
        assert not handed_on


def test_equal_logits_at_the_edge() -> None:
    """A head in bfloat16 repeats logits. Which of equal tokens a nucleus takes is not defined, how many it takes is."""
    logits = random_logits(40, 3, 1000).to(torch.bfloat16).float()
    chosen = sequences("filtered", 40, 5)
    rows = [row for row, s in enumerate(chosen) if s.sampling.top_p < 1.0 and s.sampling.temperature > 0.0]
    assert len(rows) > 5
    logits, chosen = logits[rows], [chosen[row] for row in rows]
    params, filters = parameters(chosen, logits.device)
    assert params is not None
    assert filters
    scores = torch.stack([s / c.sampling.temperature for s, c in zip(logits, chosen, strict=True)])
    got, certain = on_device._filter(scores, params[:, 2:3].long(), params[:, 3:4])
    assert bool(certain.all())
    wanted = scores.clone()
    for row, s in enumerate(chosen):
        for name in ("top_k", "top_p"):
            processor = processors.get(name)
            if processor.applies(s.sampling):
                wanted[row] = processor.process(wanted[row : row + 1], [s])[0]
    assert torch.equal(got.sort(dim=-1).values, wanted.sort(dim=-1).values)
    assert torch.equal(got[got.isfinite()], scores[got.isfinite()])


def test_what_the_plain_sampler_decides(handed_on: list[int]) -> None:
    """A nucleus and a top_k of more tokens than are sorted, and logits that are not finite; these rows alone."""
    logits = random_logits(6, 1, 3000)
    logits[1] = 0.001 * logits[1]
    logits[3, 7] = torch.nan
    logits[4] = -torch.inf
    chosen = [
        make(seed=1, top_p=0.5)[0],
        make(seed=2, top_p=0.99)[0],
        make(seed=3, top_k=900)[0],
        make(seed=4)[0],
        make(temperature=0.0)[0],
        make(temperature=0.0, top_p=0.1)[0],
    ]
    wanted = Sampler().sample(logits.clone(), chosen)
    got = DeviceSampler().sample(logits, chosen)
    assert handed_on == [4]
    for row in (0, 1, 2, 5):
        assert got.token_ids[row] == wanted.token_ids[row]
    assert {row: str(error) for row, error in got.errors.items()} == {
        row: str(error) for row, error in wanted.errors.items()
    }
    assert set(got.errors) == {3, 4}


def test_rows_that_ask_for_more_take_the_plain_sampler(handed_on: list[int]) -> None:
    logits = random_logits(3, 2)
    for params in ({"logprobs": 2}, {"repetition_penalty": 1.3}, {"logit_bias": {5: 50.0}}, {"min_tokens": 3}):
        chosen = [make(seed=1)[0], make(seed=2, **params)[0], make(temperature=0.0)[0]]
        wanted = Sampler().sample(logits.clone(), chosen)
        got = DeviceSampler().sample(logits.clone(), chosen)
        assert (got.token_ids, got.logprobs) == (wanted.token_ids, wanted.logprobs)
    assert handed_on == [3] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_back(kind: str) -> None:
    """On torch's meta device there is nothing to read: an operation that looks at numbers raises."""
    device = torch.device("meta")
    tokens = choose(torch.empty(16, 3000, device=device), *parameters(sequences(kind, 16, 0), device))
    assert tokens.shape == (16,)
    assert tokens.dtype == torch.int64


def test_shapes_are_checked() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 64\] for 1 sequences"):
        DeviceSampler().sample(random_logits(2), make())
