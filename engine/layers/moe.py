"""Mixture of experts with a shared expert, as Qwen3.5 has it (DeepSeekMoE: arXiv:2401.06066).

Source: transformers' ``models/qwen3_5_moe``. Shapes: T tokens, D hidden size, E experts, K experts of a token, I width
of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.lora.targets import StackedTarget
from engine.ops.elementwise import activation
from engine.ops.moe import grouped_linear
from engine.ops.norm import widen
from engine.quantization.base import SchemeMap


class Router(nn.Module):
    """Which experts a token takes, and with what weight.

    Args:
        normalize: the weights of a token's experts sum to 1.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, normalize: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype), requires_grad=False)
        self.top_k = top_k
        self.normalize = normalize

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D]: weights [T, K] in the type of x, and experts [T, K] int64."""
        # A rounding can change which experts are chosen, so autocast must not narrow what decides it.
        with torch.autocast(x.device.type, enabled=False):
            probs = widen(F.linear(x.to(self.weight.dtype), self.weight)).softmax(dim=-1)
        weights, experts = probs.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), experts


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate_up_proj [E, 2 I, D] (gate above up), down_proj [E, D, I].

    Args:
        name: full module name, prefix of the parameters' names as adapters know them.
        lora: whether adapters may target it.
    """

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        num_experts: int,
        width: int,
        dtype: torch.dtype,
        lora: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.lora = lora
        gate_up = torch.empty(num_experts, 2 * width, config.hidden_size, dtype=dtype)
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        down = torch.empty(num_experts, config.hidden_size, width, dtype=dtype)
        self.down_proj = nn.Parameter(down, requires_grad=False)
        self.num_experts = num_experts
        self.act = activation(config.hidden_act)

    def lora_targets(self) -> dict[str, StackedTarget]:
        """Full parameter name to shape of what adapters may target, in the order of the module's parameters."""
        shapes = {name: parameter.shape for name, parameter in self.named_parameters(recurse=False)}
        return {f"{self.name}.{name}": StackedTarget(e, i, o) for name, (e, o, i) in shapes.items()}

    def _project(self, name: str, x: Tensor, tokens: Tensor, counts: Tensor, ctx: ForwardContext) -> Tensor:
        """Rows x [M, ·], sorted by expert, through one of the parameters, with the updates of the batch's adapters."""
        y = grouped_linear(x, getattr(self, name), counts)
        if ctx.lora is not None and self.lora:
            y = ctx.lora.add_grouped(f"{self.name}.{name}", x, y, tokens, counts)
        return y

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D], weights and experts [T, K]: [T, D]."""
        num_tokens, top_k = experts.shape
        # Pairs of token and expert, sorted by expert, so that each expert's are one product.
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        # torch.bincount would have the host wait for the largest number, and no graph can hold that.
        counts = flat.new_zeros(self.num_experts).scatter_add_(0, flat, torch.ones_like(flat))
        tokens = order // top_k
        gate, up = self._project("gate_up_proj", x[tokens], tokens, counts, ctx).chunk(2, dim=-1)
        out = self._project("down_proj", self.act(gate) * up, tokens, counts, ctx)
        # Back in the order of tokens, so that a token's sum does not depend on what else is in the batch.
        out = torch.empty_like(out).index_copy(0, order, out).view(num_tokens, top_k, -1)
        return (out * weights[..., None]).sum(dim=1)


class SparseMoE(nn.Module):
    """Routed experts plus sigmoid(shared_expert_gate(x)) times the shared expert.

    Args:
        name: full module name, prefix of the linears' names.
    """

    def __init__(self, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.gate = Router(config.hidden_size, moe.num_experts, moe.num_experts_per_token, moe.normalize_top_k, dtype)
        self.experts = Experts(config, f"{name}.experts", moe.num_experts, moe.intermediate_size, dtype)
        self.shared_expert = GatedMLP(
            config, f"{name}.shared_expert", schemes, dtype, intermediate_size=moe.shared_intermediate_size
        )
        gate_name = f"{name}.shared_expert_gate"
        self.shared_expert_gate = Linear(
            config.hidden_size, 1, name=gate_name, scheme=schemes.for_module(gate_name), dtype=dtype
        )

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        weights, experts = self.gate(x)
        shared = self.shared_expert_gate(x, ctx).sigmoid() * self.shared_expert(x, ctx)
        return self.experts(x, weights, experts, ctx) + shared  # type: ignore[no-any-return]
