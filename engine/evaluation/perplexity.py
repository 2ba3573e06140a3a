"""The Perplexity job: mean negative log-likelihood of a text, every token scored once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError
from engine.evaluation.scoring import (
    LogitsChunk,
    Window,
    iter_window_logits,
    plan_windows,
    take_windows,
    token_nll,
    validate_text,
)
from engine.jobs import JobEvent, PerplexityFinished, PerplexityProgress, PerplexitySpec
from engine.lora.adapter import Adapter
from engine.models.base import CausalLM
from engine.ops.cpu import with_int8_activations


@dataclass(slots=True)
class RunningMean:
    """Mean and spread of values that arrive in groups, without cancellation (Chan, Golub and LeVeque, 1983).

    Attributes:
        count: values so far.
        mean: of them.
        squares: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Takes in values [N] float64."""
        num = values.numel()
        if num == 0:
            return
        mean = float(values.mean())
        squares = float((values - mean).square().sum())
        total = self.count + num
        delta = mean - self.mean
        self.mean += delta * num / total
        self.squares += squares + delta * delta * self.count * num / total
        self.count = total

    @property
    def standard_error(self) -> float | None:
        """Of the mean, values taken as independent; None for fewer than two."""
        if self.count < 2:
            return None
        return math.sqrt(self.squares / (self.count - 1) / self.count)


def perplexity(spec: PerplexitySpec, loaded: LoadedModel) -> Iterator[JobEvent | None]:
    """Scores a text in strided windows (see engine.evaluation.scoring.plan_windows).

    As many windows run in one packed forward as a slice's time and ``max_batch_tokens`` allow, and a window that is
    longer runs in parts; logits exist for a bounded number of scored positions at a time. Log-softmax is float32,
    sums are float64.

    Returns: a generator that yields after each chunk of logits: PerplexityProgress with the mean so far at the end of
        each forward, else None; and last PerplexityFinished.

    Raises:
        FailedPreconditionError: the model is an encoder. From the generator: the model's logits are not finite.
        InvalidArgumentError: fewer than 2 tokens, a token id out of range, or not 1 <= stride <= window, window >= 2.
        OutOfRangeError: the window exceeds the model's context.
        NotFoundError: no such adapter or version.
    """
    model = loaded.causal_lm()
    windows = plan_windows(len(spec.token_ids), spec.window, spec.stride)
    validate_text(spec.token_ids, spec.window, loaded.info.max_model_len, loaded.config.vocab_size)
    adapter = None if spec.adapter is None else loaded.adapters.get(spec.adapter, spec.adapter_version)
    return _perplexity(spec, loaded, model, windows, adapter)


def _perplexity(
    spec: PerplexitySpec, loaded: LoadedModel, model: CausalLM, windows: Sequence[Window], adapter: Adapter | None
) -> Iterator[JobEvent | None]:
    config = loaded.engine_config
    budget = loaded.slice_budget("perplexity")
    token_ids = torch.tensor(spec.token_ids, dtype=torch.int64, device=loaded.device)
    scored = RunningMean()
    seconds, done = 0.0, 0  # time of the work alone: between slices the engine serves others
    while done < len(windows):
        batch = take_windows(windows, done, budget.tokens)
        num_tokens = sum(window.num_tokens for window in batch)
        chunks = with_int8_activations(
            config.rounds_activations,
            iter_window_logits(model, token_ids, batch, max_tokens=budget.forward_tokens, adapter=adapter),
        )
        spent, begin = 0.0, time.monotonic()
        for chunk in chunks:
            scored.add(_finite_nll(chunk, loaded))
            spent += time.monotonic() - begin
            if not chunk.ends_forward:
                yield None
                begin = time.monotonic()
        done += len(batch)
        seconds += spent
        budget.observe(num_tokens, spent)
        yield PerplexityProgress(
            job_id=spec.job_id,
            windows_done=done,
            windows_total=len(windows),
            num_tokens=scored.count,
            nll=scored.mean,
        )
    yield PerplexityFinished(
        job_id=spec.job_id,
        nll=scored.mean,
        perplexity=_exp(scored.mean),
        standard_error=scored.standard_error,
        num_tokens=scored.count,
        num_windows=len(windows),
        seconds=seconds,
        adapter_version=None if adapter is None else adapter.version,
    )


def _finite_nll(chunk: LogitsChunk, loaded: LoadedModel) -> Tensor:
    nll = token_nll(chunk.logits, chunk.targets).cpu()
    finite = torch.isfinite(nll)
    if not bool(finite.all()):
        index = int(chunk.indices[~finite][0])
        raise FailedPreconditionError(
            f"the log-likelihood of token_ids[{index}] is not finite; the weights of model {loaded.info.name!r} "
            f"or its type ({loaded.info.dtype}) do not carry it",
            field="token_ids",
            reason="NON_FINITE",
        )
    return nll


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
