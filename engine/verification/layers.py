"""Whole layers as functions for the gradient checker: of their input and of the adapters of a mixed batch.

Shapes: T packed tokens, D hidden size, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import packed_context
from engine.lora.adapter import Adapter, LoRABatch
from engine.lora.targets import StackedTarget
from engine.models.base import CausalLM, Model, lora_targets
from engine.training.seeds import derive_seed

RANKS = (2, 1)
"""Of the adapters; the first sequence has the first one, the second none, the third the second one, and so on."""

ALPHA = 3.0

Tensors = Mapping[str, Tensor]


@dataclass(slots=True)
class LayerProblem:
    """One layer on packed sequences, some with an adapter and some on the base, in float64.

    Attributes:
        kind: what sets it apart from the other layers of its model.
        layer: called with x, a context, and ``rest``.
        inputs: "x" [T, D]; and for each adapter i and each of the layer's targets "i.<name>.lora_A" and ".lora_B",
            none of them zero.
        rest: further tensors that the layer takes: cos and sin of the rotation.
        lengths: of the sequences.
        causal: False for encoders.
    """

    kind: str
    layer: nn.Module
    inputs: dict[str, Tensor]
    rest: tuple[Tensor, ...]
    lengths: list[int]
    causal: bool = True
    ranks: Sequence[int] = field(default=RANKS)

    def __call__(self, inputs: Tensors) -> Tensor:
        """The layer's output [T, D]."""
        adapters = self.adapters(inputs)
        starts = [sum(self.lengths[:s]) for s in range(len(self.lengths) + 1)]
        segments = [
            (adapters[which], starts[s], starts[s + 1])
            for s in range(len(self.lengths))
            if (which := self.adapter_of(s)) is not None
        ]
        lora = LoRABatch(segments, starts[-1]) if segments else None
        out: Tensor = self.layer(inputs["x"], packed_context(self.lengths, lora=lora, causal=self.causal), *self.rest)
        return out

    def adapter_of(self, sequence: int) -> int | None:
        """Which adapter a sequence has."""
        if not self.ranks:
            return None
        turns: list[int | None] = [0, None, *range(1, len(self.ranks))]
        return turns[sequence % len(turns)]

    def adapters(self, inputs: Tensors) -> list[Adapter]:
        """Those that ``inputs`` describes."""
        found = []
        for i, rank in enumerate(self.ranks):
            modules = {
                name: (inputs[f"{i}.{name}.lora_A"], inputs[f"{i}.{name}.lora_B"]) for name in lora_targets(self.layer)
            }
            found.append(Adapter(name=str(i), version=1, rank=rank, alpha=ALPHA + i, modules=modules))
        return found


def layer_problem(
    kind: str,
    layer: nn.Module,
    x: Tensor,
    rest: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    causal: bool = True,
    ranks: Sequence[int] = RANKS,
    seed: int = 0,
) -> LayerProblem:
    """A copy of the layer in float64, with random adapters of a strength that shows beside its weights.

    Args:
        x: [T, D], its input.
    """
    # The base keeps its values whatever it is stored as: narrow weights are made wide in the type of x.
    wide = copy.deepcopy(layer, _configs(layer)).double()
    inputs = {"x": x.detach().double()}
    generator = torch.Generator().manual_seed(derive_seed(seed, "verify lora"))

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    for i, rank in enumerate(ranks):
        for name, target in lora_targets(wide).items():
            stacked = (target.num_experts,) if isinstance(target, StackedTarget) else ()
            inputs[f"{i}.{name}.lora_A"] = random(*stacked, rank, target.in_features) / target.in_features**0.5
            inputs[f"{i}.{name}.lora_B"] = 0.3 * random(*stacked, target.out_features, rank)
    return LayerProblem(kind, wide, inputs, tuple(t.detach().double() for t in rest), list(lengths), causal, ranks)


def _configs(layer: nn.Module) -> dict[int, object]:
    """What a copy of the layer shares with it (its read-only maps cannot be copied)."""
    values = (value for module in layer.modules() for value in vars(module).values())
    return {id(value): value for value in values if isinstance(value, ModelConfig)}


def decoder_layers(model: Model) -> list[tuple[str, nn.Module]]:
    """Name and module of a model's layers, in order: the list of modules as long as the configuration says."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    raise AssertionError(f"{model.config.model_type} has no list of its layers")


def layer_kind(model: Model, index: int) -> str:
    """What a layer is, by the configuration: layers of one kind differ in weights alone."""
    config = model.config
    if not isinstance(model, CausalLM):
        return "encoder layer"
    mixer = config.layer_types[index] if config.layer_types else "full_attention"
    return f"{mixer}, {'mixture of experts' if config.moe is not None else 'MLP'}"


def first_of_each_kind(model: Model) -> dict[str, int]:
    """Kind to index of the first layer of that kind."""
    found: dict[str, int] = {}
    for index in range(model.config.num_hidden_layers):
        found.setdefault(layer_kind(model, index), index)
    return found


class Recorder:
    """What some modules take and give in forwards while the context is open.

    Attributes:
        taken: index of the module to its tensor arguments.
        given: index of the module to its outputs, one per forward.
    """

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self._modules = modules
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.taken: dict[int, list[Tensor]] = {}
        self.given: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Recorder:
        for index, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[object, ...], out: object) -> None:
            self.taken[index] = [arg.detach() for arg in args if isinstance(arg, Tensor)]
            first = out[0] if isinstance(out, tuple) else out
            assert isinstance(first, Tensor)
            self.given.setdefault(index, []).append(first.detach().flatten(0, -2))

        return record
