"""The Quantize job: writes a quantized copy of a loaded model as a Hugging Face directory that other engines load.

What is compared: ``bytes_in`` are the source's weight files as they lie on disk (all its safetensors files, or the
.gguf file with its metadata), ``bytes_out`` the safetensors files that were written. A GGUF source may itself be
stored in 4 bits, and then gains nothing.

Weights are read from the source's files, so that the compute type of the resident model costs no precision. What is
not quantized keeps its stored type; a GGUF type that torch lacks becomes bfloat16. Scales have the type of the weight.

A head that is tied to the embeddings cannot be shared in quantized form by other engines. So ``quantize_head`` unties
it: the quantized head is stored beside the embeddings, and ``tie_word_embeddings`` becomes false. With tied weights
``quantize_embeddings`` alone would store the table once more for the head, so it needs ``quantize_head``. Quantized
embeddings load here and in transformers (``CompressedTensorsConfig(dequantize=True)``), but not in vLLM, which knows
them in plain types alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, FormatError
from engine.evaluation.scoring import Window
from engine.info import ModelInfo
from engine.jobs import JobEvent, JobWarning, QuantizeFinished, QuantizeProgress, QuantizeSpec, TensorError
from engine.layers.linear import Embedding, Linear
from engine.loading import Checkpoint
from engine.names import validate_name
from engine.quantization.comparison import Comparison, compare, eval_windows
from engine.quantization.compressed_tensors import quantization_config
from engine.quantization.export import write_config
from engine.quantization.gguf import GGUFBlocks
from engine.quantization.output import new_model, refuse_taken, save_companions
from engine.quantization.packing import pack, pack_outputs
from engine.quantization.plan import PlannedTensor, QuantizationPlan, SourceModel, plan_quantization
from engine.quantization.quantize import quantize_rows
from engine.quantization.safetensors_writer import SafetensorsWriter
from engine.quantization.source import named_tensors, open_source, read_stored, source_bytes

SLICE_ELEMENTS = 1 << 17
"""Elements quantized in one slice; with the search for ranges about 30 ms on one core."""


def quantize(
    spec: QuantizeSpec, loaded: LoadedModel, tokenizer_path: Path, load: Callable[[str, Path], ModelInfo]
) -> Iterator[JobEvent | None]:
    """Quantizes a model into a new directory, which appears whole or not at all.

    Args:
        tokenizer_path: directory or .gguf file of the source's tokenizer.
        load: loads the result under its name, if the spec says so.

    Returns: a generator that yields after some rows of a tensor or a forward of the evaluation, with QuantizeProgress
        after each tensor; and last QuantizeFinished. On a dry run it quantizes and reports the errors, but writes and
        evaluates nothing; the sizes are those of the report's tensors.

    Raises:
        InvalidArgumentError: a field of the spec is out of range, or the options do not fit the model.
        FailedPreconditionError: the model is quantized already, or its files have changed since it was loaded.
        AlreadyExistsError: there is something at the output directory.
        OverloadedError: from the generator: the disk is full.
    """
    validate_name(spec.output_name, "output_name")
    if not spec.dry_run:
        refuse_taken(spec.output_name, Path(spec.output_dir))
    checkpoint = _open_source(loaded)
    model = loaded.model
    plan = plan_quantization(
        spec,
        SourceModel(
            name=loaded.info.name,
            linears=[m.name for m in model.modules() if isinstance(m, Linear)],
            embeddings=[m.name for m in model.modules() if isinstance(m, Embedding)],
            tensors=named_tensors(model),
            is_causal=loaded.config.task == "generate",
            tied=loaded.config.task == "generate" and loaded.config.tie_word_embeddings,
        ),
        checkpoint,
    )
    windows = eval_windows(spec, loaded) if spec.eval_token_ids and not spec.dry_run else []
    return _run(spec, loaded, checkpoint, plan, windows, tokenizer_path, load)


def _open_source(loaded: LoadedModel) -> Checkpoint:
    # Blocks of a GGUF file are read from the file again, in float.
    if any(
        not module.scheme.is_plain and not isinstance(module.scheme, GGUFBlocks)
        for module in loaded.model.modules()
        if isinstance(module, Linear | Embedding)
    ):
        raise FailedPreconditionError(
            f"model {loaded.info.name!r} is quantized already ({loaded.info.quantization}); quantize its source",
            field="model",
            reason="ALREADY_QUANTIZED",
        )
    return open_source(loaded)


def _run(
    spec: QuantizeSpec,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    windows: Sequence[Window],
    tokenizer_path: Path,
    load: Callable[[str, Path], ModelInfo],
) -> Iterator[JobEvent | None]:
    begin = time.monotonic()
    errors: list[TensorError] = []
    bytes_out: int | None = None
    evaluation = Comparison()
    if spec.dry_run:
        yield from _tensors(spec, loaded, checkpoint, plan, errors, None)
    else:
        output = Path(spec.output_dir)
        with new_model(output) as staging:
            with SafetensorsWriter(staging, plan.entries()) as writer:
                yield from _tensors(spec, loaded, checkpoint, plan, errors, writer)
                bytes_out = writer.finish()
            yield from _write_companions(spec, loaded, checkpoint, plan, staging, tokenizer_path)
            if windows:
                yield from compare(spec, loaded, staging, windows, evaluation, len(plan.tensors))
        if spec.load:
            yield None
            load(spec.output_name, output)
    bytes_in = source_bytes(checkpoint)
    yield QuantizeFinished(
        job_id=spec.job_id,
        output_name=spec.output_name,
        output_dir=spec.output_dir,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        ratio=None if bytes_out is None else bytes_in / bytes_out,
        tensors=errors,
        num_quantized=sum(item.quantized for item in plan.tensors),
        num_kept=sum(not item.quantized for item in plan.tensors),
        logit_kl=evaluation.logit_kl,
        perplexity_before=evaluation.perplexity_before,
        perplexity_after=evaluation.perplexity_after,
        num_eval_tokens=evaluation.num_tokens,
        seconds=time.monotonic() - begin,
    )


def _tensors(
    spec: QuantizeSpec,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    errors: list[TensorError],
    writer: SafetensorsWriter | None,
) -> Iterator[JobEvent | None]:
    """Quantizes or copies every tensor; adds to ``errors`` one of each that is quantized."""
    resident = named_tensors(loaded.model)
    for done, item in enumerate(plan.tensors, start=1):
        value = read_stored(checkpoint, item.stored, resident[item.source])
        if item.quantized:
            yield from _quantize_tensor(plan, item, value, errors, writer)
        elif writer is not None:
            writer.write(item.name, value.to(item.dtype))
        yield QuantizeProgress(
            job_id=spec.job_id,
            stage="quantizing" if item.quantized else "writing",
            tensors_done=done,
            tensors_total=len(plan.tensors),
            tensor=item.name,
        )


@torch.no_grad()
def _quantize_slice(
    plan: QuantizationPlan, item: PlannedTensor, part: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Some rows: packed values, scales, zero points, and the error [O, I] float32."""
    part = part.float()
    if not bool(torch.isfinite(part).all()):
        raise FormatError(f"the weight of {item.name} has values that are not finite", field="model")
    quantized = quantize_rows(
        part,
        bits=plan.bits,
        group_size=plan.group_size,
        symmetric=plan.symmetric,
        scale_dtype=item.dtype,
        search=plan.bits == 4,
    )
    return pack(quantized.values, plan.bits), quantized.scale, quantized.zero, quantized.dequantize() - part


