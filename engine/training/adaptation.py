"""How far from its base an adapter may go: KL divergence on probe prompts, and optimizer steps kept within a limit.

Both models run over the probes on the path that serves, with logits of a bounded number of positions at a time. They
multiply by floats even where serving rounds activations: the roundings of two models differ by more than small steps.
Proof: tests/engine/test_adaptation.py.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.core.chunked import chunked_hidden
from engine.core.loaded import LoadedModel
from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.evaluation.scoring import LOGITS_CHUNK_BYTES, token_kl
from engine.jobs import KLBound
from engine.lora.adapter import Adapter
from engine.training.optimizer import Optimizer

MAX_HALVINGS = 10
"""Of a step that goes too far, before it is given up: to 1/1024 of what the optimizer made it."""


def validate_bound(bound: KLBound, loaded: LoadedModel) -> None:
    """Checks probes and limit.

    Raises:
        InvalidArgumentError: naming the field, its value and what is accepted.
        OutOfRangeError: a probe is longer than the model's positions.
    """
    if not bound.probes:
        raise InvalidArgumentError("probes is empty; accepted: at least one prompt", field="bound.probes")
    limit, vocab_size = loaded.config.max_position_embeddings, loaded.config.vocab_size
    for index, ids in enumerate(bound.probes):
        field = f"bound.probes[{index}]"
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise InvalidArgumentError(f"{field} is {ids[:8]} …; accepted: ids in [0, {vocab_size})", field=field)
        if len(ids) > limit:
            raise OutOfRangeError(f"{field} has {len(ids)} tokens; accepted: at most {limit}", field=field)
    if bound.max_kl is not None and not 0.0 < bound.max_kl < math.inf:
        raise InvalidArgumentError(f"max_kl is {bound.max_kl}; accepted: a finite number above 0", field="bound.max_kl")


@dataclass(frozen=True, slots=True)
class StepTaken:
    """Attributes: kl: after the step, nats per token; halvings: that it took to stay within the limit."""

    kl: float
    halvings: int


class BoundedSteps:
    """Measures an adapter against its base, and takes the optimizer's steps as far as the limit allows.

    Args:
        max_tokens: of one forward over the probes.
    """

    def __init__(self, bound: KLBound, loaded: LoadedModel, max_tokens: int) -> None:
        validate_bound(bound, loaded)
        self.max_kl = bound.max_kl
        self._model = loaded.causal_lm()
        self._probes = bound.probes
        self._max_tokens = max_tokens
        self._block_size = loaded.engine_config.block_size
        self._rows = max(1, LOGITS_CHUNK_BYTES // (4 * loaded.config.vocab_size))
        self._base: list[Tensor] | None = None

    def _states(self, adapter: Adapter | None) -> Generator[None, None, list[Tensor]]:
        """Final hidden states [n, D] of each probe. Yields between forwards."""
        parts: list[list[Tensor]] = [[] for _ in self._probes]
        for states in chunked_hidden(
            self._model, self._probes, max_tokens=self._max_tokens, adapter=adapter, block_size=self._block_size
        ):
            for index, hidden in states:
                parts[index].append(hidden)
            yield
        return [torch.cat(hidden) for hidden in parts]

    def kl(self, adapter: Adapter) -> Generator[None, None, float]:
        """Mean over all positions of the probes of KL(base || adapted), the last positions included: what follows a
        prompt is what it was given for. Nats per token, without dropout. Yields between forwards and logits."""
        if self._base is None:
            self._base = yield from self._states(None)
        adapted = yield from self._states(replace(adapter, dropout=0.0))
        total, count = 0.0, 0
        for base, hidden in zip(self._base, adapted, strict=True):
            for p, q in zip(torch.split(base, self._rows), torch.split(hidden, self._rows), strict=True):
                with torch.no_grad():
                    total += float(token_kl(self._model.compute_logits(p), self._model.compute_logits(q)).sum())
                count += len(p)
                yield
        return total / count

    def describe(self, step: int, taken: StepTaken | None) -> str:
        """What became of a step that would have gone too far."""
        if taken is None:
            done = f"was given up after {MAX_HALVINGS} halvings, and the run ends before it"
        else:
            done = f"was halved {taken.halvings} times, to {taken.kl:.3g}"
        return f"step {step} would exceed max_kl {self.max_kl} on the probes; it {done}"

    def step(self, optimizer: Optimizer, adapter: Adapter, rate: float) -> Generator[None, None, StepTaken | None]:
        """One update from the present gradients, halved until the KL is within the limit.

        The update is scaled as a whole; the optimizer's moments, which the gradient has entered, stay. If the generator
        is closed, masters and optimizer are as before the step.

        Returns: None if it went too far even after MAX_HALVINGS; masters and optimizer are as before it.
        """
        before = optimizer.snapshot()
        optimizer.step(rate)
        optimizer.zero_grad()
        after = optimizer.snapshot()
        taken = None
        try:
            for halvings in range(MAX_HALVINGS + 1):
                optimizer.interpolate(before, after, 0.5**halvings)
                kl = yield from self.kl(adapter)
                if self.max_kl is None or kl <= self.max_kl:  # NaN is refused as well
                    taken = StepTaken(kl, halvings)
                    break
            return taken
        finally:
            if taken is None:
                optimizer.restore(before)
