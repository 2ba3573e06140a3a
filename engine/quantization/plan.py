"""What becomes of each tensor of a model that is to be quantized, decided before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InvalidArgumentError
from engine.jobs import QuantizeSpec
from engine.loading.checkpoint import Checkpoint
from engine.loading.weights import match_names
from engine.quantization.int4 import GROUP_SIZES, Int4Grouped
from engine.quantization.int8 import Int8PerChannel
from engine.quantization.packing import Bits, packed_width
from engine.quantization.safetensors_writer import TensorEntry
from engine.quantization.source import stored_dtype

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class SourceModel:
    """What the plan needs to know of the model.

    Attributes:
        name: for messages.
        linears, embeddings: full names of its modules, in their order.
        tensors: parameters and persistent buffers by name, shared ones once.
        is_causal: a language model, and none that only embeds.
        tied: its head is its embedding table.
    """

    name: str
    linears: Sequence[str]
    embeddings: Sequence[str]
    tensors: Mapping[str, Tensor]
    is_causal: bool
    tied: bool


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the new checkpoint.

    Attributes:
        name: of the module if it is quantized, of the tensor if it is kept.
        source: the model's name of the tensor that it is made from.
        stored: the name of that in the source's files.
        quantized: or kept.
        shape: of the source.
        dtype: in which it is kept, or of its scales.
    """

    name: str
    source: str
    stored: str
    quantized: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """Everything that is decided before the first slice.

    Attributes:
        tensors: in the order in which they are written.
        ignore: modules that are kept though their class is quantized.
        tied: the new model's head is its embedding table.
    """

    scheme: Int8PerChannel | Int4Grouped
    tensors: list[PlannedTensor]
    ignore: list[str]
    tied: bool

    @property
    def bits(self) -> Bits:
        return 4 if isinstance(self.scheme, Int4Grouped) else 8

    @property
    def group_size(self) -> int | None:
        """None: the whole row."""
        return self.scheme.group_size if isinstance(self.scheme, Int4Grouped) else None

    @property
    def symmetric(self) -> bool:
        return self.scheme.symmetric if isinstance(self.scheme, Int4Grouped) else True

    def entries(self) -> list[TensorEntry]:
        """The tensors of the new files, in order."""
        entries = []
        for tensor in self.tensors:
            if not tensor.quantized:
                entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape))
                continue
            rows, columns = tensor.shape
            groups = columns // (self.group_size or columns)
            entries += [
                TensorEntry(f"{tensor.name}.weight_packed", torch.int32, (rows, packed_width(columns, self.bits))),
                TensorEntry(f"{tensor.name}.weight_scale", tensor.dtype, (rows, groups)),
                TensorEntry(f"{tensor.name}.weight_shape", torch.int64, (2,)),
            ]
            if not self.symmetric:
                shape = (packed_width(rows, self.bits), groups)
                entries.append(TensorEntry(f"{tensor.name}.weight_zero_point", torch.int32, shape))
        return entries


def plan_quantization(spec: QuantizeSpec, model: SourceModel, checkpoint: Checkpoint) -> QuantizationPlan:
    """Decides.

    Raises:
        InvalidArgumentError: a field is out of range, or the options do not fit the model.
    """
    scheme = _scheme(spec)
    if spec.quantize_head and not model.is_causal:
        raise InvalidArgumentError(
            f"quantize_head is true, and model {model.name!r} only embeds, without a head; accepted: false",
            field="quantize_head",
        )
    if model.tied and spec.quantize_embeddings and not spec.quantize_head:
        raise InvalidArgumentError(
            f"quantize_embeddings without quantize_head, and the head of model {model.name!r} is its embedding table; "
            "accepted: both, neither, or quantize_head alone",
            field="quantize_embeddings",
        )
    chosen = [name for name in model.linears if spec.quantize_head or name != HEAD]
    ignore = [name for name in model.linears if name not in chosen]
    if spec.quantize_embeddings:
        chosen += model.embeddings
    if model.tied and not spec.quantize_head:
        ignore.append(HEAD)  # other engines have a module of that name all the same
    if not model.is_causal:
        ignore.append("re:.*pooler.*")  # a head of pre-training, which embeddings do not need
    modules = {f"{name}.weight": name for name in chosen}
    stored = match_names(checkpoint.names(), model.tensors, encoder=not model.is_causal)
    planned = []
    for name, tensor in model.tensors.items():
        dtype, shape = stored_dtype(checkpoint, stored[name], tensor), tuple(tensor.shape)
        planned.append(PlannedTensor(modules.get(name, name), name, stored[name], name in modules, shape, dtype))
        # The first: a head for multi-token prediction may have embeddings as well.
        if model.tied and spec.quantize_head and name == f"{model.embeddings[0]}.weight":
            planned.append(PlannedTensor(HEAD, name, stored[name], True, shape, dtype))
    if isinstance(scheme, Int4Grouped):
        _check_groups(planned, scheme.group_size)
    return QuantizationPlan(scheme, planned, ignore, model.tied and not spec.quantize_head)


def _scheme(spec: QuantizeSpec) -> Int8PerChannel | Int4Grouped:
    if spec.scheme == "q8":
        return Int8PerChannel()
    if spec.scheme != "q4":
        raise InvalidArgumentError(f"scheme is {spec.scheme!r}; accepted: q8, q4", field="scheme")
    if spec.group_size not in GROUP_SIZES:
        raise InvalidArgumentError(
            f"group_size is {spec.group_size}; accepted: {', '.join(map(str, GROUP_SIZES))}", field="group_size"
        )
    return Int4Grouped(spec.group_size, spec.symmetric)


def _check_groups(tensors: list[PlannedTensor], group_size: int) -> None:
    widths = {tensor.shape[1]: tensor.name for tensor in tensors if tensor.quantized}
    for width, name in widths.items():
        if width % group_size:
            fitting = [str(size) for size in GROUP_SIZES if all(w % size == 0 for w in widths)]
            raise InvalidArgumentError(
                f"group_size is {group_size}, which does not divide the {width} inputs of {name}; accepted for this "
                f"model: {', '.join(fitting) or 'none, use scheme q8'}",
                field="group_size",
            )
