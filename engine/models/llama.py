"""Llama 2 and 3, SmolLM2 and their kin.

Source: transformers' ``models/llama``; the sibling families differ by facts that ModelConfig holds (biases, norms of q
and k), and register themselves in files of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext, Stage
from engine.layers.attention import Attention
from engine.layers.linear import Embedding, Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rope import RotaryEmbedding
from engine.models.base import CausalLM, models, residual_stages, run_layer
from engine.ops.elementwise import add
from engine.quantization.base import SchemeMap


class DecoderLayer(nn.Module):
    """Attention and MLP, each on normalised input and added to the residual."""

    def __init__(self, config: ModelConfig, index: int, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        is_sliding = config.layer_types[index] == "sliding_attention"
        self.self_attn = Attention(
            config,
            f"{name}.self_attn",
            index,
            schemes,
            dtype,
            window=config.sliding_window if is_sliding else None,
        )
        self.mlp = GatedMLP(config, f"{name}.mlp", schemes, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)

    def stages(self, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> list[Stage]:
        """``forward`` in stages of one product or attention each."""
        return [
            *residual_stages(self.input_layernorm, self.self_attn.stages(ctx, cos, sin), add),
            *residual_stages(self.post_attention_layernorm, self.mlp.stages(ctx), add),
        ]

    def forward(self, x: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D]: [T, D]."""
        mixed = self.self_attn(self.input_layernorm(x), ctx, cos, sin)
        x, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return add(x, self.mlp(normed, ctx))


class LlamaModel(nn.Module):
    """Embeddings, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            name="model.embed_tokens",
            scheme=schemes.for_module("model.embed_tokens"),
            dtype=dtype,
        )
        self.layers = nn.ModuleList(
            [DecoderLayer(config, index, schemes, dtype) for index in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        rope = next(iter(config.rope.values()))  # one for all layers: these families have none per layer type
        self.rotary = RotaryEmbedding(rope, config.head_dim, config.max_position_embeddings)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [T]: [T, D]."""
        x = self.embed_tokens(token_ids)
        cos, sin = self.rotary.cos_sin(ctx)
        for layer in self.layers:
            x = run_layer(layer, x, ctx, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]


@models.register("llama")
class LlamaForCausalLM(CausalLM):
    """Parameters: see LlamaModel; plus ``lm_head`` where the head is not tied to the embeddings."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.model = LlamaModel(config, schemes, dtype)
        self.lm_head: Linear | None = None
        if config.has_own_head:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                name="lm_head",
                scheme=schemes.for_module("lm_head"),
                dtype=dtype,
                lora=False,
            )

    @property
    def num_attention_layers(self) -> int:
        return self.config.num_hidden_layers

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        return self.model(token_ids, ctx)  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        if self.lm_head is None:
            return self.model.embed_tokens.project(hidden).float()
        return self.lm_head.scheme.apply(self.lm_head, hidden).float()
