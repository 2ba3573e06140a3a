"""Checks a model on disk as this engine computes it: forwards, gradients, and both against transformers and peft."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.context import packed_context
from engine.core.half_weights import stored_halves
from engine.core.loaded import LoadedModel
from engine.core.machine import free_bytes, usable_cores
from engine.core.model_loader import load_checkpoint
from engine.errors import EngineError, InvalidArgumentError, OutOfMemoryError
from engine.loading import Checkpoint, open_checkpoint
from engine.lora.peft_config import MAX_RANK
from engine.models.base import CausalLM, Model, build_model
from engine.ops import cpu
from engine.quantization.base import scheme_map
from engine.training.seeds import derive_seed
from engine.verification.figures import Figure, Group, Measured, Unmeasurable
from engine.verification.first_layers import FirstLayers
from engine.verification.forwards import CHECKS, stored_weights
from engine.verification.functions import FUNCTIONS, FunctionCase
from engine.verification.gradients import TOLERANCE, check_gradients
from engine.verification.layers import Recorder, decoder_layers, first_of_each_kind, layer_problem
from engine.verification.reference import compare_forward, compare_gradients, load_reference

STORED_WEIGHTS = "logits of weights as the file has them = of wide ones"

SHARES = (0.6, 0.3, 0.1)
"""Of the tokens, per sequence."""

MIN_TOKENS = 20
LAYER_LENGTHS = (9, 1, 4)
RECURRENT_LAYER_LENGTHS = (35, 1, 4)
"""Of the sequences in the gradient check of a layer; the longest of a recurrent one spans two chunks."""

WORKING_BYTES = 256 << 20
"""Of activations and logits, beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyParams:
    """What to verify.

    Attributes:
        path: as operators give it: a Hugging Face directory, a .safetensors or a .gguf file.
        token_ids: to run the model on, cut into sequences of unlike length.
        num_layers: of the model, from the first on; None: all.
        adapter_rank: of the adapters of (b) and (d).
        num_threads: of torch; 0: as many as cores.
    """

    path: Path
    token_ids: Sequence[int]
    num_layers: int | None = None
    adapter_rank: int = 4
    num_threads: int = 0
    seed: int = 0


def open_for_verification(path: Path, num_layers: int | None, *, keep_blocks: bool = False) -> Checkpoint:
    """The checkpoint, or its first layers.

    Args:
        keep_blocks: see open_checkpoint.
    Raises:
        NotFoundError: there is nothing at the path.
        InvalidArgumentError: malformed, of an unsupported kind, or without so many layers.
    """
    checkpoint = open_checkpoint(path, keep_blocks=keep_blocks)
    return checkpoint if num_layers is None else FirstLayers(checkpoint, num_layers)


