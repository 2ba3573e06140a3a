"""The kernel that chooses tokens gives those of the plain sampler, or leaves the row to it; mostly it does not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core.sequence import Sequence
from engine.errors import ShapeError
from engine.ops import cpu
from engine.sampling.on_cpu import CpuSampler
from engine.sampling.on_device import parameters
from engine.sampling.sampler import Sampler
from tests.unit.test_sampling_sampler import make

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

PARAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.01},
    "warm": {"temperature": 1.5},
    "greedy": {"temperature": 0.0, "top_k": 3},
    "top_k": {"top_k": 40, "temperature": 0.7},
    "top_k of one": {"top_k": 1},
    "top_k of more than there are blocks": {"top_k": 300},
    "top_k of all": {"top_k": 100_000},
    "top_p": {"top_p": 0.95, "temperature": 0.8},
    "top_p of one": {"top_p": 1e-9},
    "top_p of nearly all": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "min_p of nearly nothing": {"min_p": 1e-30},
    "min_p of one": {"min_p": 1.0, "temperature": 3.0},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.9},
}


def random_rows(vocab_size: int, scale: float, seed: int) -> tuple[Tensor, list[Sequence]]:
    """Logits and sequences of all PARAMS."""
    chosen = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(PARAMS), vocab_size, generator=generator) + chosen.choice([0.0, 25.0, -40.0])
    return logits, [make(seed=chosen.randrange(10**9), **params)[0] for params in PARAMS.values()]


def choose(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    return cpu.choose(logits, parameters(sequences, logits.device)[0]).tolist()


@pytest.mark.parametrize(("vocab_size", "scale"), [(1, 1.0), (7, 2.0), (300, 4.0), (5003, 3.0), (20_000, 6.0)])
def test_the_tokens_of_the_plain_sampler(level: None, vocab_size: int, scale: float) -> None:
    left = rows = 0
    for seed in range(12):
        logits, sequences = random_rows(vocab_size, scale, seed)
        wanted = Sampler().sample(logits.clone(), sequences).token_ids
        before = logits.clone()
        found = choose(logits, sequences)
        assert torch.equal(logits, before)
        assert [w if f < 0 else f for f, w in zip(found, wanted, strict=True)] == wanted
        left, rows = left + found.count(-1), rows + len(found)
    assert left < 0.03 * rows


@pytest.mark.parametrize("name", ["plain", "warm", "top_k", "top_p", "min_p", "all"])
def test_single_rows_on_two_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = 4.0 * torch.randn(9, 50_000)
    sequences = [make(seed=seed, **PARAMS[name])[0] for seed in range(len(logits))]
    together = choose(logits, sequences)
    wanted = Sampler().sample(logits.clone(), sequences).token_ids
    cpu.set_num_threads(2)
    try:
        alone = [choose(row.unsqueeze(0), [s])[0] for row, s in zip(logits, sequences, strict=True)]
        assert choose(logits, sequences) == together
    finally:
        cpu.set_num_threads(1)
    assert alone == together
    assert [w if f < 0 else f for f, w in zip(together, wanted, strict=True)] == wanted
    assert together.count(-1) <= 2


def test_flat_rows(level: None) -> None:
    """Thousands of tokens in a nucleus: what is not too close to call is right."""
    torch.manual_seed(0)
    logits = 0.5 * torch.randn(60, 6000)
    kinds: list[dict[str, Any]] = [{"top_p": 0.9}, {"min_p": 0.2}, {}, {"top_k": 2000, "top_p": 0.7}, {"top_p": 0.999}]
    sequences = [make(seed=row, **kinds[row % len(kinds)])[0] for row in range(len(logits))]
    wanted = Sampler().sample(logits.clone(), sequences).token_ids
    found = choose(logits, sequences)
    assert [w if f < 0 else f for f, w in zip(found, wanted, strict=True)] == wanted
    assert found.count(-1) < 20


def test_equal_and_impossible_logits(level: None) -> None:
    """A head in bfloat16 repeats logits, and padding of a vocabulary is -inf."""
    generator = torch.Generator().manual_seed(1)
    left = 0
    for seed in range(8):
        logits, sequences = random_rows(4000, 3.0, seed)
        logits = logits.to(torch.bfloat16).float()
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf
        logits[seed, 5:] = -torch.inf
        wanted = Sampler().sample(logits.clone(), sequences).token_ids
        found = choose(logits, sequences)
        assert [w if f < 0 else f for f, w in zip(found, wanted, strict=True)] == wanted
        assert not logits[range(len(found)), wanted].isinf().any()
        left += found.count(-1)
    assert left < 0.05 * 8 * len(PARAMS)


def row_of(uniform: float, **params: float) -> Tensor:
    numbers = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    return torch.tensor([[uniform, *numbers.values()]], dtype=torch.float64)


def test_what_rounding_decides_is_left(level: None) -> None:
    two = torch.tensor([[1.0, 1.0, -50.0]])
    for uniform, token in ((0.0, -1), (0.25, 0), (0.5, -1), (0.5 + 1e-5, 1), (0.75, 1), (1 - 1e-9, -1)):
        assert cpu.choose(two, row_of(uniform)).tolist() == [token]
    # The last token stays or does not: of most draws the same comes either way.
    three = torch.tensor([[0.6, 0.39, 0.01]]).log()
    for uniform, token in ((0.3, 0), (0.603, -1), (0.9, 1), (0.995, -1)):
        assert cpu.choose(three, row_of(uniform, top_p=0.99)).tolist() == [token]
    for uniform, token in ((0.3, 0), (0.603, 0), (0.9, 1), (0.995, 1)):
        assert cpu.choose(three, row_of(uniform, top_p=0.989)).tolist() == [token]
    for uniform, token in ((0.3, 0), (0.603, 1), (0.9, 1), (0.995, 2)):
        assert cpu.choose(three, row_of(uniform, top_p=0.991)).tolist() == [token]
    for uniform, token in ((0.3, 0), (0.98, 1), (0.995, -1)):
        assert cpu.choose(three, row_of(uniform, min_p=0.01 / 0.6)).tolist() == [token]
    assert cpu.choose(three, row_of(0.995, min_p=0.016)).tolist() == [2]
    assert cpu.choose(three, row_of(0.995, min_p=0.017)).tolist() == [1]
    # Of two that are equal, either may be the one that is in.
    assert cpu.choose(two, row_of(0.6, top_p=0.4)).tolist() == [-1]
    assert cpu.choose(two, row_of(0.6, top_k=1)).tolist() == [1]


def test_rows_that_are_not_finite_are_left_alone(level: None) -> None:
    logits, sequences = random_rows(700, 3.0, 0)
    sound = choose(logits, sequences)
    rows = {1: torch.nan, 3: torch.inf, 8: torch.nan, 12: torch.inf}
    for row, wrong in rows.items():
        logits[row, 50 * row] = wrong
    assert choose(logits, sequences) == [-1 if row in rows else token for row, token in enumerate(sound)]
    sampled = CpuSampler().sample(logits, sequences)
    assert {row: error.reason for row, error in sampled.errors.items()} == dict.fromkeys(rows, "NON_FINITE_LOGITS")


class Counting(Sampler):
    """Counts the rows that it is asked for."""

    rows = 0

    def sample(self, logits: Tensor, sequences: Any) -> Any:
        self.rows += len(sequences)
        return super().sample(logits, sequences)


def test_penalties_biases_and_log_probabilities() -> None:
    """Around the kernel as around the plain sampler, which is asked for few rows."""
    torch.manual_seed(0)
    asked: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "top_p": 0.9},
        {"logit_bias": {5: 4.0, 7: -90.0}, "temperature": 0.7},
        {"min_tokens": 3, "stop_token_ids": [5, 6, 7], "top_k": 9},
        {"logprobs": 2},
        {"temperature": 0.0, "frequency_penalty": 1.5, "logprobs": 0},
        {},
    ]
    sampler, plain = CpuSampler(), Counting()
    sampler._reference = plain
    for seed in range(12):
        logits = 3.0 * torch.randn(len(asked), 900)
        for chosen in (asked, asked[:1] * 6, asked[3:4] * 6, asked[5:] * 6):
            sequences = [make(output=(5, 9, 5), seed=seed, **params)[0] for params in chosen]
            wanted = Sampler().sample(logits.clone(), sequences)
            found = sampler.sample(logits.clone(), sequences)
            assert (found.token_ids, found.logprobs, found.errors) == (wanted.token_ids, wanted.logprobs, wanted.errors)
    assert plain.rows < 0.05 * 12 * 4 * len(asked)


def test_rows_that_have_no_token() -> None:
    """What is wrong with a row is what the plain sampler says, also where a bias hides it."""
    torch.manual_seed(0)
    logits = torch.randn(4, 70)
    logits[1, 5], logits[2, 8] = torch.inf, torch.nan
    asked: list[dict[str, Any]] = [
        {"logit_bias": {5: 2.0}, "logprobs": 1},
        {"logit_bias": {5: 2.0}, "logprobs": 1},
        {"repetition_penalty": 2.0},
        {"min_tokens": 1, "stop_token_ids": list(range(70))},
    ]
    sequences = [make(seed=1, **params)[0] for params in asked]
    wanted = Sampler().sample(logits.clone(), sequences).errors
    found = CpuSampler().sample(logits, sequences).errors
    assert {row: str(error) for row, error in found.items()} == {row: str(error) for row, error in wanted.items()}
    assert [found[row].reason for row in (1, 2, 3)] == ["NON_FINITE_LOGITS", "NON_FINITE_LOGITS", "NO_TOKEN_LEFT"]


def test_other_types_and_shapes() -> None:
    wide, sequences = torch.randn(2, 64, dtype=torch.float64), [make(seed=seed)[0] for seed in range(2)]
    assert CpuSampler().sample(wide.clone(), sequences).token_ids == Sampler().sample(wide, sequences).token_ids
    with pytest.raises(ShapeError, match=r"\[2, 64\] for 1 sequences"):
        CpuSampler().sample(wide, sequences[:1])
