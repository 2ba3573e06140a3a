"""Qwen3.5's language model: three gated delta-net layers to one of gated attention.

Source: transformers' ``models/qwen3_5``. What sets the family apart: layer kinds from the configuration; attention with
an output gate, norms of q and k, and rotation of a part of head_dim; norms by 1 + weight everywhere except within the
delta-net. Text positions are the same on all three axes of its rotary sections, so those fall together into one.

``mtp.*``, a head that drafts, is kept where a checkpoint carries it: see qwen3_5_mtp. It has no part in ``forward``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import LayerType, ModelConfig
from engine.context import ForwardContext, Stage
from engine.layers.attention import Attention
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.linear import Embedding, Linear
from engine.layers.mlp import GatedMLP
from engine.layers.moe import SparseMoE
from engine.layers.norm import RMSNorm
from engine.layers.rope import RotaryEmbedding
from engine.models.base import CausalLM, mlp_stages, models, one_stage, residual_stages, run_layer
from engine.models.qwen3_5_mtp import Qwen3_5MTP
from engine.ops.elementwise import add
from engine.quantization.base import SchemeMap


class Qwen3_5DecoderLayer(nn.Module):
    """A token mixer (``linear_attn`` or ``self_attn``) and an MLP, each on normalised input and added to the residual.

    Args:
        name: full module name.
        kind: "linear_attention" or "full_attention".
        kind_index: index among the layers of its kind, in the attention cache or the recurrent states.
    """

    def __init__(
        self, config: ModelConfig, name: str, kind: LayerType, kind_index: int, schemes: SchemeMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.is_linear = kind == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config, f"{name}.linear_attn", kind_index, schemes, dtype)
        else:
            self.self_attn = Attention(config, f"{name}.self_attn", kind_index, schemes, dtype, shifted_norms=True)
        mlp = GatedMLP if config.moe is None else SparseMoE
        self.mlp = mlp(config, f"{name}.mlp", schemes, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, shifted=True, dtype=dtype)

    def stages(self, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> list[Stage]:
        """``forward`` in stages of one product or attention each; the delta-net is one."""
        mixer = (
            one_stage(lambda x: self.linear_attn(x, ctx)) if self.is_linear else self.self_attn.stages(ctx, cos, sin)
        )
        return [
            *residual_stages(self.input_layernorm, mixer, add),
            *residual_stages(self.post_attention_layernorm, mlp_stages(self.mlp, ctx), add),
        ]

    def forward(self, x: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D]: [T, D]."""
        normed = self.input_layernorm(x)
        mixed = self.linear_attn(normed, ctx) if self.is_linear else self.self_attn(normed, ctx, cos, sin)
        x, normed = self.post_attention_layernorm.of_sum(x, mixed)
        return add(x, self.mlp(normed, ctx))


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
            [
                Qwen3_5DecoderLayer(config, f"model.layers.{i}", kind, kinds[:i].count(kind), schemes, dtype)
                for i, kind in enumerate(kinds)
            ]
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
    """Parameters: see Qwen3_5TextModel; plus ``lm_head`` where the head is not tied to the embeddings, and ``mtp``
    where the configuration announces it and the checkpoint has it."""

    optional_modules = ("mtp",)

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
        self.mtp: Qwen3_5MTP | None = None
        if config.mtp_num_hidden_layers:
            # The places in the attention cache that would follow those of the model; drafting alone needs them.
            first = config.layer_types.count("full_attention")
            layers = [
                Qwen3_5DecoderLayer(config, f"mtp.layers.{i}", "full_attention", first + i, schemes, dtype)
                for i in range(config.mtp_num_hidden_layers)
            ]
            self.mtp = Qwen3_5MTP(config, layers, schemes, dtype)

    @property
    def num_mtp_layers(self) -> int:
        return 0 if self.mtp is None else len(self.mtp.layers)

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

    def mtp_hidden(self, hidden: Tensor, token_ids: Tensor, ctx: ForwardContext, step: int = 0) -> Tensor:
        """States from which ``compute_logits`` gives the tokens after the next ones.

        Args:
            hidden: [T, D], final hidden states h_t (of step k > 0: what step k - 1 returned).
            token_ids: [T] int64, the token that follows each: t + 1 + step.
            ctx: of these rows, without a cache; positions are those of the states.
            step: how many tokens were drafted before.
        Returns: [T, D].
        """
        assert self.mtp is not None, "num_mtp_layers tells whether there is a head"
        return self.mtp(hidden, token_ids, ctx, self.model.rotary.cos_sin(ctx), self.model.embed_tokens, step)  # type: ignore[no-any-return]
