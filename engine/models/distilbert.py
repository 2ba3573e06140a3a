"""DistilBERT (arXiv:1910.01108): BERT's layers without token types, under names of its own.

Source: transformers' ``models/distilbert``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext
from engine.layers.encoder_stack import EncoderLayerParts
from engine.layers.joint import JointLinears
from engine.models.base import models
from engine.models.encoder import Encoder, LayerNorm, linear, self_attention, stack, table
from engine.ops.elementwise import activation, bias_activation
from engine.quantization.base import SchemeMap


class DistilBertEmbeddings(nn.Module):
    """Word and position embeddings, summed and normalised."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.word_embeddings = table(config.vocab_size, config, "embeddings.word_embeddings", schemes, dtype)
        self.position_embeddings = table(
            config.max_position_embeddings, config, "embeddings.position_embeddings", schemes, dtype
        )
        self.LayerNorm = LayerNorm(config, dtype)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [T]: [T, D]."""
        positions = self.position_embeddings(ctx.positions)
        return self.LayerNorm(self.word_embeddings(token_ids), residual=positions)  # type: ignore[no-any-return]


class DistilBertAttention(nn.Module):
    """Projections, attention, output projection."""

    def __init__(self, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.q_lin = linear(width, width, f"{name}.q_lin", schemes, dtype)
        self.k_lin = linear(width, width, f"{name}.k_lin", schemes, dtype)
        self.v_lin = linear(width, width, f"{name}.v_lin", schemes, dtype)
        self.qkv = JointLinears(self.q_lin, self.k_lin, self.v_lin)
        self.out_lin = linear(width, width, f"{name}.out_lin", schemes, dtype)

    def forward(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """x [T, D]: [T, D] and the bias that is to be added to it, if any."""
        return self.out_lin.without_bias(self_attention(self.qkv, x, ctx, self.config), ctx)


class DistilBertFeedForward(nn.Module):
    """Two projections around the activation."""

    def __init__(self, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin1 = linear(config.hidden_size, config.intermediate_size, f"{name}.lin1", schemes, dtype)
        self.lin2 = linear(config.intermediate_size, config.hidden_size, f"{name}.lin2", schemes, dtype)
        activation(config.hidden_act)  # refuses what is not known
        self.activation = config.hidden_act

    def forward(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """x [T, D]: [T, D] and the bias that is to be added to it, if any."""
        inner = bias_activation(*self.lin1.without_bias(x, ctx), self.activation)
        return self.lin2.without_bias(inner, ctx)


class DistilBertLayer(nn.Module):
    """Attention and feed-forward block, each normalised after its residual."""

    def __init__(self, config: ModelConfig, index: int, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        name = f"transformer.layer.{index}"
        self.attention = DistilBertAttention(config, f"{name}.attention", schemes, dtype)
        self.sa_layer_norm = LayerNorm(config, dtype)
        self.ffn = DistilBertFeedForward(config, f"{name}.ffn", schemes, dtype)
        self.output_layer_norm = LayerNorm(config, dtype)

    @property
    def parts(self) -> EncoderLayerParts:
        """What ``forward`` computes with."""
        attention, ffn = self.attention, self.ffn
        return EncoderLayerParts(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            self.sa_layer_norm,
            ffn.lin1,
            ffn.lin2,
            self.output_layer_norm,
        )

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        x = self.sa_layer_norm(*self.attention(x, ctx), x)
        return self.output_layer_norm(*self.ffn(x, ctx), x)  # type: ignore[no-any-return]


class DistilBertTransformer(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [DistilBertLayer(config, i, schemes, dtype) for i in range(config.num_hidden_layers)]
        )
        self.stack = stack(self.layer, config)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        if (y := self.stack(x, ctx)) is not None:
            return y
        for layer in self.layer:
            x = layer(x, ctx)
        return x


@models.register("distilbert")
class DistilBertModel(Encoder):
    """Embeddings and layers."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.embeddings = DistilBertEmbeddings(config, schemes, dtype)
        self.transformer = DistilBertTransformer(config, schemes, dtype)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        return self.transformer(self.embeddings(token_ids, ctx), ctx)  # type: ignore[no-any-return]
