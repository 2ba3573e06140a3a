"""BERT (arXiv:1810.04805) as an embedding model: hidden states of every token; pooling is not part of the model.

Source: transformers' ``models/bert``. Every input is one segment, so all tokens have token type 0. The checkpoint's
``pooler`` and prediction heads are not used: sentence-transformers models pool hidden states themselves.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext
from engine.errors import FormatError
from engine.layers.encoder_stack import EncoderLayerParts
from engine.layers.joint import JointLinears
from engine.models.base import models
from engine.models.encoder import Encoder, LayerNorm, linear, self_attention, stack, table
from engine.ops.elementwise import activation, bias_activation
from engine.quantization.base import SchemeMap


class BertEmbeddings(nn.Module):
    """Word, position and token type embeddings, summed and normalised.

    Args:
        position_offset: row of the first token's position.
    """

    def __init__(
        self,
        config: ModelConfig,
        schemes: SchemeMap,
        dtype: torch.dtype,
        default_token_types: int,
        position_offset: int,
    ) -> None:
        super().__init__()
        token_types = config.raw.get("type_vocab_size", default_token_types)
        if not isinstance(token_types, int) or isinstance(token_types, bool) or not 1 <= token_types <= 1 << 16:
            raise FormatError(
                f"type_vocab_size is {token_types!r}; accepted: an integer in [1, 65536]", field="type_vocab_size"
            )
        self.word_embeddings = table(config.vocab_size, config, "embeddings.word_embeddings", schemes, dtype)
        self.position_embeddings = table(
            config.max_position_embeddings, config, "embeddings.position_embeddings", schemes, dtype
        )
        self.token_type_embeddings = table(token_types, config, "embeddings.token_type_embeddings", schemes, dtype)
        self.LayerNorm = LayerNorm(config, dtype)
        self.position_offset = position_offset

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [T]: [T, D]."""
        first_type = self.token_type_embeddings(torch.zeros(1, dtype=torch.int64, device=token_ids.device))
        positions = self.position_embeddings(ctx.positions + self.position_offset)
        return self.LayerNorm(self.word_embeddings(token_ids), first_type[0], positions)  # type: ignore[no-any-return]


class BertSelfAttention(nn.Module):
    """The three projections and attention."""

    def __init__(self, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.query = linear(width, width, f"{name}.query", schemes, dtype)
        self.key = linear(width, width, f"{name}.key", schemes, dtype)
        self.value = linear(width, width, f"{name}.value", schemes, dtype)
        self.qkv = JointLinears(self.query, self.key, self.value)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        return self_attention(self.qkv, x, ctx, self.config)


class BertOutput(nn.Module):
    """A projection, added to the residual and normalised."""

    def __init__(
        self, config: ModelConfig, in_features: int, name: str, schemes: SchemeMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dense = linear(in_features, config.hidden_size, f"{name}.dense", schemes, dtype)
        self.LayerNorm = LayerNorm(config, dtype)

    def forward(self, x: Tensor, residual: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, in_features] and residual [T, D]: [T, D]."""
        y, bias = self.dense.without_bias(x, ctx)
        return self.LayerNorm(y, bias, residual)  # type: ignore[no-any-return]


class BertAttention(nn.Module):
    """Attention with its output block."""

    def __init__(self, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, f"{name}.self", schemes, dtype)
        self.output = BertOutput(config, config.hidden_size, f"{name}.output", schemes, dtype)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        return self.output(self.self(x, ctx), x, ctx)  # type: ignore[no-any-return]


class BertIntermediate(nn.Module):
    """The widening projection of the feed-forward block, with its activation."""

    def __init__(self, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = linear(config.hidden_size, config.intermediate_size, f"{name}.dense", schemes, dtype)
        activation(config.hidden_act)  # refuses what is not known
        self.activation = config.hidden_act

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, intermediate_size]."""
        return bias_activation(*self.dense.without_bias(x, ctx), self.activation)


class BertLayer(nn.Module):
    """Attention and feed-forward block, each normalised after its residual."""

    def __init__(self, config: ModelConfig, index: int, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        name = f"encoder.layer.{index}"
        self.attention = BertAttention(config, f"{name}.attention", schemes, dtype)
        self.intermediate = BertIntermediate(config, f"{name}.intermediate", schemes, dtype)
        self.output = BertOutput(config, config.intermediate_size, f"{name}.output", schemes, dtype)

    @property
    def parts(self) -> EncoderLayerParts:
        """What ``forward`` computes with."""
        projections, attended = self.attention.self, self.attention.output
        return EncoderLayerParts(
            projections.query,
            projections.key,
            projections.value,
            attended.dense,
            attended.LayerNorm,
            self.intermediate.dense,
            self.output.dense,
            self.output.LayerNorm,
        )

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        x = self.attention(x, ctx)
        return self.output(self.intermediate(x, ctx), x, ctx)  # type: ignore[no-any-return]


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config, i, schemes, dtype) for i in range(config.num_hidden_layers)])
        self.stack = stack(self.layer, config)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, D]: [T, D]."""
        if (y := self.stack(x, ctx)) is not None:
            return y
        for layer in self.layer:
            x = layer(x, ctx)
        return x


@models.register("bert")
class BertModel(Encoder):
    """Embeddings and layers; siblings differ by where positions begin."""

    default_token_types: ClassVar[int] = 2

    def __init__(self, config: ModelConfig, schemes: SchemeMap, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config, schemes, dtype, self.default_token_types, self.position_offset)
        self.encoder = BertEncoder(config, schemes, dtype)

    @property
    def position_offset(self) -> int:
        """Row of the position table that the first token takes."""
        return 0

    @property
    def max_input_tokens(self) -> int:
        return self.config.max_position_embeddings - self.position_offset

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        return self.encoder(self.embeddings(token_ids, ctx), ctx)  # type: ignore[no-any-return]
