"""Forward and backward of a micro-batch in segments of a decoder layer or less, with a pause before each.

Each segment is a graph of its own: its inputs are leaves, so its backward ends there, and what gathers in the leaves is
where the backward of the segment before begins. This is how stages of a pipeline are trained (arXiv:1811.06965), with
one device that takes the stages in turn. The operations and their order are those of one graph, so are the gradients,
to the bit and however the layers are cut, where torch has the same number of threads
(tests/engine/test_training_segments.py); so the cut may follow what the machine is busy with. Each segment's graph is
freed once its backward is done.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from engine.context import ForwardContext, Stage, State
from engine.core.staged import StagedForward
from engine.jobs import Pause
from engine.models.base import CausalLM
from engine.ops.torch_threads import threads_for

FINE_TOKENS = 96
"""Tokens from which a layer is cut further while others are served: with fewer, a segment costs little more than what
surrounds it."""


class Segments:
    """One forward and, after it, at most one backward.

    Args:
        numerics: entered around the forward of each segment.
        is_serving: whether layers are to be cut further.
        has_kernels: the products are the CPU kernels', so that torch's operations are no larger than hidden states.
    """

    def __init__(
        self,
        model: CausalLM,
        token_ids: Tensor,
        ctx: ForwardContext,
        numerics: Callable[[], AbstractContextManager[object]],
        is_serving: Callable[[], bool],
        *,
        has_kernels: bool,
    ) -> None:
        self._model = model
        self._token_ids = token_ids
        self._ctx = ctx
        self._numerics = numerics
        self._is_serving = is_serving
        self._has_kernels = has_kernels
        self._graphs: list[tuple[State, State, str]] = []

    def forward(self, rows: Tensor | None = None, *, gradients: bool = True) -> Generator[Pause, None, Tensor]:
        """Final hidden states [T, D], without a graph.

        Args:
            rows: [N], to return those of these positions alone, [N, D].
            gradients: whether ``backward`` will follow.
        """
        num_tokens = len(self._token_ids)
        yield Pause("forward", num_tokens)
        with torch.set_grad_enabled(gradients), self._numerics():
            stages = StagedForward(self._model, self._token_ids, self._ctx)
        state: State = (stages.x,)
        for index in range(len(stages)):
            cut = stages.stages(index, fine=num_tokens >= FINE_TOKENS and self._is_serving())
            for number, stage in enumerate(cut):
                name = f" stage {number}" if len(cut) > 1 else ""
                if index or number:
                    yield Pause(f"forward{name}", num_tokens)
                state = self._segment(state, stage, gradients, name)

        def finish(inputs: State) -> State:
            hidden = stages.finish(*inputs)
            return (hidden if rows is None else hidden[rows],)

        (hidden,) = self._segment(state, finish, gradients, " end")
        return hidden.detach()

    def _segment(self, state: State, run: Stage, gradients: bool, name: str) -> State:
        # Below the first adapted layer nothing needs a gradient, and no backward goes there.
        leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in state)
        with torch.set_grad_enabled(gradients), self._numerics(), self._threads(leaves):
            outputs = run(leaves)
        if any(y.requires_grad for y in outputs):
            self._graphs.append((leaves, outputs, name))
        return outputs

    def backward(self, gradient: Tensor) -> Generator[Pause, None, None]:
        """Adds to the adapter's gradients, from the last segment to the first.

        Args:
            gradient: of what ``forward`` returned, in its shape.
        """
        gradients: list[Tensor | None] = [gradient]
        while self._graphs:
            yield Pause(f"backward{self._graphs[-1][2]}", len(self._token_ids))
            leaves, outputs, _ = self._graphs.pop()
            roots, seeds = [], []
            for y, seed in zip(outputs, gradients, strict=True):
                if seed is None:
                    continue
                if y.is_leaf:  # an input that is handed on
                    y.grad = seed
                else:
                    roots.append(y)
                    seeds.append(seed)
            with self._threads(leaves):
                torch.autograd.backward(roots, seeds)
            gradients = [leaf.grad for leaf in leaves]

    def _threads(self, state: State) -> AbstractContextManager[object]:
        """For torch's operations on tensors of the sizes of these."""
        return threads_for(max((x.numel() for x in state), default=0)) if self._has_kernels else nullcontext()
