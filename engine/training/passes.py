"""Passes over a batch that is cut into forwards, in pieces of a layer or less with a pause before each."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import replace

import torch

from engine.jobs import Pause
from engine.lora.adapter import Adapter
from engine.training.batching import MicroBatch
from engine.training.forward import TrainingForward


def accumulate_gradients(
    forward: TrainingForward,
    batches: Iterable[MicroBatch],
    adapter: Adapter,
    num_loss_tokens: int,
    generator: torch.Generator | None = None,
) -> Generator[Pause, None, float]:
    """Adds to the masters' gradients those of the mean loss.

    Args:
        num_loss_tokens: of all batches.
        generator: of the dropout masks.
    Returns: sum of the losses; if it is not finite, the rest was left out and the gradients are of no use.
    """
    total = 0.0
    for batch in batches:
        segments = forward.segments(batch, adapter, generator)
        hidden = yield from segments.forward(batch.rows)
        nll, gradient = yield from forward.nll_slices(hidden, batch, gradient=True)
        del hidden
        total += nll
        if not math.isfinite(total):
            break
        assert gradient is not None
        yield from segments.backward(gradient.mul_(1.0 / num_loss_tokens))
    return total


def mean_nll(
    forward: TrainingForward, batches: Iterable[MicroBatch], adapter: Adapter
) -> Generator[Pause, None, float]:
    """Mean NLL per token that counts, without dropout."""
    adapter = replace(adapter, dropout=0.0)
    total, count = 0.0, 0
    for batch in batches:
        hidden = yield from forward.segments(batch, adapter).forward(batch.rows, gradients=False)
        nll, _ = yield from forward.nll_slices(hidden, batch, gradient=False)
        total += nll
        count += batch.num_loss_tokens
    return total / count
