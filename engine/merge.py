"""The Merge job: writes a model of its own, as a Hugging Face directory, with adapters' updates added to its weights.

W' = W + sum_i weight_i * scaling_i * B_i A_i, computed in float32 from the adapters' stored factors and the source's
files, and stored in the type of W. All other tensors are carried over as they are under their names, those of parts
that are not resident here (towers of other modalities, a head for multi-token prediction) included.

A source that is not stored in plain floats is merged in floats: a quantized module becomes a plain weight in the type
of its scales, and a GGUF file's matrices become bfloat16, unless the file has only types that torch has too. ``dtype``
chooses another type for all matrices. A rounded W' is not W plus the exact update: in bfloat16 expect differences of
its resolution, 2^-8 of a weight.

merge.json beside the weights tells what was merged.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.loaded import LoadedModel
from engine.durable import write_synced
from engine.errors import FormatError, InvalidArgumentError
from engine.info import AdapterSource, ModelInfo
from engine.jobs import JobEvent, JobWarning, MergeFinished, MergeProgress, MergeSpec
from engine.layers.linear import Embedding, Linear
from engine.loading import Checkpoint
from engine.loading.experts import StackedExperts
from engine.loading.gguf_checkpoint import GGUFCheckpoint
from engine.loading.weights import match_names
from engine.lora.adapter import Adapter
from engine.lora.combine import read_weighted
from engine.models.base import build_model
from engine.quantization.base import UNQUANTIZED, scheme_map
from engine.quantization.export import write_config, write_config_values
from engine.quantization.output import new_model, refuse_taken, save_companions
from engine.quantization.safetensors_writer import SafetensorsWriter, TensorEntry
from engine.quantization.source import named_tensors, open_source, read_stored, stored_dtype

SLICE_ELEMENTS = 1 << 20
"""Elements that are merged or copied in one slice: some milliseconds on one core, with a rank of up to 32."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MERGE_NAME = "merge.json"

Factors = tuple[Tensor, Tensor]
"""A [E, r, I] times the weight and the scaling, and B [E, O, r], float32; E is 1 but for stacked experts."""


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the new checkpoint.

    Attributes:
        read: gives the source's value, in any type.
        updates: what is added to it, viewed as [E, O, I].
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    updates: Sequence[Factors] = ()


@dataclass(slots=True)
class _Sums:
    """Squares over the merged tensors."""

    weights: float = 0.0
    changes: float = 0.0
    dtypes: set[str] = field(default_factory=set)


def merge(
    spec: MergeSpec, loaded: LoadedModel, tokenizer_path: Path, load: Callable[[str, Path], ModelInfo]
) -> Iterator[JobEvent | None]:
    """Merges adapters into a new directory, which appears whole or not at all.

    Args:
        tokenizer_path: directory or .gguf file of the source's tokenizer.
        load: loads the result under its name, if the spec says so.

    Returns: a generator that yields after some rows of a tensor, with MergeProgress after each tensor; and last
        MergeFinished.

    Raises:
        InvalidArgumentError: a field of the spec is out of range.
        NotFoundError: no such adapter or version.
        FailedPreconditionError: an adapter belongs to other base weights, or the model's files have changed since it
            was loaded.
        AlreadyExistsError: there is something at the output directory.
        FormatError: from the generator: a merged weight is beyond the range of its type.
        OverloadedError: from the generator: the disk is full.
    """
    refuse_taken(spec.output_name, Path(spec.output_dir))
    if spec.dtype != "auto" and spec.dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype is {spec.dtype!r}; accepted: auto, {', '.join(DTYPES)}", field="dtype")
    adapters = read_weighted(loaded.adapters, spec.adapters, force=spec.force)
    checkpoint = open_source(loaded)
    outputs = _plan(loaded, checkpoint, _Updates(adapters), DTYPES.get(spec.dtype))
    sources = [AdapterSource(name=a.name, version=a.version, weight=weight) for a, weight in adapters]
    return _run(spec, loaded, checkpoint, outputs, sources, tokenizer_path, load)


