"""The training forward, and the proof that it is the serving forward.

Shapes: T tokens of a micro-batch, N predictions that count, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from engine.core.chunked import chunked_hidden_slices
from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.jobs import Pause
from engine.lora.adapter import Adapter
from engine.training.batching import MicroBatch
from engine.training.loss import LOGITS_CHUNK_BYTES, chunked_cross_entropy
from engine.training.loss_slices import Loss, head_parts, nll_slices
from engine.training.recompute import RecomputedLayers
from engine.training.seeds import derive_seed
from engine.training.segments import Segments

ROUNDINGS = 8
"""How many roundings of the largest logit two orders of summation may differ by in a type narrower than float32."""

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

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == self._resident:
            return contextlib.nullcontext()
        # The cache would narrow the input of a segment, a leaf, once for all its uses, and so add their gradients in
        # the narrow type.
        return torch.autocast(self._device.type, dtype=self.dtype, cache_enabled=False)

    def hidden(self, batch: MicroBatch, adapter: Adapter | None, generator: torch.Generator | None = None) -> Tensor:
        """Final hidden states [T, D], differentiable with respect to the adapter where gradients are on."""
        run_layer = RecomputedLayers(generator) if self._recomputes else None
        with self._autocast():
            hidden: Tensor = self._model(batch.token_ids, batch.context(adapter, generator, run_layer))
        return hidden

    def segments(
        self, batch: MicroBatch, adapter: Adapter | None, generator: torch.Generator | None = None
    ) -> Segments:
        """The forward of ``hidden`` in pieces, and its backward."""
        run_layer = RecomputedLayers(generator) if self._recomputes else None
        ctx = batch.context(adapter, generator, run_layer)
        return Segments(self._model, batch.token_ids, ctx, self._autocast, self._is_serving)

    def nll_slices(self, hidden: Tensor, batch: MicroBatch, *, gradient: bool) -> Generator[Pause, None, Loss]:
        """The loss of ``nll_sum`` in pieces, and its gradient for the hidden states [N, D] that predict."""
        head = self._model.compute_logits_part
        return nll_slices(hidden, batch.targets, head, self._vocab_size, gradient=gradient, autocast=self._autocast)

    def nll_sum(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Sum of the NLLs of the batch's N predictions, float32."""
        with self._autocast():
            return chunked_cross_entropy(
                hidden[batch.rows], batch.targets, self._model.compute_logits, self._vocab_size
            )

    def logits_part(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """hidden [n, D]: columns [start, end) of the logits [n, V] float32."""
        with self._autocast():
            return self._model.compute_logits_part(hidden, start, end)


def probe(adapter: Adapter, seed: int) -> Adapter:
    """The adapter without dropout, and with small random values for every B that is zero: an update that is zero would
    prove nothing about the path that it takes. A and B ask for gradients, since operations may take another path where
    none is wanted."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "probe"))
    modules = {}
    for name, (a, b) in adapter.modules.items():
        a, b = a.detach(), b.detach()
        if not bool(b.any()):
            b = torch.randn(b.shape, generator=generator).mul_(0.01).to(b.device)
        modules[name] = (a.requires_grad_(), b.requires_grad_())
    return replace(adapter, modules=modules, dropout=0.0)


def forward_difference(
    forward: TrainingForward, loaded: LoadedModel, batches: Iterable[MicroBatch], adapter: Adapter
) -> Generator[Pause, None, tuple[float, float]]:
    """Compares the training forward with the serving forward: block cache, chunks of max_batch_tokens. Pauses before
    each layer and each part of the logits.

    Returns: largest absolute difference of a logit, NaN if any logit is; and the largest absolute logit.
    """
    model, config = loaded.causal_lm(), loaded.engine_config
    vocab_size = loaded.config.vocab_size
    rows = max(1, LOGITS_CHUNK_BYTES // (4 * vocab_size))
    difference = torch.zeros((), dtype=torch.float64)
    largest = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        trained = yield from forward.segments(batch, adapter).forward()  # with gradients on, as in training
        sequences = [ids.tolist() for ids in torch.split(batch.token_ids, batch.lengths)]
        starts = [sum(batch.lengths[:index]) for index in range(len(sequences))]
        for states in chunked_hidden_slices(
            model, sequences, max_tokens=config.max_batch_tokens, adapter=adapter, block_size=config.block_size
        ):
            if isinstance(states, Pause):
                yield states
                continue
            for index, served in states:
                for part in torch.split(served, rows):
                    ours = trained[starts[index] : starts[index] + len(part)]
                    starts[index] += len(part)
                    for bounds in head_parts(part.shape[0], part.shape[1], vocab_size):
                        yield Pause("compare", len(part))
                        with torch.no_grad():
                            theirs = model.compute_logits_part(part, *bounds)
                            distance = forward.logits_part(ours, *bounds).sub_(theirs).abs_().amax()
                        # maximum and amax pass NaN on.
                        difference = torch.maximum(difference, distance.double().cpu())
                        largest = torch.maximum(largest, theirs.abs().amax().double().cpu())
    return float(difference), float(largest)


def accepted_difference(tolerance: float, dtype: torch.dtype, largest: float) -> float:
    """The tolerance for a compute type. That of float32 stands as given; in a narrower type two correct orders of
    summation differ by some roundings of the largest logit."""
    if dtype == torch.float32:
        return tolerance
    return max(tolerance, ROUNDINGS * torch.finfo(dtype).eps * largest)
