"""Each logits processor against Hugging Face transformers' own, and what they have no counterpart for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from engine.core.sequence import Sequence, new_sequences
from engine.request import Request, SamplingParams
from engine.sampling.base import processors
from engine.sampling.processors.top_p import NUCLEUS_TOKENS

EOS = 0


def make(prompt: list[int], output: list[int], **params: Any) -> Sequence:
    """A sequence that has sampled ``output`` already."""
    request = Request(request_id="r", model="m", prompt_token_ids=prompt, sampling=SamplingParams(**params))
    (sequence,) = new_sequences(request, eos_token_ids=[EOS], max_model_len=1000)
    for token in output:
        sequence.append(token, 0.0)
    return sequence


def process(name: str, logits: Tensor, sequences: list[Sequence]) -> Tensor:
    processor = processors.get(name)
    assert all(processor.applies(sequence.sampling) for sequence in sequences)
    return processor.process(logits.clone(), list(sequences))


def reference(processor: Any, row: Tensor, ids: list[int] | None = None) -> Tensor:
    scores: Tensor = processor(torch.tensor([ids or [1]]), row.unsqueeze(0).clone())
    return scores.squeeze(0)


# Smaller and larger than what top_p sorts at first; flat rows have a nucleus beyond it.
SHAPES = [(50, 3.0), (NUCLEUS_TOKENS * 4, 3.0), (NUCLEUS_TOKENS * 4, 0.1)]


@pytest.mark.parametrize(("vocab_size", "spread"), SHAPES)
@pytest.mark.parametrize(
    ("name", "key", "values", "warper"),
    [
        ("top_k", "top_k", [1, 2, 7, 49, 5000], lambda k: hf.TopKLogitsWarper(top_k=k)),
        ("top_p", "top_p", [0.01, 0.3, 0.5, 0.9, 0.99], lambda p: hf.TopPLogitsWarper(top_p=p)),
        ("min_p", "min_p", [0.001, 0.05, 0.3, 0.9, 1.0], lambda p: hf.MinPLogitsWarper(min_p=p)),
    ],
)
def test_filters_keep_the_same_tokens(
    name: str, key: str, values: list[Any], warper: Any, vocab_size: int, spread: float
) -> None:
    """Several settings in one batch, each row as transformers filters it alone."""
    generator = torch.Generator().manual_seed(vocab_size)
    for _ in range(5):
        logits = torch.randn(len(values), vocab_size, generator=generator) * spread
        sequences = [make([1], [], **{key: value}) for value in values]
        ours = process(name, logits, sequences)
        theirs = torch.stack([reference(warper(value), row) for value, row in zip(values, logits, strict=True)])
        assert torch.equal(ours, theirs)


def test_temperature_gives_the_same_probabilities() -> None:
    """Up to a shift, which changes none."""
    temperatures = [0.01, 0.5, 1.5, 100.0]
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) * 4
    ours = process("temperature", logits, [make([1], [], temperature=t) for t in temperatures])
    theirs = torch.stack(
        [reference(hf.TemperatureLogitsWarper(t), row) for t, row in zip(temperatures, logits, strict=True)]
    )
    assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-6)


def test_a_small_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0]])
    assert torch.isfinite(process("temperature", logits, [make([1], [], temperature=2e-5)])[0, 0])


def test_repetition_penalty_covers_prompt_and_completion() -> None:
    """Each distinct token once, however often it occurs, as transformers does."""
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1)) * 4
    cases = [([1, 2, 2], [2, 5], 1.3), ([7], [], 0.5), ([3, 4], [4, 4, 9], 2.0)]
    ours = process("penalties", logits, [make(p, o, repetition_penalty=x) for p, o, x in cases])
    theirs = torch.stack(
        [
            reference(hf.RepetitionPenaltyLogitsProcessor(x), row, p + o)
            for (p, o, x), row in zip(cases, logits, strict=True)
        ]
    )
    assert torch.equal(ours, theirs)


def test_presence_and_frequency_penalties_cover_the_completion_alone() -> None:
    """Presence once per token, frequency per occurrence; tokens of the prompt are free."""
    logits = torch.zeros(2, 10)
    sequences = [
        make([1, 2], [2, 3, 3], presence_penalty=0.5, frequency_penalty=0.25),
        make([1], [1], presence_penalty=-1.0),
    ]
    expected = torch.zeros(2, 10)
    expected[0, 2], expected[0, 3], expected[1, 1] = -0.75, -1.0, 1.0
    assert torch.equal(process("penalties", logits, sequences), expected)


def test_logit_bias_is_added_and_saturates() -> None:
    """A bias that float32 cannot hold still decides, and breaks nothing."""
    sequences = [make([1], [], logit_bias={3: 2.5, 4: -1.0}), make([1], [], logit_bias={0: 1e308})]
    result = process("logit_bias", torch.ones(2, 5), sequences)
    assert result[0].tolist() == [1.0, 1.0, 1.0, 3.5, 0.0]
    assert torch.isfinite(result).all()
    assert int(result[1].argmax()) == 0


def test_min_tokens_masks_all_that_would_end() -> None:
    """End-of-sequence and stop tokens, until enough tokens are made; with ignore_eos the stop tokens alone."""
    sequences = [
        make([1], [5], min_tokens=2, stop_token_ids=[3]),
        make([1], [5, 5], min_tokens=2, stop_token_ids=[3]),
        make([1], [5], min_tokens=2, stop_token_ids=[3], ignore_eos=True),
    ]
    masked = process("min_tokens", torch.zeros(3, 6), sequences) == -torch.inf
    assert masked.nonzero().tolist() == [[0, 0], [0, 3], [2, 3]]


def test_top_p_after_top_k_is_over_what_top_k_left() -> None:
    """As in transformers' order: the nucleus is of the renormalised rest."""
    logits = torch.randn(40, NUCLEUS_TOKENS * 2, generator=torch.Generator().manual_seed(2))
    sequences = [make([1], [], top_k=20, top_p=0.7)] * 40
    ours = process("top_p", process("top_k", logits, sequences), sequences)
    theirs = torch.stack(
        [reference(hf.TopPLogitsWarper(0.7), reference(hf.TopKLogitsWarper(20), row)) for row in logits]
    )
    assert torch.equal(ours, theirs)


def test_processors_run_in_the_documented_order() -> None:
    """The order is part of the behaviour: it is that of transformers."""
    names = sorted(processors.names(), key=lambda name: processors.get(name).order)
    assert names == ["logit_bias", "min_tokens", "penalties", "temperature", "top_k", "top_p", "min_p"]
    assert len({processors.get(name).order for name in names}) == len(names)
