"""The ways in which the engine computes a forward, against each other on the same tokens, in float32.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.context import packed_context
from engine.core.chunked import chunked_hidden
from engine.core.loaded import LoadedModel
from engine.evaluation.scoring import LOGITS_CHUNK_BYTES, iter_window_logits, plan_windows, token_nll
from engine.jobs import LoRAParams
from engine.lora.adapter import Adapter, LoRABatch
from engine.models.base import CausalLM
from engine.training.batching import MicroBatch
from engine.training.forward import TrainingForward
from engine.training.lora_init import new_adapter
from engine.training.proof import forward_difference, probe
from engine.training.seeds import derive_seed
from engine.verification.figures import Measured

NLL_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4
"""Of a logit, times the largest logit where that is above 1: what two orders of summation in float32 may leave."""

MAX_STEPS = 48
"""Tokens that are decoded one by one."""

States = tuple[CausalLM, Tensor]
"""A model, and hidden states [T, D] that it has computed."""


def micro_batch(sequences: Sequence[Sequence[int]]) -> MicroBatch:
    """Whole sequences as the trainer packs them; every token but the first of each is predicted."""
    flat = torch.tensor([token for ids in sequences for token in ids])
    lengths = [len(ids) for ids in sequences]
    starts = {sum(lengths[:s]) for s in range(len(lengths))}
    predicted = torch.tensor([i for i in range(len(flat)) if i not in starts])
    return MicroBatch(token_ids=flat, lengths=lengths, rows=predicted - 1, targets=flat[predicted])


def training_nll(loaded: LoadedModel, sequences: Sequence[Sequence[int]], rank: int, seed: int) -> Measured:
    """A forward as the trainer runs it, with gradients and an adapter as runs begin it (B = 0), against scoring."""
    adapter = new_adapter("verify", loaded.model.linears(), LoRAParams(rank=rank), seed, loaded.device)
    batch = micro_batch(sequences)
    forward = TrainingForward(loaded, torch.float32)
    with torch.enable_grad():
        total = forward.nll_sum(forward.hidden(batch, adapter), batch)
    trained = float(total.detach()) / batch.num_loss_tokens
    scored = torch.cat(list(_scored(loaded, sequences)))
    scoring = float(scored.mean())
    return Measured(
        abs(trained - scoring), NLL_TOLERANCE, f"{trained:.6f} and {scoring:.6f} nats over {len(scored)} tokens"
    )


def _scored(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    for ids in sequences:
        windows = plan_windows(len(ids), len(ids), len(ids))
        for chunk in iter_window_logits(loaded.causal_lm(), torch.tensor(ids), windows, max_tokens=len(ids)):
            yield token_nll(chunk.logits, chunk.targets)


def training_logits(loaded: LoadedModel, sequences: Sequence[Sequence[int]], rank: int, seed: int) -> Measured:
    """The trainer's forward against the block cache, through an adapter with an effect."""
    adapter = probed(loaded, rank, seed)
    check = forward_difference(TrainingForward(loaded, torch.float32), loaded, [micro_batch(sequences)], adapter)
    while True:
        try:
            next(check)
        except StopIteration as stop:
            difference, largest = stop.value
            return _judged(difference, largest, "with an adapter")


def probed(loaded: LoadedModel, rank: int, seed: int) -> Adapter:
    """An adapter on every linear, B not zero."""
    return probe(new_adapter("verify", loaded.model.linears(), LoRAParams(rank=rank), seed, loaded.device), seed)


def chunked_prefill(loaded: LoadedModel, sequences: Sequence[Sequence[int]], rank: int, seed: int) -> Measured:
    """Prompts in chunks, at cuts that the seed chooses, against one forward without a cache."""
    model = loaded.causal_lm()
    adapter = probed(loaded, rank, seed)
    whole = _whole(model, sequences, adapter)
    longest = max(map(len, sequences))
    generator = torch.Generator().manual_seed(derive_seed(seed, "cuts"))
    sizes = sorted({1 + int(torch.randint(longest, (), generator=generator)) for _ in range(4)})
    difference, largest = 0.0, 0.0
    for size in sizes:
        chunked = _cached(model, sequences, adapter, size)
        difference, largest = _worst((model, whole), (model, chunked), difference, largest)
    return _judged(difference, largest, f"chunks of {', '.join(map(str, sizes))} tokens")


