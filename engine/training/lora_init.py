"""Which modules a new adapter targets, and what A and B begin as."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from engine.errors import InvalidArgumentError
from engine.jobs import LoRAParams
from engine.lora.adapter import Adapter
from engine.lora.peft import MAX_RANK, LinearLike, layer_index
from engine.training.seeds import derive_seed


def select_targets(linears: Mapping[str, LinearLike], lora: LoRAParams) -> list[str]:
    """Full names of the modules to adapt, in order of depth.

    Raises:
        InvalidArgumentError: a target or layer names nothing in the model.
    """
    for target in lora.target_modules:
        if not any(_is_target(name, target) for name in linears):
            accepted = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise InvalidArgumentError(
                f"target_modules has {target!r}; accepted: {accepted}", field="lora.target_modules"
            )
    layers = {layer_index(name) for name in linears} - {None}
    for layer in lora.layers:
        if layer not in layers:
            raise InvalidArgumentError(
                f"layers has {layer}; accepted: indices in [0, {len(layers) - 1}]", field="lora.layers"
            )
    chosen = [
        name
        for name in linears
        if (not lora.target_modules or any(_is_target(name, target) for target in lora.target_modules))
        and (not lora.layers or layer_index(name) in lora.layers)
    ]
    if not chosen:
        raise InvalidArgumentError(
            f"no module is both in target_modules {lora.target_modules} and in layers {lora.layers}",
            field="lora.target_modules",
        )
    return chosen


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


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


def _reject(name: str, value: object, accepted: str) -> None:
    raise InvalidArgumentError(f"{name} is {value}; accepted: {accepted}", field=f"lora.{name}")


def new_adapter(
    name: str, linears: Mapping[str, LinearLike], lora: LoRAParams, seed: int, device: torch.device | str
) -> Adapter:
    """An adapter whose update is zero, initialised as PEFT does it: A Kaiming-uniform with a = sqrt(5), B zero.

    The masters are float32 parameters that require gradients. They are drawn on the CPU, so that every device begins
    with the same ones.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_A"))
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in select_targets(linears, lora):
        linear = linears[module]
        a = torch.empty(lora.rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(linear.out_features, lora.rank)
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
