"""The proof, at the start of a run, that the training forward is the serving forward.

Where serving rounds activations to int8 (engine.ops.cpu.gemm), two forwards cannot be compared through the rounding:
sums in another order differ in the last bit, a value that lies between two integers then turns to the other one, and
after some layers the forwards differ by as much as rounding itself changes (of SmolLM2-135M's logits, 0.8 times that).
So the proof has two parts, and no tolerance for the rounding: the forwards agree where both multiply by floats, and
each product by integers is that of serving, to the bit, where its input is.

Shapes: T tokens, I in_features, O out_features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.core.chunked import chunked_hidden_slices
from engine.core.loaded import LoadedModel
from engine.errors import TrainingError
from engine.jobs import Pause
from engine.layers.linear import Embedding, Linear
from engine.lora.adapter import Adapter
from engine.ops.cpu import int8_activations
from engine.training.batching import MicroBatch
from engine.training.forward import TrainingForward
from engine.training.loss import chunk_rows
from engine.training.loss_slices import head_parts
from engine.training.seeds import derive_seed

PRODUCT_ROWS = 4
"""Of the input that products are compared for."""

ROUNDINGS = 8
"""How many roundings of the largest logit two orders of summation may differ by in a type narrower than float32."""


def prove_forward(
    forward: TrainingForward, loaded: LoadedModel, batches: Iterable[MicroBatch], adapter: Adapter, tolerance: float
) -> Generator[Pause, None, float]:
    """Refuses to train where the training forward is not the serving forward.

    Args:
        adapter: with an effect; see ``probe``.
        tolerance: accepted difference of a logit in float32.
    Returns: the largest difference of a logit.
    Raises:
        TrainingError: they differ.
    """
    difference, largest = yield from forward_difference(forward, loaded, batches, adapter)
    accepted = accepted_difference(tolerance, forward.dtype, largest)
    if not difference <= accepted:  # NaN is refused as well
        raise TrainingError(
            f"training and serving forward differ by {difference:.3g} in a logit on the first batch; accepted: "
            f"{accepted:.3g} (forward_tolerance is {tolerance:.3g})",
            reason="FORWARD_MISMATCH",
        )
    differing = yield from differing_product(forward, loaded)
    if differing is not None:
        raise TrainingError(
            f"training and serving multiply differently by {differing} where activations are rounded to int8; "
            "accepted: products that are equal to the bit",
            reason="FORWARD_MISMATCH",
        )
    return difference


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
    """Compares the training forward with the serving forward: block cache, chunks of max_batch_tokens; both multiply
    by floats. Pauses before each layer and each part of the logits.

    Returns: largest absolute difference of a logit, NaN if any logit is; and the largest absolute logit.
    """
    model, config = loaded.causal_lm(), loaded.engine_config
    vocab_size = loaded.config.vocab_size
    forward = forward.by_floats()
    rows = chunk_rows(vocab_size)
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


def differing_product(forward: TrainingForward, loaded: LoadedModel) -> Generator[Pause, None, str | None]:
    """Multiplies by each weight that serving multiplies by integers, as training and as serving do, the head in the
    parts that training takes it in. Pauses before each.

    Returns: name of the first module whose products are not equal to the bit; None: all are.
    """
    model, config = loaded.causal_lm(), loaded.engine_config
    if not config.rounds_activations or forward.dtype != torch.float32:
        return None  # serving does not round, or training was told to compute in a type that never does
    generator = torch.Generator().manual_seed(0)

    def differs(
        linear: Linear | Embedding, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]
    ) -> bool:
        x = torch.randn(PRODUCT_ROWS, linear.in_features, generator=generator).to(loaded.device)
        with torch.no_grad(), int8_activations(True):
            served = theirs(x)
        return not torch.equal(ours(x), served)

    for linear in (module for module in model.modules() if isinstance(module, Linear)):
        if _is_rounded_for(linear) and linear is not model.head:
            yield Pause("compare", PRODUCT_ROWS)
            if differs(linear, partial(forward.product, linear), partial(linear.scheme.apply, linear)):
                return linear.name
    if not _is_rounded_for(model.head):
        return None
    yield Pause("compare", PRODUCT_ROWS)
    vocab_size = loaded.config.vocab_size
    parts = head_parts(PRODUCT_ROWS, model.head.in_features, vocab_size)

    def logits(x: Tensor) -> Tensor:
        return torch.cat([forward.logits_part(x, *bounds).detach() for bounds in parts], dim=-1)

    return model.head.name if differs(model.head, logits, model.compute_logits) else None


def _is_rounded_for(linear: Linear | Embedding) -> bool:
    """Whether products with the weight may round their input."""
    packed = linear.scheme.packed(linear)
    return packed is not None and packed.has_integers


def accepted_difference(tolerance: float, dtype: torch.dtype, largest: float) -> float:
    """The tolerance for a compute type. That of float32 stands as given; in a narrower type two correct orders of
    summation differ by some roundings of the largest logit."""
    if dtype == torch.float32:
        return tolerance
    return max(tolerance, ROUNDINGS * torch.finfo(dtype).eps * largest)
