"""Gemma 3's language model (arXiv:2503.19786).

Source: transformers' ``models/gemma3``. What sets the family apart from Llama: sliding and full layers with a rotary
base each, norms of q and k, norms after as well as before attention and MLP, all of them by 1 + weight, token
embeddings times sqrt(hidden_size), scores scaled by ``query_pre_attn_scalar`` in place of head_dim, and a GELU gate.

``attn_logit_softcapping`` is applied where the configuration has it, as Gemma 2 does; transformers' Gemma 3 reads the
key but leaves scores uncapped, and no published Gemma 3 sets it.
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


class Gemma3DecoderLayer(nn.Module):
    """Attention and MLP between two norms each, added to the residual."""

    def __init__(self, config: ModelConfig, index: int, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)

        name = f"model.layers.{index}"
        self.self_attn = Attention(
            config,
            f"{name}.self_attn",
            index,
            schemes,
            dtype,
            window=config.sliding_window if config.layer_types[index] == "sliding_attention" else None,
            shifted_norms=True,
        )
        self.mlp = GatedMLP(config, f"{name}.mlp", schemes, dtype)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def stages(self, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> list[Stage]:
        """``forward`` in stages of one product or attention each."""

        def add_mixed(x: Tensor, y: Tensor) -> Tensor:
            return add(x, self.post_attention_layernorm(y))

        def add_mlp(x: Tensor, y: Tensor) -> Tensor:
            return add(x, self.post_feedforward_layernorm(y))

        return [
            *residual_stages(self.input_layernorm, self.self_attn.stages(ctx, cos, sin), add_mixed),
            *residual_stages(self.pre_feedforward_layernorm, self.mlp.stages(ctx), add_mlp),
        ]

    def forward(self, x: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D]: [T, D]."""
        x = add(x, self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), ctx, cos, sin)))
        return add(x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), ctx)))


class Gemma3TextModel(nn.Module):
    """Scaled embeddings, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            name="model.embed_tokens",
            scheme=schemes.for_module("model.embed_tokens"),
            dtype=dtype,
        )
        # The reference holds the multiplier in the model's type: in bfloat16, sqrt(3072) = 55.43 is 55.5.
        self.embedding_multiplier = torch.tensor(config.embedding_multiplier, dtype=dtype, device="cpu").item()
        self.layers = nn.ModuleList(
            [Gemma3DecoderLayer(config, index, schemes, dtype) for index in range(config.num_hidden_layers)]
        )
        self.layer_types = config.layer_types
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)
        self.rotary = {
            layer_type: RotaryEmbedding(rope, config.head_dim, config.max_position_embeddings)
            for layer_type, rope in config.rope.items()
        }

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [T]: [T, D]."""
        x = self.embed_tokens(token_ids) * self.embedding_multiplier
        rotations = {layer_type: rotary.cos_sin(ctx) for layer_type, rotary in self.rotary.items()}
        for layer, layer_type in zip(self.layers, self.layer_types, strict=True):
            x = run_layer(layer, x, ctx, *rotations[layer_type])
        return self.norm(x)  # type: ignore[no-any-return]


@models.register("gemma3_text")
class Gemma3ForCausalLM(CausalLM):
    """Parameters: see Gemma3TextModel; plus ``lm_head`` where the head is not tied to the embeddings."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.model = Gemma3TextModel(config, schemes, dtype)
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
            logits = self.model.embed_tokens.project(hidden).float()
        else:
            logits = self.lm_head.scheme.apply(self.lm_head, hidden).float()
        return self.cap_logits(logits)

    def cap_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)
