"""Whole sequences through the path that serves: block cache, packed batches, chunks of bounded size.

Jobs use it where one forward over a long text would hold up serving for too long; training uses it to prove that its
own forward agrees. The cache is the caller's alone, so running requests are not disturbed.

Shapes: T tokens of a sequence, n of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.core.batch import pack
from engine.core.loaded import LoadedModel
from engine.core.memory import make_cache, make_states
from engine.core.staged import StagedForward
from engine.jobs import Pause
from engine.lora.adapter import Adapter
from engine.models.base import CausalLM
from engine.ops.cpu import int8_activations

BLOCK_SIZE = 16


def chunked_hidden(
    model: CausalLM,
    sequences: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    adapter: Adapter | None = None,
    block_size: int = BLOCK_SIZE,
) -> Iterator[list[tuple[int, Tensor]]]:
    """Final hidden states, one forward of at most ``max_tokens`` tokens at a time.

    Args:
        sequences: token ids, each at least one.
    Returns: after each forward, for each sequence that took part, its index and the states [n, D] of its next n tokens.
    """
    slices = chunked_hidden_slices(model, sequences, max_tokens=max_tokens, adapter=adapter, block_size=block_size)
    return (item for item in slices if not isinstance(item, Pause))


def chunked_hidden_slices(
    model: CausalLM,
    sequences: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    adapter: Adapter | None = None,
    block_size: int = BLOCK_SIZE,
) -> Iterator[list[tuple[int, Tensor]] | Pause]:
    """``chunked_hidden`` with a pause before each layer."""
    parameter = next(model.parameters())
    counts = [-(-len(ids) // block_size) for ids in sequences]
    cache = make_cache(
        model.config, model.num_attention_layers, 1 + sum(counts), block_size, parameter.device, model.compute_dtype
    )
    layers = model.num_recurrent_layers
    recurrent = make_states(model.config, layers, 1 + len(sequences), parameter.device) if layers else None
    tables, next_block = [], 1
    for count in counts:
        tables.append(list(range(next_block, next_block + count)))
        next_block += count
    done = [0] * len(sequences)
    while any(d < len(ids) for d, ids in zip(done, sequences, strict=True)):
        budget, chunk = max_tokens, []
        for index, ids in enumerate(sequences):
            take = min(len(ids) - done[index], budget)
            if take > 0:
                chunk.append((index, take))
                budget -= take
        token_ids, ctx = pack(
            [sequences[s][done[s] : done[s] + n] for s, n in chunk],
            [done[s] for s, _ in chunk],
            [tables[s] for s, _ in chunk],
            [adapter] * len(chunk),
            cache,
            parameter.device,
            states=recurrent,
            state_slots=[1 + s for s, _ in chunk] if layers else (),
        )
        yield Pause("serving forward", len(token_ids))
        with torch.no_grad():
            stages = StagedForward(model, token_ids, ctx)
        x = stages.x
        for layer in range(len(stages)):
            if layer:
                yield Pause("serving forward", len(token_ids))
            with torch.no_grad():
                x = stages.run(layer, x)
        with torch.no_grad():
            hidden = stages.finish(x)
        for index, take in chunk:
            done[index] += take
        yield [(s, hidden[ctx.seq_starts[row] : ctx.seq_starts[row + 1]]) for row, (s, _) in enumerate(chunk)]


@torch.inference_mode()
def serving_logits(
    loaded: LoadedModel, sequences: Sequence[Sequence[int]], adapter: Adapter | None = None
) -> list[Tensor]:
    """Logits of whole sequences as serving computes them.

    Returns: per sequence [T, V] float32.
    """
    model = loaded.causal_lm()
    logits: list[list[Tensor]] = [[] for _ in sequences]
    config = loaded.engine_config
    with int8_activations(config.rounds_activations):
        for states in chunked_hidden(
            model, sequences, max_tokens=config.max_batch_tokens, adapter=adapter, block_size=config.block_size
        ):
            for index, hidden in states:
                logits[index].append(model.compute_logits(hidden))
    return [torch.cat(parts) for parts in logits]
