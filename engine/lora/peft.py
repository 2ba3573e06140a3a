"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

Rank and alpha are read from the configuration (engine.lora.peft_config); which modules an adapter has is read from its
tensors and checked against the model and the configuration.

Source: github.com/huggingface/peft, ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.durable import sync, write_synced
from engine.errors import EngineError, FormatError, NotFoundError, ShapeError
from engine.lora.adapter import Adapter
from engine.lora.peft_config import CONFIG_NAME, STACKED_SINCE, PeftConfig, dotted, read_config
from engine.lora.targets import (
    LinearLike,
    StackedTarget,
    describe_parameters,
    describe_targets,
    ends_with,
    linear_names,
    module_kinds,
    parameter_kinds,
    parameter_names,
    stored_paths,
)

WEIGHTS_NAME = "adapter_model.safetensors"

BASE_DIGEST_KEY = "base_weights_digest"
"""In the metadata of the tensors: weights_digest of the model that the adapter belongs to. PEFT passes over it."""

MAX_WEIGHTS_BYTES = 4 << 30

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.weight")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# -------------------------------------------------------------------------------------------------------------- reading


def load_adapter(
    directory: Path,
    targets: Mapping[str, LinearLike],
    *,
    name: str,
    version: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Reads an adapter and checks it against the model.

    Args:
        targets: full name to everything that adapters may target.
        dtype: of A and B in memory; None: as stored.
    Raises:
        NotFoundError: a file is missing.
        FormatError: a file is malformed, or asks for what is not supported; names the key or tensor.
        ShapeError: a tensor has another shape than the target and the rank require.
    """
    config = read_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME, device, dtype)
    modules = _pair(tensors, targets, config)
    adapter = Adapter(
        name=name,
        version=version,
        rank=config.rank,
        alpha=config.alpha,
        use_rslora=config.use_rslora,
        modules={target: modules[target] for target in targets if target in modules},
    )
    adapter.alphas = {m: alpha for m in adapter.modules if (alpha := config.alpha_of(m)) != config.alpha}
    return adapter


def _read_tensors(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; accepted: a PEFT adapter directory with safetensors", field="path")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise FormatError(f"{WEIGHTS_NAME}: {path.stat().st_size} bytes; accepted: at most {MAX_WEIGHTS_BYTES}")
    tensors = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if (stored := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise FormatError(f"{WEIGHTS_NAME}: tensor {name!r} is {stored}; accepted: {', '.join(_DTYPES)}")
                value = file.get_tensor(name)
                if not bool(torch.isfinite(value).all()):
                    raise FormatError(f"{WEIGHTS_NAME}: tensor {name!r} has values that are not finite")
                # A copy: a view of the map would change or fault with the file.
                tensors[name] = torch.empty(value.shape, dtype=dtype or value.dtype, device=device).copy_(value)
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, EngineError):
            raise
        raise FormatError(f"{WEIGHTS_NAME}: cannot be read as safetensors: {error}") from error
    return tensors


def adapted_targets(
    tensor_names: Iterable[str], targets: Mapping[str, LinearLike], config: PeftConfig
) -> dict[str, tuple[str, str]]:
    """Tensor name to the target that it is of, and to which factor: "lora_A" or "lora_B".

    Raises:
        FormatError: a tensor is of no target of the model, or of one that the configuration leaves out.
    """
    stacked = [name for name in parameter_names(targets) if config.targets_parameter(name)]
    paths = {path: name for name, path in stored_paths([*linear_names(targets), *stacked], targets).items()}
    found = {}
    for tensor_name in tensor_names:
        match = _TENSOR.fullmatch(tensor_name)
        if match is None:
            raise FormatError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} is no low-rank factor; accepted: "
                f"{_PREFIX}<module>.lora_A.weight and …lora_B.weight"
            )
        path = match["module"]
        target = paths.get(path)
        if target is None:
            wrapped = path.removesuffix(".base_layer")
            if any(name.rpartition(".")[0] == wrapped for name in parameter_names(targets)):
                raise FormatError(
                    f"{WEIGHTS_NAME}: tensor {tensor_name!r} is for a parameter of {wrapped!r} beyond those that "
                    f"target_parameters of {CONFIG_NAME} has: {', '.join(config.target_parameters) or 'none'}"
                )
            raise FormatError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} is for {path!r}, which is no adaptable linear module of the "
                f"model; accepted: {_some(linear_names(targets))}"
            )
        if not isinstance(targets[target], StackedTarget) and not config.targets(target):
            raise FormatError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} is for {target!r}, which target_modules and "
                f"layers_to_transform of {CONFIG_NAME} leave out"
            )
        found[tensor_name] = (target, match["factor"])
    return found


def _pair(
    tensors: Mapping[str, Tensor], targets: Mapping[str, LinearLike], config: PeftConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each target, checked, in the shapes of Adapter.modules."""
    factors: dict[str, dict[str, Tensor]] = {}
    for tensor_name, (name, factor) in adapted_targets(tensors, targets, config).items():
        target, rank, value = targets[name], config.rank_of(name), tensors[tensor_name]
        rows = rank * target.num_experts if isinstance(target, StackedTarget) else rank
        expected = (rows, target.in_features) if factor == "lora_A" else (target.out_features, rows)
        if tuple(value.shape) != expected:
            raise ShapeError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} has shape {list(value.shape)}; accepted: {list(expected)}"
            )
        if isinstance(target, StackedTarget):
            value = unstack(factor, value, target.num_experts)
        factors.setdefault(name, {})[factor] = value
    paths = stored_paths(factors, targets)
    for name, pair in factors.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in pair:
                raise FormatError(f"{WEIGHTS_NAME}: lacks tensor '{_PREFIX}{paths[name]}.{factor}.weight'")
    if not factors:
        raise FormatError(f"{WEIGHTS_NAME}: holds no tensors; accepted: at least one module's")
    _check_complete(factors, targets, config)
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in factors.items()}


