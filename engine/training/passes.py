"""Passes over a batch that is cut into forwards. All of them yield between slices."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import replace

import torch

from engine.lora.adapter import Adapter
from engine.training.batching import MicroBatch
from engine.training.forward import TrainingForward


def accumulate_gradients(
    forward: TrainingForward,
    batches: Iterable[MicroBatch],
    adapter: Adapter,
    num_loss_tokens: int,
    generator: torch.Generator | None = None,
) -> Generator[None, None, float]:
    """Adds to the masters' gradients those of the mean loss. A slice is a forward, a loss or a backward.

    Args:
        num_loss_tokens: of all batches.
        generator: of the dropout masks.
    Returns: sum of the losses; if it is not finite, the rest was left out and the gradients are of no use.
    """
    total = 0.0
    for batch in batches:
        with torch.enable_grad():
            hidden = forward.hidden(batch, adapter, generator)
        yield
        with torch.enable_grad():
            nll = forward.nll_sum(hidden, batch)
        del hidden
        total += float(nll.detach())
        if not math.isfinite(total):
            break
        yield
        (nll / num_loss_tokens).backward()  # type: ignore[no-untyped-call]
        del nll
        yield
    return total


def mean_nll(forward: TrainingForward, batches: Iterable[MicroBatch], adapter: Adapter) -> Generator[None, None, float]:
    """Mean NLL per token that counts, without dropout."""
    adapter = replace(adapter, dropout=0.0)
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            hidden = forward.hidden(batch, adapter)
        yield
        with torch.no_grad():
            total += float(forward.nll_sum(hidden, batch))
        count += batch.num_loss_tokens
        yield
    return total / count
