"""What a model is to the rest of the engine.

A model file registers a class per Hugging Face ``model_type``. Its parameters carry their Hugging Face names, so the
loader copies names without a map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext, Stage, State
from engine.layers.linear import Embedding, Linear
from engine.layers.mlp import GatedMLP
from engine.layers.moe import Experts
from engine.lora.targets import LinearLike
from engine.quantization.base import SchemeMap
from engine.registry import Registry


class Model(nn.Module, ABC):
    """A model over packed tokens. Shapes: T tokens, N chosen positions, D hidden size, V vocabulary.

    Attributes:
        optional_modules: children that a checkpoint may lack; where it has nothing of one, that becomes None.
    """

    config: ModelConfig
    optional_modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [T] int64: final hidden states [T, D], after the last norm."""

    def linears(self) -> dict[str, Linear]:
        """Full module name to every Linear that adapters may target, in order of depth."""
        return {m.name: m for m in self.modules() if isinstance(m, Linear) and m.lora}

    def lora_targets(self) -> dict[str, LinearLike]:
        """Full name to everything that adapters may target: those linears, and parameters of stacked experts."""
        return lora_targets(self)

    @property
    def max_input_tokens(self) -> int:
        """Longest sequence that the positions reach."""
        return self.config.max_position_embeddings

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of activations."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and p.dim() == 1)


def lora_targets(module: nn.Module) -> dict[str, LinearLike]:
    """Of a model or a part of one: full name to everything that adapters may target, in order of depth."""
    targets: dict[str, LinearLike] = {}
    for child in module.modules():
        if isinstance(child, Experts) and child.lora:
            targets.update(child.lora_targets())
        elif isinstance(child, Linear) and child.lora:
            targets[child.name] = child
    return targets


class CausalLM(Model):
    """A model that predicts the next token."""

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D]: logits [N, V] float32, soft cap applied."""

    def compute_logits_part(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """hidden [N, D]: columns [start, end) of ``compute_logits``, for a large vocabulary in parts."""
        head = self.head
        return self.cap_logits(head.scheme.apply_part(head, hidden, start, end).float())

    def cap_logits(self, logits: Tensor) -> Tensor:
        """What the family does to each logit behind its head."""
        return logits

    @property
    def head(self) -> Linear | Embedding:
        """What gives the logits: ``lm_head``, or the embeddings that it is tied to."""
        head = self._modules.get("lm_head") or self.get_submodule("model.embed_tokens")
        assert isinstance(head, Linear | Embedding)
        return head

    @property
    @abstractmethod
    def num_attention_layers(self) -> int:
        """Layers that need an attention cache."""

    @property
    def num_recurrent_layers(self) -> int:
        """Layers that carry a state from token to token."""
        return 0

    @property
    def num_mtp_layers(self) -> int:
        """Layers of a head for multi-token prediction that the checkpoint brought."""
        return 0


def residual_stages(norm: nn.Module, inner: Sequence[Stage], add: Callable[[Tensor, Tensor], Tensor]) -> list[Stage]:
    """add(x, inner(norm(x))) in as many stages as ``inner`` has, from (x,) to (y,).

    Args:
        inner: stages from (*rest, x) to (*rest, y), which hand on what stands before.
    """

    def enter(state: State) -> State:
        (x,) = state
        return inner[0]((x, norm(x)))

    stages = [enter, *inner[1:]]
    last = stages[-1]

    def leave(state: State) -> State:
        x, y = last(state)
        return (add(x, y),)

    return [*stages[:-1], leave]


def one_stage(run: Callable[[Tensor], Tensor]) -> list[Stage]:
    """What is not to be cut, for ``residual_stages``."""
    return [lambda state: (*state[:-1], run(state[-1]))]


def mlp_stages(mlp: nn.Module, ctx: ForwardContext) -> list[Stage]:
    """The products of an MLP one by one, or a mixture of experts as one stage, for ``residual_stages``."""
    return mlp.stages(ctx) if isinstance(mlp, GatedMLP) else one_stage(lambda x: mlp(x, ctx))


def run_layer(layer: nn.Module, x: Tensor, ctx: ForwardContext, *args: Tensor) -> Tensor:
    """layer(x, ctx, *args), in the way that the context has decoder layers run."""
    if ctx.run_layer is None:
        return layer(x, ctx, *args)  # type: ignore[no-any-return]
    return ctx.run_layer(layer, x, ctx, *args)


models: Registry[type[Model]] = Registry("model type", "engine.models")


def build_model(config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> Model:
    """The model of config.model_type with empty parameters on the meta device.

    Raises:
        InvalidArgumentError: the model type is not supported.
    """
    cls = models.get(config.model_type)
    with torch.device("meta"):
        return cls(config, schemes, dtype)  # type: ignore[call-arg]