class _Updates:
    """The factors of all adapters, by target."""

    def __init__(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self._factors: dict[str, list[Factors]] = {}
        for adapter, weight in adapters:
            for target, (a, b) in adapter.modules.items():
                scaled = a * (weight * adapter.scaling(target))
                pair = (scaled, b) if a.dim() == 3 else (scaled[None], b[None])
                self._factors.setdefault(target, []).append(pair)

    def of_tensor(self, name: str) -> Sequence[Factors]:
        """Of one of the model's tensors: a linear module's weight, or a parameter of stacked experts."""
        return self._factors.get(name) or self._factors.get(name.removesuffix(".weight")) or ()

    def of_expert(self, name: str, expert: int, row: int, num_rows: int) -> Sequence[Factors]:
        """Of rows of one expert in a parameter of stacked experts."""
        return [(a[expert, None], b[expert, None, row : row + num_rows]) for a, b in self.of_tensor(name)]


# ----------------------------------------------------------------------------------------------------------- planning


def _plan(loaded: LoadedModel, checkpoint: Checkpoint, updates: _Updates, dtype: torch.dtype | None) -> list[_Output]:
    """Every tensor of the new checkpoint, in the order of the source's files."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return _plan_gguf(loaded, checkpoint, updates, dtype)
    stored = checkpoint.stored if isinstance(checkpoint, StackedExperts) else checkpoint
    # As it was built for loading: some schemes lay out their tensors anew afterwards.
    built = build_model(loaded.config, scheme_map(loaded.config.quantization_config), loaded.dtype)
    wanted = match_names(checkpoint.names(), built.state_dict(), encoder=loaded.config.task == "embed")
    ours = {name: own for own, name in wanted.items()}
    quantized = _quantized(built)
    outputs, seen = [], set()
    for name in stored.names():
        module, _, leaf = ours.get(name, "").rpartition(".")
        if module in quantized:
            if module not in seen:
                seen.add(module)
                scales = checkpoint.get(wanted[f"{module}.weight_scale"]).dtype
                new_name = name.removesuffix(leaf) + "weight"
                outputs.append(_dequantized(loaded, module, new_name, dtype or scales, updates))
            continue
        value = stored.get(name)  # a view of the mapping, which reads nothing
        place = checkpoint.place(name) if isinstance(checkpoint, StackedExperts) else None
        if place is not None:
            stacked, expert, row = place
            found = updates.of_expert(ours.get(stacked, ""), expert, row, value.shape[0])
        else:
            found = updates.of_tensor(ours[name]) if name in ours else ()
        kind = dtype if dtype is not None and value.is_floating_point() and value.dim() > 1 else value.dtype
        outputs.append(_Output(name, kind, tuple(value.shape), lambda name=name: stored.get(name), found))  # type: ignore[misc]
    return outputs


def _plan_gguf(
    loaded: LoadedModel, checkpoint: GGUFCheckpoint, updates: _Updates, dtype: torch.dtype | None
) -> list[_Output]:
    tensors = named_tensors(loaded.model)
    stored = match_names(checkpoint.names(), tensors, encoder=loaded.config.task == "embed")
    outputs = []
    for name, tensor in tensors.items():
        kind = stored_dtype(checkpoint, stored[name], tensor)
        if dtype is not None and tensor.is_floating_point() and tensor.dim() > 1:
            kind = dtype

        def read(name: str = name, tensor: Tensor = tensor) -> Tensor:
            return read_stored(checkpoint, stored[name], tensor)

        outputs.append(_Output(name, kind, tuple(tensor.shape), read, updates.of_tensor(name)))
    return outputs


def _quantized(model: nn.Module) -> set[str]:
    """Names of the modules that are not stored in plain floats."""
    return {m.name for m in model.modules() if isinstance(m, Linear | Embedding) and m.scheme is not UNQUANTIZED}


def _dequantized(loaded: LoadedModel, module: str, name: str, dtype: torch.dtype, updates: _Updates) -> _Output:
    resident = loaded.model.get_submodule(module)
    assert isinstance(resident, Linear | Embedding)
    shape = (resident.out_features, resident.in_features)

    def read() -> Tensor:
        return resident.scheme.dequantize(resident)

    return _Output(name, dtype, shape, read, updates.of_tensor(module))


# ------------------------------------------------------------------------------------------------------------- writing


def _run(
    spec: MergeSpec,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    outputs: Sequence[_Output],
    sources: list[AdapterSource],
    tokenizer_path: Path,
    load: Callable[[str, Path], ModelInfo],
) -> Iterator[JobEvent | None]:
    begin = time.monotonic()
    sums = _Sums()
    output = Path(spec.output_dir)
    with new_model(output) as staging:
        entries = [TensorEntry(item.name, item.dtype, item.shape) for item in outputs]
        with SafetensorsWriter(staging, entries) as writer:
            for done, item in enumerate(outputs, start=1):
                yield from _write(item, writer, loaded.device, sums)
                yield MergeProgress(job_id=spec.job_id, tensors_done=done, tensors_total=len(outputs), tensor=item.name)
            bytes_out = writer.finish()
        yield None
        _write_config(staging, loaded, checkpoint, outputs, spec)
        _write_origin(staging, loaded, sources)
        if not save_companions(checkpoint, loaded.config, tokenizer_path, staging):
            yield JobWarning(
                job_id=spec.job_id,
                step=None,
                reason="NO_TOKENIZER",
                message=f"model {loaded.info.name!r} has no tokenizer files, so neither has {spec.output_name!r}",
            )
    if spec.load:
        yield None
        load(spec.output_name, output)
    num_merged = sum(bool(item.updates) for item in outputs)
    yield MergeFinished(
        job_id=spec.job_id,
        output_name=spec.output_name,
        output_dir=spec.output_dir,
        adapters=sources,
        num_merged=num_merged,
        num_kept=len(outputs) - num_merged,
        bytes_out=bytes_out,
        dtype="+".join(sorted(sums.dtypes)),
        relative_change=math.sqrt(sums.changes / sums.weights) if sums.weights > 0.0 else 0.0,
        seconds=time.monotonic() - begin,
    )


def _write(item: _Output, writer: SafetensorsWriter, device: torch.device, sums: _Sums) -> Iterator[None]:
    """Writes a tensor, with what is added to it, some rows in a slice."""
    value = item.read()
    if value.numel() == 0 or value.dim() == 0:
        writer.write(item.name, value.to(item.dtype))
        return
    if item.updates:
        stacked = value.reshape(-1, *value.shape[-2:])
    else:  # as one matrix: the taps of a convolution would be a slice for each channel
        stacked = value.reshape(1, -1, value.shape[-1])
    columns = stacked.shape[2]
    updates = [(a.to(device), b.to(device)) for a, b in item.updates]
    rank = sum(a.shape[1] for a, _ in updates)
    step = max(1, SLICE_ELEMENTS // max(1, rank // 32) // columns)
    if updates:
        sums.dtypes.add(str(item.dtype).removeprefix("torch."))
    for index, matrix in enumerate(stacked):
        for start in range(0, matrix.shape[0], step):
            rows = matrix[start : start + step]
            if updates:
                pairs = [(a[index], b[index, start : start + step]) for a, b in updates]
                rows = _merged(item, rows.to(device), pairs, sums)
            writer.write_rows(item.name, rows.to(item.dtype))
            yield None


@torch.no_grad()
def _merged(item: _Output, rows: Tensor, updates: Sequence[tuple[Tensor, Tensor]], sums: _Sums) -> Tensor:
    """rows [n, I] plus the products of A [r, I] and B [n, r], in the type of the output."""
    wide = rows.float()
    change = torch.zeros_like(wide)
    for a, b in updates:
        change += b @ a
    merged = (wide + change).to(item.dtype)
    if not bool(torch.isfinite(merged).all()):
        largest = float((wide + change).abs().max())
        raise FormatError(
            f"the merged weight {item.name} has a value of {largest:.4g}, which "
            f"{str(item.dtype).removeprefix('torch.')} does not hold; accepted: a wider dtype",
            field="dtype",
        )
    sums.weights += float(wide.double().square().sum())
    sums.changes += float(change.double().square().sum())
    return merged


def _write_config(
    directory: Path, loaded: LoadedModel, checkpoint: Checkpoint, outputs: Sequence[_Output], spec: MergeSpec
) -> None:
    """config.json: of a plain source its own, but for a type that was chosen."""
    config = loaded.config
    matrices = [item.dtype for item in outputs if len(item.shape) > 1 and item.dtype.is_floating_point]
    dtype = spec.dtype if spec.dtype != "auto" else str(matrices[0]).removeprefix("torch.")
    if isinstance(checkpoint, GGUFCheckpoint):
        write_config(directory, config, None, dtype=dtype, tied=config.tie_word_embeddings)
        return
    values = dict(config.raw)
    if values.pop("quantization_config", None) is not None or spec.dtype != "auto":
        _set_dtype(values, dtype)
    write_config_values(directory, values)


def _set_dtype(values: dict[str, Any], dtype: str) -> None:
    values.pop("torch_dtype", None)  # the older name
    values["dtype"] = dtype
    nested = values.get("text_config")
    if isinstance(nested, Mapping):
        nested = dict(nested)
        if nested.pop("torch_dtype", None) is not None or "dtype" in nested:
            nested["dtype"] = dtype
        values["text_config"] = nested


def _write_origin(directory: Path, loaded: LoadedModel, sources: Sequence[AdapterSource]) -> None:
    values = {
        "base_model": loaded.info.name,
        "base_digest": loaded.info.weights_digest,
        "adapters": [asdict(source) for source in sources],
    }
    write_synced(directory / MERGE_NAME, json.dumps(values, indent=2) + "\n")
