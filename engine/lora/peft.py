"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

Rank and alpha are read from the configuration; which modules an adapter has is read from its tensors and checked
against the model. What would change the result and is not implemented (DoRA, biases, fully trained modules …) is
rejected by name, as is any setting that is not known: a key of a later PEFT that changes the arithmetic must not pass
unnoticed.

Source: github.com/huggingface/peft, ``LoraConfig`` and ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import EngineError, FormatError, NotFoundError, ShapeError
from engine.lora.adapter import Adapter

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

BASE_DIGEST_KEY = "base_weights_digest"
"""In the metadata of the tensors: weights_digest of the model that the adapter belongs to. PEFT passes over it."""

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_RANK = 4096

T = TypeVar("T")

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_LITERAL = re.compile(r"\^?[A-Za-z0-9_.\-]+")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Keys that say where an adapter came from, or settings of variants that have a switch of their own."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights, so that A and B mean nothing over the original ones."""


class LinearLike(Protocol):
    """What is asked of a linear module."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The part of an adapter_config.json that bears on the result.

    Attributes:
        target_modules: last components or full names; None where PEFT's regular expression stands: the tensors tell.
        layers: PEFT's layers_to_transform; empty: all.
        rank_pattern, alpha_pattern: module name or its end, to what differs there.
        exclude_modules: whether some were excluded, so that not every target needs tensors.
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    target_modules: tuple[str, ...] | None
    layers: tuple[int, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: bool = False

    def rank_of(self, module: str) -> int:
        """Rank of a module."""
        return _matching(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module."""
        return _matching(self.alpha_pattern, module, self.alpha)

    def targets(self, module: str) -> bool:
        """Whether the configuration says that this module has an update; True where it cannot be told."""
        if self.target_modules is None:
            return True
        if not any(_ends_with(module, target) for target in self.target_modules):
            return False
        return not self.layers or layer_index(module) in self.layers


def layer_index(module: str) -> int | None:
    """Index of the layer that a module belongs to."""
    match = _LAYER.search(module)
    return None if match is None else int(match[1])


