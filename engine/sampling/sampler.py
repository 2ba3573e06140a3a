"""Chooses the next token of every sequence of a batch.

Shapes: N rows, one per sequence; R rows that draw at random; V vocabulary.

The processors change logits in the order that they state (engine.sampling.processors). Greedy rows take the likeliest
token of what results, others draw one. A draw inverts the cumulative distribution at one uniform number, which depends
on the sequence's key and the number of its tokens alone: what else is in the batch never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import EngineError, InternalError, InvalidArgumentError, ShapeError
from engine.ops.transfer import to_device
from engine.request import TokenLogprob
from engine.sampling.base import LogitsProcessor, SamplingSequence, is_greedy, processors
from engine.sampling.logprobs import token_logprobs
from engine.sampling.random import uniform

CHUNK_ELEMENTS = 1 << 22
"""Probabilities to accumulate at a time: 32 MiB in float64."""

DEVICE_CHUNK_ELEMENTS = 1 << 26
"""The same on a GPU, where each chunk costs launches."""


@dataclass(slots=True)
class SampledTokens:
    """What a step of sampling gave.

    Attributes:
        token_ids: N tokens. Those of rows in ``errors`` mean nothing.
        logprobs: N entries; None where not asked for.
        errors: row to why no token could be chosen. The other rows are not affected.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    errors: dict[int, EngineError] = field(default_factory=dict)


class Sampler:
    """Holds no state of sequences: one serves a whole engine."""

    def __init__(self) -> None:
        self._processors = sorted((processors.get(name) for name in processors.names()), key=lambda p: p.order)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Sequence[SamplingSequence]) -> SampledTokens:
        """One token for each sequence.

        Args:
            logits: [N, V] float32, at the last token of each sequence; overwritten.
            sequences: N.

        Raises:
            ShapeError: there are not as many rows as sequences.
        """
        check_rows(logits, sequences)
        asking = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
        random = [row for row, s in enumerate(sequences) if not is_greedy(s.sampling)]
        steps = [
            (processor, rows)
            for processor in self._processors
            if (rows := [r for r, s in enumerate(sequences) if applies(processor, s)])
        ]
        raw = logits[asking] if asking else None  # a copy, before processors change it
        best, tokens = likeliest(logits)
        model_ok = torch.isfinite(best)  # a NaN anywhere in the row is its maximum
        usable = model_ok
        if steps:
            for processor, rows in steps:
                logits = process_rows(processor, logits, rows, sequences)
            best, tokens = likeliest(logits)
            usable = torch.isfinite(best)
        if random:
            numbers = [uniform(sequences[r].sampling_key, sequences[r].num_output_tokens) for r in random]
            uniforms = to_device(numbers, logits.device, torch.float64)
            whole = len(random) == len(sequences)
            drawn = draw(logits if whole else logits[random], uniforms)
            tokens = drawn if whole else tokens.index_copy(0, to_device(random, tokens.device), drawn)

        token_ids: list[int] = tokens.tolist()
        sampled = SampledTokens(token_ids, [None] * len(token_ids))
        if not bool((model_ok & usable).all()):
            for row, (model_fine, fine) in enumerate(zip(model_ok.tolist(), usable.tolist(), strict=True)):
                if not (model_fine and fine):
                    sampled.errors[row] = _error(model_fine, sequences[row])
        if raw is not None:
            add_logprobs(sampled, raw, asking, sequences)
        return sampled


def check_rows(logits: Tensor, sequences: Sequence[SamplingSequence]) -> None:
    """Raises:
    ShapeError: logits are not [N, V] for N sequences.
    """
    if logits.dim() != 2 or logits.shape[0] != len(sequences):
        raise ShapeError(f"logits are {list(logits.shape)} for {len(sequences)} sequences; accepted: [N, V]")


def add_logprobs(sampled: SampledTokens, raw: Tensor, asking: list[int], sequences: Sequence[SamplingSequence]) -> None:
    """Enters the log-probabilities of the sampled tokens.

    Args:
        raw: [n, V], the model's own logits of the rows that ask.
        asking: [n], those rows.
    """
    num_top = [sequences[row].sampling.logprobs or 0 for row in asking]
    entries = token_logprobs(raw, [sampled.token_ids[row] for row in asking], num_top)
    for row, entry in zip(asking, entries, strict=True):
        sampled.logprobs[row] = entry


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row [N] and its first token [N]; a NaN anywhere in a row counts as its largest.

    Args:
        logits: [N, V].
    """
    if not _is_array(logits):
        best, tokens = logits.max(-1)
        return best, tokens
    # numpy compares vectors where torch, which keeps an index beside each value, compares one by one: of 49,152 logits
    # in a tenth of the time.
    tokens = torch.from_numpy(logits.numpy().argmax(-1))
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), tokens


def _is_array(logits: Tensor) -> bool:
    """Whether numpy may read them in place."""
    return logits.is_cpu and logits.dtype is torch.float32


def applies(processor: LogitsProcessor, sequence: SamplingSequence) -> bool:
    """Whether a sequence needs a processor."""
    params = sequence.sampling
    return processor.applies(params) and not (processor.keeps_argmax and is_greedy(params))


def process_rows(
    processor: LogitsProcessor, logits: Tensor, rows: list[int], sequences: Sequence[SamplingSequence]
) -> Tensor:
    """Logits [N, V] of the sequences, of which a processor has changed some rows; those given may be overwritten."""
    chosen = [sequences[row] for row in rows]
    if len(rows) == len(sequences):
        return processor.process(logits, chosen)
    logits[rows] = processor.process(logits[rows], chosen)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts each row's cumulative distribution.

    Args:
        logits: [R, V] float32.
        uniforms: [R] float64, in [0, 1).

    Returns: [R] int64; never a token of probability 0, except in rows that have a NaN.
    """
    count, vocab_size = logits.shape
    points = uniforms.unsqueeze(-1)
    rows = max(1, (DEVICE_CHUNK_ELEMENTS if logits.is_cuda else CHUNK_ELEMENTS) // vocab_size)
    drawn = []
    for start in range(0, count, rows):
        # In float64: float32 sums over a large vocabulary would drop the unlikeliest tokens.
        cumulative = logits[start : start + rows].softmax(-1).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        target = torch.minimum(points[start : start + rows] * total, total.nextafter(torch.zeros_like(total)))
        drawn.append(torch.searchsorted(cumulative, target, right=True).squeeze(-1))
    return torch.cat(drawn).clamp_(max=vocab_size - 1)


def not_finite(sequence: SamplingSequence) -> EngineError:
    """Why there is no token where the model's largest logit is not finite."""
    return InternalError(
        f"the model gave logits that are not finite for completion token {sequence.num_output_tokens + 1}",
        reason="NON_FINITE_LOGITS",
    )


def _error(model_fine: bool, sequence: SamplingSequence) -> EngineError:
    if not model_fine:
        return not_finite(sequence)
    return InvalidArgumentError(
        f"logit_bias, min_tokens and penalties leave no token to choose for completion token "
        f"{sequence.num_output_tokens + 1}; accepted: values that leave at least one with a finite logit",
        field="sampling",
        reason="NO_TOKEN_LEFT",
    )
