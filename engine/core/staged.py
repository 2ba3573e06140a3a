"""A forward that stops between decoder layers, so that whoever runs it can do something else in between.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from engine.context import ForwardContext, Stage
from engine.models.base import CausalLM, run_layer


class StagedForward:
    """One forward of a model, a decoder layer at a time. Folding ``run`` over the layers and ``finish`` gives
    ``model(token_ids, ctx)`` to the bit (tests/engine/test_training_segments.py).

    What surrounds the layers is the model's own forward, run with its layers left out: once to see what enters the
    first layer and what each is called with, and once to take what leaves the last layer to the end. So no family has
    to describe itself a second time.

    Attributes:
        x: [T, D], what enters the first layer.
    """

    def __init__(self, model: CausalLM, token_ids: Tensor, ctx: ForwardContext) -> None:
        self._model = model
        self._token_ids = token_ids
        self._ctx = ctx
        self._calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
        entering: list[Tensor] = []

        def record(layer: nn.Module, x: Tensor, ctx: ForwardContext, *args: Tensor) -> Tensor:
            entering.append(x)
            self._calls.append((layer, args))
            return x

        model(token_ids, replace(ctx, run_layer=record))
        assert entering, "decoders run their layers by engine.models.base.run_layer"
        self.x = entering[0]

    def __len__(self) -> int:
        """Layers."""
        return len(self._calls)

    def run(self, index: int, x: Tensor) -> Tensor:
        """x [T, D] through one layer: [T, D]. Layers run in order, each once."""
        layer, args = self._calls[index]
        return run_layer(layer, x, self._ctx, *args)

    def stages(self, index: int, *, fine: bool) -> list[Stage]:
        """A layer in stages, from (x,) to (y,), whose fold is ``run`` to the bit: one, or with ``fine`` as many as it
        has, where the context does not have layers run in a way of its own."""
        layer, args = self._calls[index]
        if fine and self._ctx.run_layer is None and hasattr(layer, "stages"):
            return layer.stages(self._ctx, *args)  # type: ignore[no-any-return, operator]
        return [lambda state: (self.run(index, *state),)]

    def finish(self, last: Tensor) -> Tensor:
        """What leaves the last layer, [T, D], to final hidden states [T, D]."""

        def leave_out(layer: nn.Module, x: Tensor, ctx: ForwardContext, *args: Tensor) -> Tensor:
            return last

        return self._model(self._token_ids, replace(self._ctx, run_layer=leave_out))  # type: ignore[no-any-return]