def random_tokens(checkpoint: Checkpoint, num_tokens: int, seed: int) -> list[int]:
    """Ids for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "verify tokens"))
    ids: list[int] = torch.randint(checkpoint.config.vocab_size, (num_tokens,), generator=generator).tolist()
    return ids


def verify(params: VerifyParams) -> Iterator[Figure]:
    """Makes every check that can be made here, the cheapest first; each Figure comes as soon as it is known.

    Everything is computed on the CPU, in float32 and, for (c), in float64.

    Raises:
        NotFoundError, FormatError: as of open_checkpoint.
        InvalidArgumentError: a parameter is out of range.
        OutOfMemoryError: the model does not fit into free memory in float32; says how many of its layers would.
    """
    if not 1 <= params.adapter_rank <= MAX_RANK:
        raise InvalidArgumentError(
            f"adapter_rank is {params.adapter_rank}; accepted: an integer in [1, {MAX_RANK}]", field="adapter_rank"
        )
    if params.num_threads < 0:
        raise InvalidArgumentError(
            f"num_threads is {params.num_threads}; accepted: 0, for as many as cores, or more", field="num_threads"
        )
    checkpoint = open_for_verification(params.path, params.num_layers)
    lengths = _lengths(params.token_ids, checkpoint)
    room = _plan_memory(checkpoint)
    num_threads = params.num_threads or usable_cores()
    torch.set_num_threads(num_threads)
    cpu.set_num_threads(num_threads)
    # The runner of requests is never used, and a cache takes memory only as it is written.
    config = EngineConfig(
        device="cpu", dtype="float32", half_weights="float", max_running_requests=1, enable_prefix_caching=False
    )
    loaded = load_checkpoint("verify", checkpoint, config, torch.device("cpu"), torch.float32)
    sequences, begin = [], 0
    for length in lengths:
        sequences.append(list(params.token_ids[begin : begin + length]))
        begin += length
    yield from _forwards(loaded, sequences, params)
    stored = open_for_verification(params.path, params.num_layers, keep_blocks=True)
    if checkpoint.config.quantization_config is None and _is_narrow(stored):
        config = replace(config, half_weights="stored")
        kept = load_checkpoint("stored", stored, config, torch.device("cpu"), torch.float32)
        yield _figure("b", STORED_WEIGHTS, partial(stored_weights, loaded, kept, sequences))
        del kept
    yield from _gradients(loaded, sequences, params)
    yield from _against_transformers(loaded, checkpoint, sequences, params, room)


def _lengths(token_ids: Sequence[int], checkpoint: Checkpoint) -> list[int]:
    """Of the sequences that the tokens are cut into."""
    config = checkpoint.config
    if len(token_ids) < MIN_TOKENS:
        raise InvalidArgumentError(f"tokens is {len(token_ids)}; accepted: at least {MIN_TOKENS}", field="tokens")
    if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
        raise InvalidArgumentError(
            f"token ids are in [{min(token_ids)}, {max(token_ids)}]; accepted: [0, {config.vocab_size})", field="tokens"
        )
    lengths = [int(len(token_ids) * share) for share in SHARES[1:]]
    lengths.insert(0, len(token_ids) - sum(lengths))
    longest = _meta_model(checkpoint).max_input_tokens
    if lengths[0] > longest:
        raise InvalidArgumentError(
            f"tokens is {len(token_ids)}, of which the longest sequence takes {lengths[0]}; accepted: at most "
            f"{int(longest / SHARES[0])}, as the model has {longest} positions",
            field="tokens",
        )
    return lengths


def _meta_model(checkpoint: Checkpoint) -> Model:
    config = checkpoint.config
    return build_model(config, scheme_map(config.quantization_config), torch.float32)


def _is_narrow(checkpoint: Checkpoint) -> bool:
    """Whether it has weights that may be held as they are stored, in fewer bits than float32 has."""
    if checkpoint.config.quantization_config is not None:
        return True
    return bool(stored_halves(_meta_model(checkpoint), checkpoint))


def _plan_memory(checkpoint: Checkpoint) -> int:
    """Bytes that are left for transformers' copy of the model.

    Raises:
        OutOfMemoryError: not even ours fits.
    """
    model = _meta_model(checkpoint)
    layers = [_bytes(layer.parameters()) for _, layer in decoder_layers(model)]
    # Beside the layers and what they share, one layer as float64, and as float32 on the way there.
    needed = _bytes(model.parameters()) + 3 * max(layers) + WORKING_BYTES
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        fitting = len(layers) - -(-(needed - free) // max(layers))
        advice = f"--layers {fitting} would fit" if fitting > 0 else "not even one of its layers would fit"
        raise OutOfMemoryError(
            f"{checkpoint.path} needs {needed >> 20} MiB in float32 and {free >> 20} MiB are free; {advice}",
            reason="OUT_OF_MEMORY",
        )
    return free - needed


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _figure(group: Group, name: str, measure: Callable[[], Measured]) -> Figure:
    """Measures, judges, and takes the time."""
    begin = time.monotonic()
    try:
        measured = measure()
    except Unmeasurable as error:
        return Figure(group=group, name=name, status="skipped", detail=str(error))
    except EngineError as error:
        if isinstance(error, OutOfMemoryError):
            raise
        seconds = time.monotonic() - begin
        return Figure(group=group, name=name, status="failed", detail=error.message, seconds=seconds)
    return Figure(
        group=group,
        name=name,
        status=measured.status,
        value=measured.value,
        accepted=measured.accepted,
        detail=measured.detail,
        seconds=time.monotonic() - begin,
    )


def _forwards(loaded: LoadedModel, sequences: list[list[int]], params: VerifyParams) -> Iterator[Figure]:
    """(b)"""
    for name, check in CHECKS.items():
        if not isinstance(loaded.model, CausalLM):
            why = "an encoder has one forward: it neither trains nor generates"
            yield Figure(group="b", name=name, status="skipped", detail=why)
        else:
            yield _figure("b", name, partial(check, loaded, sequences, params.adapter_rank, params.seed))


def _gradients(loaded: LoadedModel, sequences: list[list[int]], params: VerifyParams) -> Iterator[Figure]:
    """(c)"""
    for kind, index in first_of_each_kind(loaded.model).items():
        yield _figure(
            "c", f"layer {index}: {kind}", partial(_layer_gradients, loaded, index, sequences[0], params.seed)
        )
    for function, make_cases in FUNCTIONS.items():
        if cases := make_cases(loaded.config):
            name = function.rsplit(".", 1)[1].lstrip("_")
            yield _figure("c", f"autograd.Function {name}", partial(_function_gradients, cases))


def _layer_gradients(loaded: LoadedModel, index: int, token_ids: list[int], seed: int) -> Measured:
    """One of the model's own layers, on what its layers before give it."""
    model = loaded.model
    causal = isinstance(model, CausalLM)
    lengths = list(
        RECURRENT_LAYER_LENGTHS if isinstance(model, CausalLM) and model.num_recurrent_layers else LAYER_LENGTHS
    )
    ids = (token_ids * -(-sum(lengths) // len(token_ids)))[: sum(lengths)]
    name, layer = decoder_layers(model)[index]
    with torch.no_grad(), Recorder({index: layer}) as seen:
        model(torch.tensor(ids), packed_context(lengths, causal=causal))
    x, *rest = seen.taken[index]
    problem = layer_problem(name, layer, x, rest, lengths, causal=causal, seed=seed)
    found = check_gradients(problem, problem.inputs, top=1, strided=1, seed=seed)
    return Measured(found.error, found.tolerance, f"{len(found.worst)} tensors; {found.worst_entry}")


def _function_gradients(cases: Sequence[FunctionCase]) -> Measured:
    """All cases at the model's shapes."""
    worst: tuple[float, str] = (-1.0, "")
    for case in cases:
        found = check_gradients(case.function, case.inputs, top=1, strided=1)
        worst = max(worst, (found.error, f"{case.name}: {found.worst_entry}"))
    return Measured(worst[0], TOLERANCE, f"{len(cases)} cases; {worst[1]}")


def _against_transformers(
    loaded: LoadedModel, checkpoint: Checkpoint, sequences: list[list[int]], params: VerifyParams, room: int
) -> Iterator[Figure]:
    """(a) and (d)"""
    causal = isinstance(loaded.model, CausalLM)
    results = "logits = transformers'" if causal else "hidden states = transformers'"
    layers, gradients = "every layer's output = transformers'", "gradients of every A and B = peft's"
    encoder = "adapters of encoders are not trained"
    begin = time.monotonic()
    needed = _bytes(loaded.model.parameters()) + WORKING_BYTES
    try:
        if needed > room:
            raise Unmeasurable(
                f"transformers' copy needs {needed >> 20} MiB and {room >> 20} MiB are left; see --layers"
            )
        reference = load_reference(checkpoint, loaded.model)
        pair = compare_forward(loaded, reference, sequences)
    except Unmeasurable as error:
        for group, name in (("a", results), ("a", layers), ("d", gradients)):
            why = encoder if group == "d" and not causal else str(error)
            yield Figure(group=group, name=name, status="skipped", detail=why)  # type: ignore[arg-type]
        return
    yield replace(_figure("a", results, lambda: pair[0]), seconds=time.monotonic() - begin)
    yield _figure("a", layers, lambda: pair[1])
    if not causal:
        yield Figure(group="d", name=gradients, status="skipped", detail=encoder)
        return
    rank, seed = params.adapter_rank, params.seed
    yield _figure("d", gradients, lambda: compare_gradients(loaded, reference, sequences, rank, seed))
