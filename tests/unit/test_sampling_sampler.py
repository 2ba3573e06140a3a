"""The sampler as a whole: distributions, reproducibility, independence of the batch, log-probabilities, bad logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.sequence import Sequence, new_sequences
from engine.errors import InternalError, InvalidArgumentError, ShapeError
from engine.request import Request, SamplingParams
from engine.sampling import logprobs as logprobs_module
from engine.sampling import sampler as sampler_module
from engine.sampling.logprobs import prompt_logprobs, token_logprobs
from engine.sampling.random import sampling_key, uniform
from engine.sampling.sampler import Sampler, likeliest

V = 64
SAMPLER = Sampler()


def make(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), n: int = 1, **params: Any) -> list[Sequence]:
    request = Request(request_id="r", model="m", prompt_token_ids=list(prompt), n=n, sampling=SamplingParams(**params))
    sequences = new_sequences(request, eos_token_ids=[0], max_model_len=100_000)
    for sequence in sequences:
        for token in output:
            sequence.append(token, 0.0)
    return sequences


def random_logits(rows: int, seed: int = 0, vocab_size: int = V) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic over cells that are expected at least five times, the rest in one cell."""
    expected = probs.double() * counts.sum()
    large = expected >= 5
    observed = torch.cat([counts[large].double(), counts[~large].sum().double().unsqueeze(0)])
    expected = torch.cat([expected[large], expected[~large].sum().unsqueeze(0)])
    used = expected > 0
    assert observed[~used].sum() == 0, "a token of probability 0 was drawn"
    statistic = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = max(1, int(used.sum()) - 1)
    return float((statistic - freedom) / (2 * freedom) ** 0.5)  # about standard normal


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8, "temperature": 1.5},
        {"min_p": 0.1, "logit_bias": {3: 4.0}},
    ],
)
def test_draws_follow_the_filtered_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 6000 tokens of one seeded completion, against probabilities worked out here."""
    row = random_logits(1, seed=5)[0]
    scores = row.clone()
    for token, bias in params.get("logit_bias", {}).items():
        scores[token] += bias
    probs = (scores / params.get("temperature", 1.0)).softmax(-1)
    if "top_k" in params:
        probs[probs.argsort(descending=True)[params["top_k"] :]] = 0
    if "top_p" in params:
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        probs[order[before >= params["top_p"]]] = 0
    if "min_p" in params:
        probs[probs < params["min_p"] * probs.max()] = 0
    probs /= probs.sum()

    rounds, rows = 6000, 500
    counts = torch.zeros(V, dtype=torch.int64)
    for start in range(0, rounds, rows):
        batch: list[Sequence] = []
        for _ in range(rows):
            (copy,) = make(seed=11, **params)
            copy.token_ids = copy.token_ids[:2] + [1] * (start + len(batch))
            batch.append(copy)
        counts += torch.bincount(torch.tensor(SAMPLER.sample(row.repeat(rows, 1), batch).token_ids), minlength=V)
    assert counts.sum() == rounds
    assert abs(chi_square(counts, probs)) < 4


def test_uniforms_are_uniform_and_independent_of_neighbours() -> None:
    """100 cells over 20,000 draws of one key, and the correlation of successive draws."""
    key = sampling_key(3, 0)
    draws = torch.tensor([uniform(key, k) for k in range(20_000)], dtype=torch.float64)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.bincount((draws * 100).long(), minlength=100)
    assert abs(chi_square(counts, torch.full((100,), 0.01))) < 4
    assert abs(float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1])) < 0.03


PARAMS = st.fixed_dictionaries(
    {"seed": st.integers(0, 3)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.7]),
        "top_k": st.sampled_from([1, 3, 20]),
        "top_p": st.sampled_from([0.2, 0.7, 0.95]),
        "min_p": st.sampled_from([0.05, 0.5]),
        "repetition_penalty": st.sampled_from([0.7, 1.4]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.7]),
        "logit_bias": st.sampled_from([{3: 2.0}, {0: 5.0, 5: -9.0}]),
        "min_tokens": st.sampled_from([1, 5]),
        "logprobs": st.sampled_from([0, 3]),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(PARAMS, st.lists(st.integers(0, V - 1), max_size=4)), min_size=1, max_size=8),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_row_is_what_it_would_be_alone(rows: list[tuple[dict[str, Any], list[int]]], shuffle: random.Random) -> None:
    """Whatever else is in the batch and in whichever order, tokens and log-probabilities are the same."""
    sequences = [make(output=tuple(output), **params)[0] for params, output in rows]
    logits = random_logits(len(rows))
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    together = SAMPLER.sample(logits[order].clone(), [sequences[row] for row in order])
    assert together.errors == {}
    for place, row in enumerate(order):
        alone = SAMPLER.sample(logits[row : row + 1].clone(), [sequences[row]])
        assert together.token_ids[place] == alone.token_ids[0]
        assert together.logprobs[place] == alone.logprobs[0]


def test_greedy_takes_the_likeliest_after_bias_and_penalties() -> None:
    """And no filter changes that; a temperature too small to matter is greedy too."""
    logits = random_logits(3, seed=2)
    best = logits.argmax(-1).tolist()
    plain, biased, tiny = (
        make(temperature=0.0, top_k=3, top_p=0.5)[0],
        make(temperature=0.0, logit_bias={9: 1000.0})[0],
        make(temperature=1e-300)[0],
    )
    assert SAMPLER.sample(logits, [plain, biased, tiny]).token_ids == [best[0], 9, best[2]]


def test_chunks_of_rows_give_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [make(seed=i)[0] for i in range(7)]
    logits = random_logits(7)
    whole = SAMPLER.sample(logits.clone(), sequences).token_ids
    monkeypatch.setattr(sampler_module, "CHUNK_ELEMENTS", 3 * V)
    assert SAMPLER.sample(logits.clone(), sequences).token_ids == whole


@pytest.mark.parametrize("point", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(point: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and last token are masked: the extreme draws give their neighbours."""
    monkeypatch.setattr(sampler_module, "uniform", lambda key, counter: point)
    logits = torch.zeros(1, V)
    logits[0, [0, V - 1]] = -torch.inf
    assert SAMPLER.sample(logits, make()).token_ids == [1 if point == 0.0 else V - 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    """Its sequence gets an error; the tokens of the others are as without it."""
    sequences = [make(seed=i, temperature=temperature, top_p=0.9, logprobs=1, top_k=9)[0] for i in range(3)]
    logits = random_logits(3)
    expected = SAMPLER.sample(logits.clone(), sequences)
    logits[1, 7] = bad
    sampled = SAMPLER.sample(logits, sequences)
    assert list(sampled.errors) == [1]
    assert isinstance(sampled.errors[1], InternalError)
    assert [sampled.token_ids[i] for i in (0, 2)] == [expected.token_ids[i] for i in (0, 2)]
    assert [sampled.logprobs[i] for i in (0, 2)] == [expected.logprobs[i] for i in (0, 2)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parameters_that_leave_no_token_are_the_callers_fault(temperature: float) -> None:
    """min_tokens with every token a stop token: an error for this sequence, not a masked token."""
    stuck = make(temperature=temperature, min_tokens=1, stop_token_ids=list(range(V)))[0]
    sampled = SAMPLER.sample(random_logits(2), [stuck, make(temperature=temperature)[0]])
    assert list(sampled.errors) == [0]
    assert isinstance(sampled.errors[0], InvalidArgumentError)
    assert sampled.errors[0].reason == "NO_TOKEN_LEFT"


def test_vocabulary_padding_of_minus_infinity_is_no_error() -> None:
    logits = random_logits(1)
    logits[0, 40:] = -torch.inf
    sampled = SAMPLER.sample(logits, make(seed=1, temperature=0.7, top_k=50, top_p=0.99))
    assert sampled.errors == {}
    assert sampled.token_ids[0] < 40


def test_the_likeliest_are_those_of_torch() -> None:
    logits = torch.randn(9, 1003)
    logits[1, 7] = logits[1, 900] = 50.0  # the first of equals
    logits[2, 30], logits[2, 31] = torch.nan, torch.inf
    logits[3] = -torch.inf
    logits[4, -1], logits[5, 0] = torch.inf, 99.0
    for rows in (logits, logits[:, ::2], logits[:1]):
        for found, wanted in zip(likeliest(rows), rows.double().max(-1), strict=True):
            torch.testing.assert_close(found.double(), wanted.double(), equal_nan=True, rtol=0, atol=0)


def test_rows_and_sequences_must_match() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 64\] for 1 sequences"):
        SAMPLER.sample(random_logits(2), make())


def test_logprobs_are_of_the_model_not_of_the_filters() -> None:
    """From logits before bias, temperature and penalties, for those rows that ask, with rank and alternatives."""
    logits = random_logits(3, seed=3)
    params: dict[str, Any] = {"temperature": 0.0, "logit_bias": {5: 100.0}, "repetition_penalty": 1.5}
    sequences = [make(logprobs=4, **params)[0], make(**params)[0], make(logprobs=0, **params)[0]]
    expected = logits.log_softmax(-1)
    sampled = SAMPLER.sample(logits.clone(), sequences)
    first, none, last = sampled.logprobs
    assert none is None
    assert first is not None
    assert last is not None
    assert first.token_id == last.token_id == 5
    assert first.logprob == pytest.approx(float(expected[0, 5]), abs=1e-5)
    assert first.rank == int((expected[0] > expected[0, 5]).sum()) + 1
    values, ids = expected[0].topk(4)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert last.top == []


def test_prompt_logprobs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position by position the log-probability of the token that follows, however the rows are cut."""
    logits = random_logits(10, seed=4)
    following = list(range(20, 30))
    whole = prompt_logprobs(logits, following, 2)
    monkeypatch.setattr(logprobs_module, "CHUNK_ELEMENTS", 3 * V)
    assert prompt_logprobs(logits, following, 2) == whole
    expected = logits.log_softmax(-1)[range(10), following]
    assert [entry.logprob for entry in whole] == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(len(entry.top) == 2 for entry in whole)
    with pytest.raises(ShapeError):
        token_logprobs(logits, following[1:], [0] * 9)


def test_a_draw_depends_on_seed_index_and_place_alone() -> None:
    """Different for different triples; the values themselves are fixed, so seeds outlive processes and releases."""
    draws = {(s, i, k): uniform(sampling_key(s, i), k) for s in range(4) for i in range(4) for k in range(4)}
    assert len(set(draws.values())) == 64
    assert draws[0, 0, 0] == 0.39875366978841575
    assert uniform(sampling_key(7, 1), 5) == 0.668432148833958
    assert sampling_key((1 << 63) - 1, 63) != sampling_key((1 << 63) - 2, 63)
