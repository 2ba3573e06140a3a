"""Activation checkpointing (arXiv:1604.06174): of each decoder layer only the input is kept, and the backward runs the
layer again. Proof: tests/engine/test_activation_checkpointing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.context import ForwardContext
from engine.ops import cpu


class RecomputedLayers:
    """A LayerRunner for one forward.

    Args:
        generator: of the dropout masks; a layer that runs again draws the masks of its first run.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def __call__(self, layer: nn.Module, x: Tensor, ctx: ForwardContext, *args: Tensor) -> Tensor:
        """The layer's output; its input is all that is kept of it where gradients are on."""
        if not torch.is_grad_enabled():
            return layer(x, ctx, *args)  # type: ignore[no-any-return]
        generator = self._generator
        begins_with = None if generator is None else generator.get_state()
        rounds = cpu.allows_int8_activations()  # torch's checkpoint restores autocast, and knows nothing of this
        is_first = True

        def run(x: Tensor) -> Tensor:
            nonlocal is_first
            with cpu.int8_activations(rounds):
                if is_first or generator is None or begins_with is None:
                    is_first = False
                    return layer(x, ctx, *args)  # type: ignore[no-any-return]
                present = generator.get_state()
                generator.set_state(begins_with)
                try:
                    return layer(x, ctx, *args)  # type: ignore[no-any-return]
                finally:  # the next micro-batch goes on from where this one's forward ended
                    generator.set_state(present)

        # All that is drawn comes from the generator, so torch need not keep the states of its global ones.
        out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return out
