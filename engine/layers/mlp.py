"""The gated feed-forward block (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext, Stage, State
from engine.errors import FormatError
from engine.layers.linear import Linear
from engine.quantization.base import SchemeMap

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Hugging Face ``hidden_act`` to the function."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that Hugging Face name.

    Raises:
        FormatError: the name is not known.
    """
    if name not in ACTIVATIONS:
        raise FormatError(f"hidden_act is {name!r}; accepted: {', '.join(sorted(ACTIVATIONS))}", field="hidden_act")
    return ACTIVATIONS[name]


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)).

    Args:
        name: full module name, prefix of the projections' names.
        intermediate_size: None: the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        schemes: SchemeMap,
        dtype: torch.dtype,
        *,
        intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size

        def linear(suffix: str, in_features: int, out_features: int) -> Linear:
            full = f"{name}.{suffix}"
            return Linear(
                in_features,
                out_features,
                name=full,
                bias=config.mlp_bias,
                scheme=schemes.for_module(full),
                dtype=dtype,
            )

        self.gate_proj = linear("gate_proj", config.hidden_size, width)
        self.up_proj = linear("up_proj", config.hidden_size, width)
        self.down_proj = linear("down_proj", width, config.hidden_size)
        self.act = activation(config.hidden_act)

    def stages(self, ctx: ForwardContext) -> list[Stage]:
        """``forward`` in stages of one product each, from (x,) to (y,); what stands before these is handed on."""

        def gate(state: State) -> State:
            *rest, x = state
            return (*rest, x, self.gate_proj(x, ctx))

        def up(state: State) -> State:
            *rest, x, gated = state
            return (*rest, self.act(gated) * self.up_proj(x, ctx))

        def down(state: State) -> State:
            *rest, inner = state
            return (*rest, self.down_proj(inner, ctx))

        return [gate, up, down]

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        return self.down_proj(self.act(self.gate_proj(x, ctx)) * self.up_proj(x, ctx), ctx)  # type: ignore[no-any-return]
