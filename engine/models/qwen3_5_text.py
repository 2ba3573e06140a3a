"""Qwen3.5's language model: three gated delta-net layers to one of gated attention.

Source: transformers' ``models/qwen3_5``. What sets the family apart: layer kinds from the configuration; attention with
an output gate, norms of q and k, and rotation of a part of head_dim; norms by 1 + weight everywhere except within the
delta-net. Text positions are the same on all three axes of its rotary sections, so those fall together into one.

``mtp.*``, a drafting head that a checkpoint may carry, has no part in the language model and is passed over in loading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext
from engine.layers.attention import Attention
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.linear import Embedding, Linear
from engine.layers.mlp import GatedMLP
from engine.layers.moe import SparseMoE
from engine.layers.norm import RMSNorm
from engine.layers.rope import RotaryEmbedding
from engine.models.base import CausalLM, models, run_layer
from engine.quantization.base import SchemeMap


class Qwen3_5DecoderLayer(nn.Module):
    """A token mixer (``linear_attn`` or ``self_attn``) and an MLP, each on normalised input and added to the residual.

    Args:
        index: of the layer.
        kind_index: index among the layers of its kind, in the attention cache or the recurrent states.
    """

    def __init__(
        self, config: ModelConfig, index: int, kind_index: int, schemes: SchemeMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.is_linear = config.layer_types[index] == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config, f"{name}.linear_attn", kind_index, schemes, dtype)
        else:
            self.self_attn = Attention(config, f"{name}.self_attn", kind_index, schemes, dtype, shifted_norms=True)
        mlp = GatedMLP if config.moe is None else SparseMoE
        self.mlp = mlp(config, f"{name}.mlp", schemes, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)

    def forward(self, x: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D]: [T, D]."""
        normed = self.input_layernorm(x)
        x = x + (self.linear_attn(normed, ctx) if self.is_linear else self.self_attn(normed, ctx, cos, sin))
        return x + self.mlp(self.post_attention_layernorm(x), ctx)  # type: ignore[no-any-return]


class Qwen3_5TextModel(nn.Module):
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
        kinds = config.layer_types
        self.layers = nn.ModuleList(
            [Qwen3_5DecoderLayer(config, i, kinds[:i].count(kinds[i]), schemes, dtype) for i in range(len(kinds))]
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)
        rope = next(iter(config.rope.values()))
        self.rotary = RotaryEmbedding(rope, config.head_dim, config.max_position_embeddings)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [T]: [T, D]."""
        x = self.embed_tokens(token_ids)
        cos, sin = self.rotary.cos_sin(ctx)
        for layer in self.layers:
            x = run_layer(layer, x, ctx, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]


@models.register("qwen3_5_text")
class Qwen3_5ForCausalLM(CausalLM):
    """Parameters: see Qwen3_5TextModel; plus ``lm_head`` where the head is not tied to the embeddings."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.model = Qwen3_5TextModel(config, schemes, dtype)
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
        return self.config.layer_types.count("full_attention")

    @property
    def num_recurrent_layers(self) -> int:
        return self.config.layer_types.count("linear_attention")

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        return self.model(token_ids, ctx)  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        if self.lm_head is None:
            return self.model.embed_tokens.project(hidden).float()
        return self.lm_head.scheme.apply(self.lm_head, hidden).float()
