"""Reads and writes the ``quantization_config`` of compressed-tensors, which vLLM, transformers and others load.

Source: compressed-tensors 0.20, ``quantization/quant_config.py``, ``quant_scheme.py``, ``quant_args.py`` and
``utils/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import FormatError
from engine.quantization.base import UNQUANTIZED, LinearScheme, SchemeMap, quant_methods
from engine.quantization.int4 import GROUP_SIZES, Int4Grouped
from engine.quantization.int8 import Int8PerChannel

FORMAT_VERSION = "0.20.0"
"""Of the compressed-tensors release whose layout is written."""

ACCEPTED = (
    "8-bit int, strategy channel, symmetric (int-quantized or pack-quantized); "
    f"4-bit int, strategy group, group_size {', '.join(map(str, GROUP_SIZES))} (pack-quantized)"
)


@quant_methods.register("compressed-tensors")
class CompressedTensorsMap(SchemeMap):
    """Schemes by module name, from ``config_groups`` and ``ignore``.

    A target is a full module name, ``re:`` and a regular expression that matches from the start of the name, or the
    class ``Linear`` or ``Embedding``; the most specific one wins, in that order. Modules whose last name component
    contains "embed" are embeddings, all others are linear.

    Raises:
        FormatError: naming the key and value that is malformed or not supported; quantized activations and caches are
            not, as their results would differ from what the model was made for.
    """

    name = "compressed-tensors"

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(quantization_config)
        config = quantization_config or {}
        status = config.get("quantization_status", "compressed")
        if status != "compressed":
            raise _rejected("quantization_status", status, '"compressed"')
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
            value = config.get(key)
            if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
                raise _rejected(key, value, "null")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise _rejected("config_groups", groups, "a map of groups")
        self._targets: dict[str, LinearScheme] = {}
        for key, group in groups.items():
            where = f"config_groups.{key}"
            if not isinstance(group, Mapping):
                raise _rejected(where, group, "a map with targets and weights")
            scheme = _scheme(group, str(config.get("format")), where)
            for target in _strings(group.get("targets"), f"{where}.targets"):
                self._targets.setdefault(target, scheme)
        self._ignore = _strings(config.get("ignore") or [], "ignore")

    def for_module(self, name: str) -> LinearScheme:
        """See SchemeMap."""
        class_name = "Embedding" if "embed" in name.rsplit(".", 1)[-1] else "Linear"
        if any(_matches(name, class_name, pattern) for pattern in self._ignore):
            return UNQUANTIZED
        found = [target for target in self._targets if _matches(name, class_name, target)]
        found.sort(key=lambda target: (target != name, not target.startswith("re:")))
        return self._targets[found[0]] if found else UNQUANTIZED


def quantization_config(
    scheme: Int8PerChannel | Int4Grouped, ignore: Sequence[str], *, embeddings: bool
) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose linear modules all have ``scheme``, in pack-quantized format.

    Args:
        ignore: full names of linear and embedding modules that are kept as they were.
        embeddings: whether embeddings are quantized too.
    """
    if isinstance(scheme, Int4Grouped):
        weights = {"num_bits": 4, "strategy": "group", "group_size": scheme.group_size, "symmetric": scheme.symmetric}
    else:
        weights = {"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "version": FORMAT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear", "Embedding"] if embeddings else ["Linear"],
                "weights": {"type": "int", "dynamic": False, **weights},
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
    }


def _scheme(group: Mapping[str, Any], model_format: str, where: str) -> LinearScheme:
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise _rejected(f"{where}.{key}", group[key], "null: activations are never quantized")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _rejected(f"{where}.weights", weights, ACCEPTED)
    stored = group.get("format") or model_format
    if stored not in ("int-quantized", "pack-quantized"):
        raise _rejected(f"{where}.format", stored, '"int-quantized" or "pack-quantized"')
    if weights.get("dynamic"):
        raise _rejected(f"{where}.weights.dynamic", weights["dynamic"], "false")
    if weights.get("actorder") in ("group", "dynamic"):
        raise _rejected(f"{where}.weights.actorder", weights["actorder"], 'null or "weight"')
    num_bits, strategy = weights.get("num_bits", 8), weights.get("strategy")
    group_size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    if strategy is None and isinstance(group_size, int):
        strategy = "group" if group_size > 0 else "channel"
    if weights.get("type", "int") == "int" and isinstance(symmetric, bool):
        if num_bits == 8 and strategy == "channel" and symmetric:
            return Int8PerChannel("int-quantized" if stored == "int-quantized" else "pack-quantized")
        if num_bits == 4 and strategy == "group" and group_size in GROUP_SIZES and stored == "pack-quantized":
            return Int4Grouped(group_size, symmetric)
    raise _rejected(f"{where}.weights", {"format": stored, **weights}, ACCEPTED)


def _matches(name: str, class_name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, class_name)


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or any(not isinstance(entry, str) for entry in value):
        raise _rejected(where, value, "a list of names")
    for entry in value:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise FormatError(
                    f"quantization_config.{where}: {entry!r} is no regular expression: {error}"
                ) from error
    return list(value)


def _rejected(key: str, value: object, accepted: str) -> FormatError:
    return FormatError(f"quantization_config.{key} is {value}; accepted: {accepted}", field="quantization_config")