def _ends_with(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _matching(pattern: Mapping[str, T], module: str, default: T) -> T:
    # As in PEFT, the first key that matches holds. "^" anchors it at the beginning.
    for key, value in pattern.items():
        if module == key[1:] if key.startswith("^") else _ends_with(module, key):
            return value
    return default


# -------------------------------------------------------------------------------------------------------------- reading


def read_config(directory: Path) -> PeftConfig:
    """Reads and checks adapter_config.json.

    Raises:
        NotFoundError: there is none.
        FormatError: naming the key, its value, and what would be accepted.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; accepted: a PEFT adapter directory", field="path")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FormatError(f"{CONFIG_NAME}: {path.stat().st_size} bytes; accepted: at most {MAX_CONFIG_BYTES}")
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, EngineError):
            raise
        raise FormatError(f"{CONFIG_NAME}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{CONFIG_NAME}: holds a JSON {type(values).__name__}; accepted: an object")
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> PeftConfig:
    """Checks the contents of an adapter_config.json.

    Raises:
        FormatError: naming the key, its value, and what would be accepted.
    """
    if values.get("peft_type") != "LORA":
        _reject("peft_type", values.get("peft_type"), "LORA")
    if values.get("bias", "none") != "none":
        _reject("bias", values["bias"], "none; trained biases are not supported")
    for key in sorted(set(values) - _READ - _NEUTRAL):
        if values[key]:
            _reject(key, values[key], "unset; this variant of LoRA is not supported")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        _reject("init_lora_weights", init, "an initialisation that leaves the base weights as they are")
    use_rslora = values.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        _reject("use_rslora", use_rslora, "true or false")
    return PeftConfig(
        rank=_rank("r", values.get("r")),
        alpha=_alpha("lora_alpha", values.get("lora_alpha")),
        use_rslora=use_rslora,
        dropout=_dropout(values.get("lora_dropout", 0.0)),
        target_modules=_target_modules(values.get("target_modules")),
        layers=_layers(values),
        rank_pattern={k: _rank(f"rank_pattern.{k}", v) for k, v in _pattern("rank_pattern", values).items()},
        alpha_pattern={k: _alpha(f"alpha_pattern.{k}", v) for k, v in _pattern("alpha_pattern", values).items()},
        exclude_modules=bool(values.get("exclude_modules")),
    )


def _reject(key: str, value: object, accepted: str) -> None:
    raise FormatError(f"{CONFIG_NAME}: {key} is {repr(value)[:200]}; accepted: {accepted}", field=key)


def _rank(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        _reject(key, value, f"an integer in [1, {MAX_RANK}]")
    return int(value)


def _alpha(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1e9:  # NaN fails
        _reject(key, value, "a number above 0")
    return float(value)


def _dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        _reject("lora_dropout", value, "a number in [0, 1)")
    return float(value)


def _target_modules(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return None  # a regular expression of the file's author: never run, the tensors tell
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        _reject("target_modules", value, "a list of module names")
    return tuple(value)


def _layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    value = values.get("layers_to_transform")
    if value is None:
        return ()
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in given):
        _reject("layers_to_transform", value, "a list of layer indices")
    return tuple(given)


def _pattern(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        _reject(key, value, "an object of module names")
    for name in value:
        if not _LITERAL.fullmatch(name):
            _reject(key, name, "module names or their ends; regular expressions are not supported")
    return dict(value)


def load_adapter(
    directory: Path,
    linears: Mapping[str, LinearLike],
    *,
    name: str,
    version: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Reads an adapter and checks it against the model.

    Args:
        linears: full module name to the linear modules that adapters may target.
        dtype: of A and B in memory; None: as stored.
    Raises:
        NotFoundError: a file is missing.
        FormatError: a file is malformed, or asks for what is not supported; names the key or tensor.
        ShapeError: a tensor has another shape than the module and the rank require.
    """
    config = read_config(directory)
    tensors = _read_tensors(directory / WEIGHTS_NAME, device, dtype)
    modules = _pair(tensors, linears, config)
    adapter = Adapter(
        name=name,
        version=version,
        rank=config.rank,
        alpha=config.alpha,
        use_rslora=config.use_rslora,
        modules={module: modules[module] for module in linears if module in modules},
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


def _pair(
    tensors: Mapping[str, Tensor], linears: Mapping[str, LinearLike], config: PeftConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module, checked."""
    factors: dict[str, dict[str, Tensor]] = {}
    for tensor_name, value in tensors.items():
        match = _TENSOR.fullmatch(tensor_name)
        if match is None:
            raise FormatError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} is no low-rank factor; accepted: "
                f"{_PREFIX}<module>.lora_A.weight and …lora_B.weight"
            )
        module = match["module"]
        if module not in linears:
            raise FormatError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} is for {module!r}, which is no adaptable linear module of the "
                f"model; accepted: {_some(linears)}"
            )
        if not config.targets(module):
            raise FormatError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} is for {module!r}, which target_modules and "
                f"layers_to_transform of {CONFIG_NAME} leave out"
            )
        linear, rank = linears[module], config.rank_of(module)
        expected = (rank, linear.in_features) if match["factor"] == "lora_A" else (linear.out_features, rank)
        if tuple(value.shape) != expected:
            raise ShapeError(
                f"{WEIGHTS_NAME}: tensor {tensor_name!r} has shape {list(value.shape)}; accepted: {list(expected)}"
            )
        factors.setdefault(module, {})[match["factor"]] = value
    for module, pair in factors.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in pair:
                raise FormatError(f"{WEIGHTS_NAME}: lacks tensor '{_PREFIX}{module}.{factor}.weight'")
    if not factors:
        raise FormatError(f"{WEIGHTS_NAME}: holds no tensors; accepted: at least one module's")
    _check_complete(factors, linears, config)
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in factors.items()}


def _check_complete(factors: Mapping[str, Any], linears: Mapping[str, LinearLike], config: PeftConfig) -> None:
    """That no tensor is missing of what the configuration targets: half an adapter must not pass for a whole one."""
    if config.target_modules is None or config.exclude_modules:
        return
    for target in config.target_modules:
        if not any(_ends_with(module, target) for module in linears):
            raise FormatError(
                f"{CONFIG_NAME}: target_modules has {target!r}, which is no adaptable linear module of the model; "
                f"accepted: {', '.join(sorted({module.rsplit('.', 1)[-1] for module in linears}))}",
                field="target_modules",
            )
    for module in linears:
        if config.targets(module) and module not in factors:
            raise FormatError(
                f"{WEIGHTS_NAME}: lacks tensor '{_PREFIX}{module}.lora_A.weight', which {CONFIG_NAME} targets"
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" … ({len(listed)} in all)" if len(listed) > 4 else "")


# -------------------------------------------------------------------------------------------------------------- writing


def save_adapter(
    directory: Path, adapter: Adapter, linears: Iterable[str], *, base_model: str, base_digest: str = ""
) -> None:
    """Writes an adapter so that ``PeftModel.from_pretrained`` loads it; the files are on the disk when this returns.

    Args:
        directory: exists; atomicity is the caller's, who renames it.
        linears: names of all adaptable modules of the model, from which the shortest description is found.
        base_model: for base_model_name_or_path.
        base_digest: of the base weights; "": not known.
    """
    targets, layers = describe_targets(adapter.modules, linears)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {m: a.shape[0] for m, (a, _) in adapter.modules.items() if a.shape[0] != adapter.rank},
        "alpha_pattern": dict(adapter.alphas),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    tensors = {}
    for module, (a, b) in adapter.modules.items():
        for factor, value in (("lora_A", a), ("lora_B", b)):
            tensors[f"{_PREFIX}{module}.{factor}.weight"] = value.detach().to("cpu", torch.float32).contiguous()
    write_synced(directory / CONFIG_NAME, (json.dumps(values, indent=2) + "\n").encode())
    metadata = {"format": "pt"} | ({BASE_DIGEST_KEY: base_digest} if base_digest else {})
    save_file(tensors, str(directory / WEIGHTS_NAME), metadata=metadata)
    sync_file(directory / WEIGHTS_NAME)


def describe_targets(modules: Iterable[str], linears: Iterable[str]) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that select exactly these modules.

    Returns: last components and None; or those and layer indices; or, for an irregular choice, full names and None.
    """
    chosen, all_names = set(modules), list(linears)
    suffixes = sorted({module.rsplit(".", 1)[-1] for module in chosen})
    selected = {module for module in all_names if module.rsplit(".", 1)[-1] in suffixes}
    if selected == chosen:
        return suffixes, None
    layers = sorted({index for module in chosen if (index := layer_index(module)) is not None})
    if {module for module in selected if layer_index(module) in layers} == chosen:
        return suffixes, layers
    return sorted(chosen), None


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
