"""Which modules a new adapter targets, and what A and B begin as."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from engine.errors import InvalidArgumentError
from engine.jobs import LoRAParams
from engine.lora.adapter import Adapter
from engine.lora.peft_config import MAX_RANK
from engine.lora.targets import (
    LinearLike,
    StackedTarget,
    ends_with,
    layer_index,
    linear_names,
    module_kinds,
    parameter_kinds,
    parameter_names,
)
from engine.training.seeds import derive_seed

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear modules but the head."""


def select_targets(targets: Mapping[str, LinearLike], lora: LoRAParams) -> list[str]:
    """Full names of the modules and parameters to adapt, in order of depth.

    Raises:
        InvalidArgumentError: a target or layer names nothing in the model.
    """
    linears, parameters = linear_names(targets), parameter_names(targets)
    all_linear = lora.target_modules == [ALL_LINEAR] or not (lora.target_modules or lora.target_parameters)
    for target in () if all_linear else lora.target_modules:
        if not any(ends_with(name, target) for name in linears):
            raise InvalidArgumentError(
                f"target_modules has {target!r}; accepted: {', '.join(module_kinds(linears))}, or {ALL_LINEAR!r} alone",
                field="lora.target_modules",
            )
    for target in lora.target_parameters:
        if not any(ends_with(name, target) for name in parameters):
            accepted = ", ".join(parameter_kinds(parameters)) or "none, since the model has no stacked experts"
            raise InvalidArgumentError(
                f"target_parameters has {target!r}; accepted: {accepted}", field="lora.target_parameters"
            )
    layers = {layer_index(name) for name in targets} - {None}
    for layer in lora.layers:
        if layer not in layers:
            raise InvalidArgumentError(
                f"layers has {layer}; accepted: indices in [0, {len(layers) - 1}]", field="lora.layers"
            )
    chosen = {name for name in linears if all_linear or any(ends_with(name, end) for end in lora.target_modules)}
    chosen |= {name for name in parameters if any(ends_with(name, end) for end in lora.target_parameters)}
    if lora.layers:
        chosen = {name for name in chosen if layer_index(name) in lora.layers}
    if not chosen:
        wanted = f"target_modules {lora.target_modules}"
        if lora.target_parameters:
            wanted += f" or target_parameters {lora.target_parameters}"
        raise InvalidArgumentError(f"no module is both in {wanted} and in layers {lora.layers}", field="lora.layers")
    return [name for name in targets if name in chosen]


def validate_lora(lora: LoRAParams) -> None:
    """Checks rank, alpha and dropout.

    Raises:
        InvalidArgumentError: naming the field, its value and what is accepted.
    """
    if not 1 <= lora.rank <= MAX_RANK:
        _reject("rank", lora.rank, f"an integer in [1, {MAX_RANK}]")
    if not 0.0 < lora.alpha < math.inf:
        _reject("alpha", lora.alpha, "a finite number above 0")
    if not 0.0 <= lora.dropout < 1.0:
        _reject("dropout", lora.dropout, "a number in [0, 1)")
    if lora.dropout and lora.target_parameters:
        _reject("dropout", lora.dropout, "0 with target_parameters, as in PEFT")


def _reject(name: str, value: object, accepted: str) -> None:
    raise InvalidArgumentError(f"{name} is {value}; accepted: {accepted}", field=f"lora.{name}")


def new_adapter(
    name: str, targets: Mapping[str, LinearLike], lora: LoRAParams, seed: int, device: torch.device | str
) -> Adapter:
    """An adapter whose update is zero, initialised as PEFT does it: A Kaiming-uniform with a = sqrt(5), B zero.

    The masters are float32 parameters that require gradients. They are drawn on the CPU, so that every device begins
    with the same ones.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_A"))
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in select_targets(targets, lora):
        target = targets[module]
        experts = (target.num_experts,) if isinstance(target, StackedTarget) else ()
        # As wide as the input of each expert, so that their bound is that of a linear module.
        a = torch.empty(math.prod(experts) * lora.rank, target.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        a = a.view(*experts, lora.rank, target.in_features)
        b = torch.zeros(*experts, target.out_features, lora.rank)
        modules[module] = (nn.Parameter(a.to(device)), nn.Parameter(b.to(device)))
    return Adapter(
        name=name,
        version=0,
        rank=lora.rank,
        alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        modules=modules,
        dropout=lora.dropout,
    )


def masters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Name to parameter of everything that is trained: "<module>.lora_A" and "<module>.lora_B"."""
    named: dict[str, nn.Parameter] = {}
    for module, (a, b) in adapter.modules.items():
        assert isinstance(a, nn.Parameter)
        assert isinstance(b, nn.Parameter)
        named[f"{module}.lora_A"], named[f"{module}.lora_B"] = a, b
    return named
