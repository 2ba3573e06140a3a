"""The gated feed-forward block (arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext, Stage, State
from engine.layers.joint import JointLinears
from engine.layers.linear import Linear
from engine.ops.elementwise import activation, gated_activation
from engine.quantization.base import SchemeMap


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
        self.gate_and_up = JointLinears(self.gate_proj, self.up_proj)
        activation(config.hidden_act)  # refuses what is not known
        self.activation = config.hidden_act

    def stages(self, ctx: ForwardContext) -> list[Stage]:
        """``forward`` in stages of one product each, from (x,) to (y,); what stands before these is handed on."""

        def gate(state: State) -> State:
            *rest, x = state
            return (*rest, x, self.gate_proj(x, ctx))

        def up(state: State) -> State:
            *rest, x, gated = state
            return (*rest, gated_activation(gated, self.up_proj(x, ctx), self.activation))

        def down(state: State) -> State:
            *rest, inner = state
            return (*rest, self.down_proj(inner, ctx))

        return [gate, up, down]

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        gate, up = self.gate_and_up(x, ctx)
        gated = gated_activation(gate, up, self.activation)
        return self.down_proj(gated, ctx)  # type: ignore[no-any-return]