def unstack(factor: str, value: Tensor, num_experts: int) -> Tensor:
    """PEFT's A [E r, I] or B [O, r E] of stacked experts: A [E, r, I] or B [E, O, r]. The expert varies slowest in the
    rows of A and fastest in the columns of B."""
    if factor == "lora_A":
        return value.view(num_experts, -1, value.shape[1])
    return value.view(value.shape[0], -1, num_experts).permute(2, 0, 1).contiguous()


def stack(factor: str, value: Tensor) -> Tensor:
    """The inverse of unstack; what is not of stacked experts stays as it is."""
    if value.dim() == 2:
        return value
    if factor == "lora_A":
        return value.flatten(0, 1)
    return value.permute(1, 2, 0).flatten(1)


def _check_complete(factors: Mapping[str, Any], targets: Mapping[str, LinearLike], config: PeftConfig) -> None:
    """That no tensor is missing of what the configuration targets: half an adapter must not pass for a whole one."""
    linears, parameters = linear_names(targets), parameter_names(targets)
    wanted = [name for name in parameters if config.targets_parameter(name)]
    for target in config.target_parameters:
        if not any(ends_with(name, target) for name in parameters):
            raise FormatError(
                f"{CONFIG_NAME}: target_parameters has {target!r}, which is no adaptable parameter of the model; "
                f"accepted: {', '.join(parameter_kinds(parameters)) or 'none, since it has no stacked experts'}",
                field="target_parameters",
            )
    if config.target_modules is not None and not config.exclude_modules:
        for target in config.target_modules:
            if not any(ends_with(module, target) for module in linears):
                raise FormatError(
                    f"{CONFIG_NAME}: target_modules has {target!r}, which is no adaptable linear module of the model; "
                    f"accepted: {', '.join(module_kinds(linears))}",
                    field="target_modules",
                )
        wanted += [module for module in linears if config.targets(module)]
    paths = stored_paths({*wanted, *factors}, targets)
    for name in wanted:
        if name not in factors:
            raise FormatError(
                f"{WEIGHTS_NAME}: lacks tensor '{_PREFIX}{paths[name]}.lora_A.weight', which {CONFIG_NAME} targets"
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" … ({len(listed)} in all)" if len(listed) > 4 else "")


# -------------------------------------------------------------------------------------------------------------- writing


def save_adapter(
    directory: Path, adapter: Adapter, targets: Mapping[str, LinearLike], *, base_model: str, base_digest: str = ""
) -> None:
    """Writes an adapter so that ``PeftModel.from_pretrained`` loads it; the files are on the disk when this returns.

    Args:
        directory: exists; atomicity is the caller's, who renames it.
        targets: everything adaptable of the model, from which the shortest description is found.
        base_model: for base_model_name_or_path.
        base_digest: of the base weights; "": not known.
    """
    stacked = [name for name in parameter_names(targets) if name in adapter.modules]
    modules, layers = describe_targets(set(adapter.modules).difference(stacked), linear_names(targets))
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": modules,
        "target_parameters": describe_parameters(stacked, parameter_names(targets)) or None,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {m: rank for m in adapter.modules if (rank := adapter.rank_of(m)) != adapter.rank},
        "alpha_pattern": dict(adapter.alphas),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    if stacked:
        values["peft_version"] = dotted(STACKED_SINCE)
    tensors = {}
    for name, path in stored_paths(adapter.modules, targets).items():
        for factor, value in zip(("lora_A", "lora_B"), adapter.modules[name], strict=True):
            flat = stack(factor, value.detach()).to("cpu", torch.float32)
            tensors[f"{_PREFIX}{path}.{factor}.weight"] = flat.contiguous()
    write_synced(directory / CONFIG_NAME, json.dumps(values, indent=2) + "\n")
    metadata = {"format": "pt"} | ({BASE_DIGEST_KEY: base_digest} if base_digest else {})
    save_file(tensors, str(directory / WEIGHTS_NAME), metadata=metadata)
    sync(directory / WEIGHTS_NAME)
