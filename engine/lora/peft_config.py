"""adapter_config.json of PEFT: what of it bears on the result, and the refusal of what is not supported.

What would change the result and is not implemented (DoRA, biases, fully trained modules …) is rejected by name, as is
any setting that is not known: a key of a later PEFT that changes the arithmetic must not pass unnoticed.

Source: github.com/huggingface/peft, ``LoraConfig``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import EngineError, FormatError, NotFoundError
from engine.lora.targets import ends_with, layer_index

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096

T = TypeVar("T")

_LITERAL = re.compile(r"\^?[A-Za-z0-9_.\-]+")

_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern", "target_modules",
    "target_parameters", "use_rslora",
}  # fmt: skip
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Keys that say where an adapter came from, or settings of variants that have a switch of their own."""

STACKED_SINCE = (0, 19, 0)
"""The version of PEFT that first laid out the factors of stacked experts as today: A of the input, B of the output."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights, so that A and B mean nothing over the original ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The part of an adapter_config.json that bears on the result.

    Attributes:
        target_modules: last components or full names; None where PEFT's regular expression stands: the tensors tell.
        target_parameters: ends of names, or full names, of parameters that hold stacked experts.
        layers: PEFT's layers_to_transform, of target_modules; empty: all.
        rank_pattern, alpha_pattern: target's name or its end, to what differs there.
        exclude_modules: whether some were excluded, so that not every target needs tensors.
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    target_modules: tuple[str, ...] | None
    target_parameters: tuple[str, ...] = ()
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
        """Whether the configuration says that this linear module has an update; True where it cannot be told."""
        if self.target_modules is None:
            return True
        if not any(ends_with(module, target) for target in self.target_modules):
            return False
        return not self.layers or layer_index(module) in self.layers

    def targets_parameter(self, name: str) -> bool:
        """Whether the configuration says that this parameter has an update."""
        return any(ends_with(name, target) for target in self.target_parameters)


def _matching(pattern: Mapping[str, T], module: str, default: T) -> T:
    # As in PEFT, the first key that matches holds. "^" anchors it at the beginning.
    for key, value in pattern.items():
        if module == key[1:] if key.startswith("^") else ends_with(module, key):
            return value
    return default


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
    parameters = _target_parameters(values.get("target_parameters"))
    dropout = _dropout(values.get("lora_dropout", 0.0))
    if parameters and dropout:
        _reject("lora_dropout", dropout, "0 with target_parameters, as in PEFT")
    if parameters and not _is_since(values.get("peft_version"), STACKED_SINCE):
        accepted = f"{dotted(STACKED_SINCE)} or later with target_parameters, whose factors were laid out otherwise"
        _reject("peft_version", values.get("peft_version"), accepted)
    return PeftConfig(
        rank=_rank("r", values.get("r")),
        alpha=_alpha("lora_alpha", values.get("lora_alpha")),
        use_rslora=use_rslora,
        dropout=dropout,
        target_modules=_target_modules(values.get("target_modules"), optional=bool(parameters)),
        target_parameters=parameters,
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


def _target_modules(value: Any, *, optional: bool) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return None  # a regular expression of the file's author: never run, the tensors tell
    if optional and (value is None or value == []):
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        _reject("target_modules", value, "a list of module names")
    return tuple(value)


def _is_since(version: Any, first: tuple[int, ...]) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) >= first[:2]


def dotted(version: tuple[int, ...]) -> str:
    """A version as it is written."""
    return ".".join(map(str, version))


def _target_parameters(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        _reject("target_parameters", value, "a list of parameter names")
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
