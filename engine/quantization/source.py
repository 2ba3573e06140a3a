"""What a job that writes a new model reads of a loaded one: its files, in their stored precision."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError
from engine.loading import Checkpoint, open_checkpoint
from engine.loading.gguf_checkpoint import PARTS, GGUFCheckpoint


def open_source(loaded: LoadedModel) -> Checkpoint:
    """The files that a model was loaded from.

    Raises:
        FailedPreconditionError: they have changed since.
    """
    checkpoint = open_checkpoint(Path(loaded.info.path))
    if checkpoint.digest() != loaded.info.weights_digest:
        raise FailedPreconditionError(
            f"the files of model {loaded.info.name!r} have changed since it was loaded; load it again",
            field="model",
            reason="SOURCE_CHANGED",
        )
    return checkpoint


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, shared ones once; of a matrix in GGUF blocks the ``weight`` that the blocks
    stand for, on the meta device."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        if leaf in PARTS:
            if leaf == PARTS[0]:
                module = model.get_submodule(path)
                shape = (module.out_features, module.in_features)
                whole = torch.empty(shape, dtype=torch.float32, device="meta")  # type: ignore[arg-type]
                unique.setdefault(id(tensor), (f"{path}.weight", whole))
            continue
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def read_stored(checkpoint: Checkpoint, name: str, resident: Tensor) -> Tensor:
    """A tensor of the source in its stored precision.

    Args:
        name: in the files.
        resident: the same in memory.
    """
    if isinstance(checkpoint, GGUFCheckpoint) and resident.dtype == torch.float32 and not resident.is_meta:
        return resident.detach()  # what the file would be dequantized to once more
    return checkpoint.get(name)


def stored_dtype(checkpoint: Checkpoint, name: str, resident: Tensor) -> torch.dtype:
    """The type in which a tensor of the source is kept, or in which its scales are."""
    if not isinstance(checkpoint, GGUFCheckpoint):
        dtype = checkpoint.get(name).dtype  # a view of the mapping, which reads nothing
        return torch.float32 if dtype == torch.float64 else dtype
    if not resident.is_floating_point():
        return resident.dtype
    return torch.float32 if resident.dim() < 2 else _gguf_dtype(checkpoint)


def _gguf_dtype(checkpoint: GGUFCheckpoint) -> torch.dtype:
    """One type for all matrices of a GGUF file: bfloat16, unless the file has only types that torch has as well."""
    kinds = {tensor.type_id for tensor in checkpoint.file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {0}:
        return torch.float32
    return torch.float16 if kinds <= {0, 1} else torch.bfloat16


def source_bytes(checkpoint: Checkpoint) -> int:
    """Of the weight files as they lie on disk."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.path.stat().st_size
    return checkpoint.stored_bytes
