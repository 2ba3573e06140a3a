"""What of a model adapters may target, and PEFT's names for it.

Linear modules are targets by themselves (PEFT's target_modules). Experts that a model keeps stacked in one parameter
are targets by the name of that parameter (PEFT's target_parameters): one low-rank update per expert.

Source: github.com/huggingface/peft, ``tuners/lora/layer.py`` (ParamWrapper) and ``BaseTuner._inject_parameters``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


class LinearLike(Protocol):
    """What is asked of a target: a linear module, or a StackedTarget."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StackedTarget:
    """A parameter [num_experts, out_features, in_features]: a matrix for each expert."""

    num_experts: int
    in_features: int
    out_features: int


def layer_index(name: str) -> int | None:
    """Index of the layer that a target belongs to."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def ends_with(name: str, end: str) -> bool:
    """Whether a full name is ``end`` or ends in its components: how PEFT matches names."""
    return name == end or name.endswith(f".{end}")


def linear_names(targets: Mapping[str, LinearLike]) -> list[str]:
    """Those that target_modules may name."""
    return [name for name, target in targets.items() if not isinstance(target, StackedTarget)]


def parameter_names(targets: Mapping[str, LinearLike]) -> list[str]:
    """Those that target_parameters may name."""
    return [name for name, target in targets.items() if isinstance(target, StackedTarget)]


def module_kinds(names: Iterable[str]) -> list[str]:
    """What target_modules calls linear modules of all layers: last components ("q_proj")."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def parameter_kinds(names: Iterable[str]) -> list[str]:
    """What target_parameters calls parameters of all layers: what follows the layer ("mlp.experts.down_proj")."""
    return sorted({_LAYER.split(name)[-1] for name in names})


def kinds(names: Collection[str], targets: Mapping[str, LinearLike]) -> tuple[list[str], list[str]]:
    """target_modules and target_parameters of an adapter, without the layers."""
    stacked = set(parameter_names(targets))
    return module_kinds(n for n in names if n not in stacked), parameter_kinds(n for n in names if n in stacked)


def stored_paths(names: Iterable[str], targets: Mapping[str, LinearLike]) -> dict[str, str]:
    """Path of each target's factors in a PEFT file.

    That of a linear module is its name. For a parameter PEFT wraps the module that has it, and once more for each
    further one that is targeted there, in the order of the module's parameters: the last one's factors are under the
    module's name, those before it each a ".base_layer" further in.

    Args:
        targets: parameters of a module in the module's order.
    """
    chosen = set(names)
    paths: dict[str, str] = {}
    wrapped: dict[str, int] = {}
    for name in reversed(list(targets)):
        if name in chosen:
            paths[name] = name
            if isinstance(targets[name], StackedTarget):
                module = name.rpartition(".")[0]
                paths[name] = module + ".base_layer" * wrapped.get(module, 0)
                wrapped[module] = wrapped.get(module, 0) + 1
    return paths


def describe_targets(modules: Iterable[str], linears: Iterable[str]) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that select exactly these linear modules.

    Returns: last components and None; or those and layer indices; or, for an irregular choice, full names and None.
    """
    chosen, all_names = set(modules), list(linears)
    suffixes = module_kinds(chosen)
    selected = {module for module in all_names if module.rsplit(".", 1)[-1] in suffixes}
    if selected == chosen:
        return suffixes, None
    layers = sorted({index for module in chosen if (index := layer_index(module)) is not None})
    if {module for module in selected if layer_index(module) in layers} == chosen:
        return suffixes, layers
    return sorted(chosen), None


def describe_parameters(chosen: Collection[str], parameters: Iterable[str]) -> list[str]:
    """target_parameters that select exactly these: names without the layers, or full names, since layers_to_transform
    does not bear on parameters."""
    short = parameter_kinds(chosen)
    selected = {name for name in parameters if any(ends_with(name, kind) for kind in short)}
    return short if selected == set(chosen) else sorted(chosen)
