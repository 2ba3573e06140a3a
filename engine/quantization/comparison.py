"""How far a quantized model's predictions are from its source's: perplexity of both and divergence, on one text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.core.loaded import LoadedModel
from engine.errors import InvalidArgumentError
from engine.evaluation.scoring import (
    Window,
    iter_window_logits,
    plan_windows,
    take_windows,
    token_kl,
    token_nll,
    validate_text,
)
from engine.jobs import JobEvent, QuantizeProgress, QuantizeSpec
from engine.layers.linear import Embedding, Linear
from engine.loading import load_weights, open_checkpoint
from engine.models.base import CausalLM, build_model
from engine.quantization.base import scheme_map

EVAL_WINDOW, EVAL_STRIDE = 512, 256
"""Shortened to the model's context: the defaults of the Perplexity job."""


@dataclass(slots=True)
class Comparison:
    """Sums over scored tokens, in nats.

    Attributes:
        kl: of the quantized model's distribution from the source's.
        nll_before, nll_after: of the source and of the quantized model.
    """

    num_tokens: int = 0
    kl: float = 0.0
    nll_before: float = 0.0
    nll_after: float = 0.0

    @property
    def logit_kl(self) -> float | None:
        """Mean per token; None if none was scored."""
        return self.kl / self.num_tokens if self.num_tokens else None

    @property
    def perplexity_before(self) -> float | None:
        """None if no token was scored."""
        return self._perplexity(self.nll_before)

    @property
    def perplexity_after(self) -> float | None:
        """None if no token was scored."""
        return self._perplexity(self.nll_after)

    def _perplexity(self, nll: float) -> float | None:
        if not self.num_tokens:
            return None
        try:
            return math.exp(nll / self.num_tokens)
        except OverflowError:
            return math.inf


def eval_windows(spec: QuantizeSpec, loaded: LoadedModel) -> Sequence[Window]:
    """The windows in which the spec's text is scored.

    Raises:
        FailedPreconditionError: the model is an encoder.
        InvalidArgumentError: the text has fewer than 2 tokens, or a token id is out of range.
    """
    loaded.causal_lm()
    window = min(EVAL_WINDOW, loaded.info.max_model_len)
    try:
        validate_text(spec.eval_token_ids, window, loaded.info.max_model_len, loaded.config.vocab_size)
        return plan_windows(len(spec.eval_token_ids), window, min(EVAL_STRIDE, window))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(error.message, field="eval_token_ids", reason=error.reason) from error


def compare(
    spec: QuantizeSpec,
    loaded: LoadedModel,
    staging: Path,
    windows: Sequence[Window],
    sums: Comparison,
    num_tensors: int,
) -> Iterator[JobEvent | None]:
    """Scores the text by the source and by what was written, read back as it will be loaded."""
    before, after = loaded.causal_lm(), _open(staging, loaded)
    token_ids = torch.tensor(spec.eval_token_ids, dtype=torch.int64, device=loaded.device)
    budget = loaded.slice_budget("comparison")
    done = 0
    while done < len(windows):
        batch = take_windows(windows, done, budget.tokens)
        num_tokens = sum(w.num_tokens for w in batch)
        ours = iter_window_logits(before, token_ids, batch, max_tokens=budget.forward_tokens)
        theirs = iter_window_logits(after, token_ids, batch, max_tokens=budget.forward_tokens)
        spent = 0.0
        while True:
            start = time.monotonic()
            chunk = next(ours, None)
            spent += time.monotonic() - start
            if chunk is None:
                break
            yield None
            start = time.monotonic()
            other = next(theirs)
            sums.num_tokens += chunk.targets.numel()
            sums.kl += float(token_kl(chunk.logits, other.logits).sum())
            sums.nll_before += float(token_nll(chunk.logits, chunk.targets).sum())
            sums.nll_after += float(token_nll(other.logits, other.targets).sum())
            spent += time.monotonic() - start
            yield None
        budget.observe(2 * num_tokens, spent)
        done += len(batch)
        yield QuantizeProgress(
            job_id=spec.job_id, stage="evaluating", tensors_done=num_tensors, tensors_total=num_tensors
        )


def _open(directory: Path, loaded: LoadedModel) -> CausalLM:
    checkpoint = open_checkpoint(directory)
    model = build_model(checkpoint.config, scheme_map(checkpoint.config.quantization_config), loaded.dtype)
    load_weights(model, checkpoint, loaded.dtype, loaded.device)
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            module.scheme.after_loading(module)
    assert isinstance(model, CausalLM)
    return model.eval()
