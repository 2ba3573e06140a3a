"""What there is to tell about one version of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import FormatError
from engine.info import AdapterInfo
from engine.lora.adapter import Adapter
from engine.lora.lineage import Lineage, base_digest_of
from engine.lora.peft import WEIGHTS_NAME, adapted_targets
from engine.lora.peft_config import PeftConfig, read_config
from engine.lora.targets import LinearLike, kinds


def describe_stored(
    directory: Path, targets: Mapping[str, LinearLike], *, model: str, name: str, version: int
) -> AdapterInfo:
    """A version on disk, from its files; names of parents and sources are those of the time when it was made.

    Raises:
        FormatError, NotFoundError: the files are malformed or missing.
    """
    lineage, config = Lineage.read(directory), read_config(directory)
    names, num_parameters = _stored_shape(directory, targets, config)
    modules, parameters = kinds(names, targets)
    return AdapterInfo(
        model=model,
        name=name,
        version=version,
        live=False,
        loaded=False,
        rank=config.rank,
        alpha=config.alpha,
        use_rslora=config.use_rslora,
        target_modules=modules,
        target_parameters=parameters,
        num_parameters=num_parameters,
        path=str(directory),
        created_at=lineage.created_at,
        run_id=lineage.run_id,
        base_digest=lineage.base_digest,
        best_nll=lineage.best_nll,
        parent=lineage.parent,
        data_digest=lineage.data_digest,
        sources=list(lineage.sources),
        combination=lineage.combination,
        forced=lineage.forced,
    )


def describe_loaded(adapter: Adapter, path: Path, targets: Mapping[str, LinearLike], *, model: str) -> AdapterInfo:
    """An adapter in memory that was never stored. Of its origin it tells the base alone: a name in a lineage beside it
    would be one of another store."""
    modules, parameters = kinds(adapter.modules, targets)
    return AdapterInfo(
        model=model,
        name=adapter.name,
        version=adapter.version,
        live=False,
        loaded=True,
        rank=adapter.rank,
        alpha=adapter.alpha,
        use_rslora=adapter.use_rslora,
        target_modules=modules,
        target_parameters=parameters,
        num_parameters=adapter.num_parameters(),
        path=str(path),
        base_digest=base_digest_of(path),
    )


def _stored_shape(directory: Path, targets: Mapping[str, LinearLike], config: PeftConfig) -> tuple[set[str], int]:
    """Targets and parameter count of a version, from the header of its file."""
    try:
        with safe_open(str(directory / WEIGHTS_NAME), framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{WEIGHTS_NAME}: cannot be read as safetensors: {error}") from error
    names = {target for target, _ in adapted_targets(shapes, targets, config).values()}
    return names, sum(torch.Size(shape).numel() for shape in shapes.values())
