"""The Embed job: vectors of many inputs, a packed batch a slice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.context import packed_context
from engine.core.chunked import chunked_hidden
from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, InvalidArgumentError, OutOfRangeError
from engine.evaluation.embedding_config import POOLINGS, Pooling, read_embedding_config
from engine.jobs import EmbedFinished, EmbedSpec, JobEvent
from engine.layers.pooling import finish, pool, validate_dimensions
from engine.lora.adapter import Adapter, LoRABatch
from engine.models.base import CausalLM
from engine.ops.cpu import int8_activations, with_int8_activations


def embed(spec: EmbedSpec, loaded: LoadedModel) -> Iterator[JobEvent | None]:
    """Embeds every input of the job, with an encoder or a causal model.

    Inputs run in order of length, as many to a forward as a slice's time and ``max_batch_tokens`` allow (an input that
    is longer than that runs alone). A vector does not depend on what shares its batch, up to the last bits of the
    matrix products.

    Returns: a generator that yields None after each forward, and last EmbedFinished with the vectors in input order.

    Raises:
        InvalidArgumentError: no inputs, an empty input, or a token id out of range; the field names the input.
        OutOfRangeError: an input is longer than the model's context, or dimensions exceed the model's width.
        NotFoundError: no such adapter or version.
        FormatError: the model's files ask for pooling that is not supported, and the job names none.
    """
    _validate_inputs(spec.inputs, loaded.info.max_model_len, loaded.config.vocab_size)
    dimensions = validate_dimensions(spec.dimensions, loaded.info.embedding_dimensions)
    if spec.pooling is not None and spec.pooling not in POOLINGS:
        raise InvalidArgumentError(f"pooling is {spec.pooling!r}; accepted: {', '.join(POOLINGS)}", field="pooling")
    pooling, normalize = spec.pooling, spec.normalize
    if pooling is None or normalize is None:
        own = read_embedding_config(Path(loaded.info.tokenizer_path), causal=isinstance(loaded.model, CausalLM))
        pooling = own.pooling if pooling is None else pooling
        normalize = own.normalize if normalize is None else normalize
    adapter = None if spec.adapter is None else loaded.adapters.get(spec.adapter, spec.adapter_version)
    return _embed(spec, loaded, adapter, pooling, normalize, dimensions)


def _validate_inputs(inputs: list[list[int]], limit: int, vocab_size: int) -> None:
    if not inputs:
        raise InvalidArgumentError("inputs is empty; accepted: at least one input", field="inputs")
    for index, token_ids in enumerate(inputs):
        name = f"inputs[{index}]"
        if not token_ids:
            raise InvalidArgumentError(
                f"{name} has no tokens; accepted: at least one", field=name, reason="EMPTY_INPUT"
            )
        if len(token_ids) > limit:
            raise OutOfRangeError(
                f"{name} has {len(token_ids)} tokens; accepted: at most {limit}, the model's context", field=name
            )
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidArgumentError(f"{name} has token id {wrong}; accepted: [0, {vocab_size})", field=name)


def _embed(
    spec: EmbedSpec,
    loaded: LoadedModel,
    adapter: Adapter | None,
    pooling: Pooling,
    normalize: bool,
    dimensions: int,
) -> Iterator[JobEvent | None]:
    config = loaded.engine_config
    budget = loaded.slice_budget("embedding")
    vectors = torch.empty(len(spec.inputs), dimensions, dtype=torch.float32)
    # Longest first: the largest need of memory shows at once, and like lengths share a batch.
    order = sorted(range(len(spec.inputs)), key=lambda i: len(spec.inputs[i]), reverse=True)
    done = 0
    while done < len(order):
        batch, num_tokens = _take(order, done, spec.inputs, budget.tokens)
        done += len(batch)
        begin = time.monotonic()
        if num_tokens > budget.forward_tokens and isinstance(loaded.model, CausalLM):
            parts = []
            ids = spec.inputs[batch[0]]
            chunks = chunked_hidden(loaded.model, [ids], max_tokens=budget.forward_tokens, adapter=adapter)
            for ((_, part),) in with_int8_activations(config.rounds_activations, chunks):
                parts.append(part)
                budget.observe(len(part), time.monotonic() - begin)
                yield None
                begin = time.monotonic()
            bounds = torch.tensor([0, num_tokens], dtype=torch.int32, device=loaded.device)
            pooled = pool(torch.cat(parts), bounds, pooling)
        else:
            with int8_activations(config.rounds_activations):
                pooled = _forward(loaded, [spec.inputs[i] for i in batch], adapter, pooling)
            budget.observe(num_tokens, time.monotonic() - begin)
        rows = finish(pooled, dimensions=dimensions, normalize=normalize).cpu()
        if not bool(torch.isfinite(rows).all()):
            wrong = batch[int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])]
            raise FailedPreconditionError(
                f"the embedding of inputs[{wrong}] is not finite; the model's weights or its type "
                f"({loaded.info.dtype}) do not carry it",
                field=f"inputs[{wrong}]",
                reason="NON_FINITE",
            )
        vectors[batch] = rows
        yield None
    yield EmbedFinished(
        job_id=spec.job_id,
        vectors=vectors.numpy().astype("<f4").tobytes(),
        dimensions=dimensions,
        num_tokens=sum(map(len, spec.inputs)),
        adapter_version=None if adapter is None else adapter.version,
    )


def _take(order: list[int], start: int, inputs: list[list[int]], max_tokens: int) -> tuple[list[int], int]:
    """The next inputs that fit into max_tokens, at least one; and how many tokens they have."""
    end, num_tokens = start, 0
    while end < len(order) and (end == start or num_tokens + len(inputs[order[end]]) <= max_tokens):
        num_tokens += len(inputs[order[end]])
        end += 1
    return order[start:end], num_tokens


@torch.no_grad()
def _forward(loaded: LoadedModel, sequences: list[list[int]], adapter: Adapter | None, pooling: Pooling) -> Tensor:
    """One packed forward: [S, D] float32."""
    lengths = [len(sequence) for sequence in sequences]
    total = sum(lengths)
    token_ids = torch.tensor([token for sequence in sequences for token in sequence], device=loaded.device)
    ctx = packed_context(
        lengths,
        device=loaded.device,
        lora=None if adapter is None else LoRABatch([(adapter, 0, total)], total),
        causal=isinstance(loaded.model, CausalLM),
    )
    return pool(loaded.model(token_ids, ctx), ctx.cu_seqlens, pooling)