def _quantize_tensor(
    plan: QuantizationPlan,
    item: PlannedTensor,
    weight: Tensor,
    errors: list[TensorError],
    writer: SafetensorsWriter | None,
) -> Iterator[None]:
    rows, columns = item.shape
    step = max(1, SLICE_ELEMENTS // columns)
    packed, scales, zeros = [], [], []
    squared_error = squared = largest = 0.0
    for start in range(0, rows, step):
        part = weight[start : start + step]
        words, scale, zero, error = _quantize_slice(plan, item, part)
        packed.append(words.cpu())
        scales.append(scale.cpu())
        if zero is not None:
            zeros.append(zero.cpu())
        squared_error += float(error.double().square().sum())
        squared += float(part.double().square().sum())
        largest = max(largest, float(error.abs().max()))
        yield None
    tensors = {
        "weight_packed": torch.cat(packed),
        "weight_scale": torch.cat(scales),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zeros:
        tensors["weight_zero_point"] = pack_outputs(torch.cat(zeros), plan.bits)
    if writer is not None:
        for name, tensor in tensors.items():
            writer.write(f"{item.name}.{name}", tensor)
    errors.append(
        TensorError(
            name=f"{item.name}.weight",
            relative_rmse=math.sqrt(squared_error / squared) if squared > 0.0 else 0.0,
            max_abs=largest,
            num_elements=rows * columns,
            bits=8 * sum(t.numel() * t.element_size() for t in tensors.values()) / (rows * columns),
        )
    )


def _write_companions(
    spec: QuantizeSpec,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    staging: Path,
    tokenizer_path: Path,
) -> Iterator[JobEvent]:
    """Configuration, tokenizer, and whatever else belongs to the model."""
    kept = [item.dtype for item in plan.tensors if len(item.shape) > 1]
    write_config(
        staging,
        loaded.config,
        quantization_config(plan.scheme, plan.ignore, embeddings=spec.quantize_embeddings),
        dtype=str(kept[0]).removeprefix("torch."),
        tied=plan.tied,
    )
    if not save_companions(checkpoint, loaded.config, tokenizer_path, staging):
        yield JobWarning(
            job_id=spec.job_id,
            step=None,
            reason="NO_TOKENIZER",
            message=f"model {loaded.info.name!r} has no tokenizer files, so neither has {spec.output_name!r}",
        )