def stepwise_decode(loaded: LoadedModel, sequences: Sequence[Sequence[int]], rank: int, seed: int) -> Measured:
    """One token at a time, as completions are decoded, against one forward without a cache."""
    model = loaded.causal_lm()
    adapter = probed(loaded, rank, seed)
    first = [list(sequences[0][:MAX_STEPS])]
    stepped = _cached(model, first, adapter, 1)
    difference, largest = _worst((model, _whole(model, first, adapter)), (model, stepped))
    return _judged(difference, largest, f"{len(first[0])} steps")


@torch.no_grad()
def stored_weights(loaded: LoadedModel, stored: LoadedModel, sequences: Sequence[Sequence[int]]) -> Measured:
    """The model whose weights stay as its files have them, which is the one that serves, against the one that has them
    wide: many rows at a time, and one."""
    wide, kept = loaded.causal_lm(), stored.causal_lm()
    first = list(sequences[0][:MAX_STEPS])
    difference, largest = 0.0, 0.0
    for ids, size in ((list(sequences[0]), len(sequences[0])), (first, 1)):
        expected, found = ((model, _cached(model, [ids], None, size)) for model in (wide, kept))
        difference, largest = _worst(expected, found, difference, largest)
    return _judged(difference, largest, f"{stored.info.quantization}; {len(sequences[0])} rows, and {len(first)} steps")


@torch.no_grad()
def _whole(model: CausalLM, sequences: Sequence[Sequence[int]], adapter: Adapter) -> Tensor:
    """Hidden states [T, D]."""
    lengths = [len(ids) for ids in sequences]
    lora = LoRABatch([(adapter, 0, sum(lengths))], sum(lengths))
    hidden: Tensor = model(torch.tensor([i for ids in sequences for i in ids]), packed_context(lengths, lora=lora))
    return hidden


def _cached(model: CausalLM, sequences: Sequence[Sequence[int]], adapter: Adapter | None, size: int) -> Tensor:
    """The same, from chunks of that many tokens."""
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for states in chunked_hidden(model, sequences, max_tokens=size, adapter=adapter):
        for index, hidden in states:
            parts[index].append(hidden)
    return torch.cat([part for of_sequence in parts for part in of_sequence])


@torch.no_grad()
def _worst(one: States, other: States, difference: float = 0.0, largest: float = 0.0) -> tuple[float, float]:
    """Largest difference of a logit and largest logit of the first, not below those given; NaN stays."""
    (model, hidden), (other_model, other_hidden) = one, other
    rows = max(1, LOGITS_CHUNK_BYTES // (4 * model.config.vocab_size))
    found = torch.tensor([difference, largest], dtype=torch.float64)
    for a, b in zip(torch.split(hidden, rows), torch.split(other_hidden, rows), strict=True):
        ours, theirs = model.compute_logits(a), other_model.compute_logits(b)
        here = torch.stack([(ours - theirs).abs().amax(), ours.abs().amax()])
        found = torch.maximum(found, here.double())
    return float(found[0]), float(found[1])


def _judged(difference: float, largest: float, detail: str) -> Measured:
    return Measured(difference, LOGIT_TOLERANCE * max(1.0, largest), f"{detail}; the largest logit is {largest:.3g}")


CHECKS = {
    "NLL of training with a zero adapter = scoring": training_nll,
    "logits of training = serving": training_logits,
    "logits of chunked = whole prefill": chunked_prefill,
    "logits of stepwise decoding = prefill": stepwise_decode,
}
"""Name to check, in the order in which they are reported."""
