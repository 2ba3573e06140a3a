"""The training forward.

Where serving rounds activations to int8 (engine.ops.cpu.gemm), training's forward does too, for the same weights.
engine.training.proof compares the two.

Shapes: T tokens of a micro-batch, N predictions that count, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.jobs import Pause
from engine.layers.linear import Linear
from engine.lora.adapter import Adapter
from engine.ops import cpu
from engine.ops.cpu import int8_activations
from engine.training.batching import MicroBatch
from engine.training.loss import chunked_cross_entropy
from engine.training.loss_slices import LogitsBuffer, Loss, nll_slices
from engine.training.recompute import RecomputedLayers
from engine.training.segments import Segments

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(requested: str, resident: torch.dtype) -> torch.dtype:
    """The type that forward and backward compute in.

    Raises:
        InvalidArgumentError: the name is not known.
        FailedPreconditionError: the resident weights do not allow it.
    """
    if requested not in ("auto", *_DTYPES):
        raise InvalidArgumentError(
            f"compute_dtype is {requested!r}; accepted: auto, {', '.join(_DTYPES)}", field="params.compute_dtype"
        )
    dtype = resident if requested == "auto" else _DTYPES[requested]
    if resident not in _DTYPES.values() or (dtype != resident and resident != torch.float32):
        raise FailedPreconditionError(
            f"compute_dtype is {requested!r} and the model is resident in {_name(resident)}; accepted: float32 or "
            "bfloat16 over a model in float32, bfloat16 over one in bfloat16",
            field="params.compute_dtype",
            reason="COMPUTE_DTYPE",
        )
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class TrainingForward:
    """Forwards of packed sequences without a cache, over the weights that serve.

    Args:
        dtype: from resolve_dtype.
        recomputes: keep the input of each decoder layer alone for the backward, which runs the layer again.
    """

    def __init__(self, loaded: LoadedModel, dtype: torch.dtype, *, recomputes: bool = False) -> None:
        self._model = loaded.causal_lm()
        self._vocab_size = loaded.config.vocab_size
        self._device = loaded.device
        self._resident = loaded.dtype
        self.dtype = dtype
        self._recomputes = recomputes
        self._is_serving = loaded.is_serving
        self.rounds = loaded.engine_config.rounds_activations
        self._logits = LogitsBuffer()

    def by_floats(self) -> TrainingForward:
        """The same forward, without rounding."""
        other = copy.copy(self)
        other.rounds = False
        other._logits = LogitsBuffer()
        return other

    @contextlib.contextmanager
    def _numerics(self) -> Iterator[None]:
        """Entered around each piece of a forward: the numbers that it computes with. A backward needs none of it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(int8_activations(self.rounds))
            if self.dtype != self._resident:
                # The cache would narrow the input of a segment, a leaf, once for all its uses, and so add their
                # gradients in the narrow type.
                stack.enter_context(torch.autocast(self._device.type, dtype=self.dtype, cache_enabled=False))
            yield

    def hidden(self, batch: MicroBatch, adapter: Adapter | None, generator: torch.Generator | None = None) -> Tensor:
        """Final hidden states [T, D], differentiable with respect to the adapter where gradients are on."""
        run_layer = RecomputedLayers(generator) if self._recomputes else None
        with self._numerics():
            hidden: Tensor = self._model(batch.token_ids, batch.context(adapter, generator, run_layer))
        return hidden

    def segments(
        self, batch: MicroBatch, adapter: Adapter | None, generator: torch.Generator | None = None
    ) -> Segments:
        """The forward of ``hidden`` in pieces, and its backward."""
        run_layer = RecomputedLayers(generator) if self._recomputes else None
        ctx = batch.context(adapter, generator, run_layer)
        has_kernels = self._device.type == "cpu" and self.dtype == torch.float32 and cpu.available()
        return Segments(self._model, batch.token_ids, ctx, self._numerics, self._is_serving, has_kernels=has_kernels)

    def nll_slices(self, hidden: Tensor, batch: MicroBatch, *, gradient: bool) -> Generator[Pause, None, Loss]:
        """The loss of ``nll_sum`` in pieces, and its gradient for the hidden states [N, D] that predict."""
        head = self._model.compute_logits_part
        return nll_slices(
            hidden,
            batch.targets,
            head,
            self._vocab_size,
            gradient=gradient,
            numerics=self._numerics,
            buffer=self._logits if self._device.type == "cpu" else None,
        )

    def nll_sum(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Sum of the NLLs of the batch's N predictions, float32."""
        with self._numerics():
            return chunked_cross_entropy(
                hidden[batch.rows], batch.targets, self._model.compute_logits, self._vocab_size
            )

    def logits_part(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """hidden [n, D]: columns [start, end) of the logits [n, V] float32."""
        with self._numerics():
            return self._model.compute_logits_part(hidden, start, end)

    def product(self, linear: Linear, x: Tensor) -> Tensor:
        """x [n, I] times the weight of a linear as a forward multiplies by it: [n, O], with a graph."""
        with torch.enable_grad(), self._numerics():
            return linear.scheme.apply(linear, x.detach().requires_grad_())
