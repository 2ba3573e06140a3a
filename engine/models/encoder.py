"""What the bidirectional models have in common: learned positions, LayerNorm after each block, biases everywhere.

Shapes: T packed tokens, D hidden size, H heads, head_dim = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext
from engine.layers.encoder_stack import EncoderLayerParts, EncoderStack
from engine.layers.joint import JointLinears
from engine.layers.linear import Embedding, Linear
from engine.models.base import Model
from engine.ops.attention import attention
from engine.ops.norm import layer_norm
from engine.quantization.base import SchemeMap


class Encoder(Model):
    """A model whose tokens see all of their sequence; contexts for it have ``causal=False``."""


class LayerNorm(nn.LayerNorm):
    """Normalisation to mean 0 and variance 1 over D, with weight and bias; statistics in float32 (arXiv:1607.06450)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.requires_grad_(False)

    def forward(self, x: Tensor, added: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Of x [T, D] + added [D] + residual [T, D]: [T, D]."""
        return layer_norm(x, self.weight, self.bias, self.eps, added=added, residual=residual)


def table(rows: int, config: ModelConfig, name: str, schemes: SchemeMap, dtype: torch.dtype) -> Embedding:
    """An embedding table of that many rows of D."""
    return Embedding(rows, config.hidden_size, name=name, scheme=schemes.for_module(name), dtype=dtype)


def linear(in_features: int, out_features: int, name: str, schemes: SchemeMap, dtype: torch.dtype) -> Linear:
    """A Linear with a bias."""
    return Linear(in_features, out_features, name=name, bias=True, scheme=schemes.for_module(name), dtype=dtype)


def stack(layers: nn.ModuleList, config: ModelConfig) -> EncoderStack:
    """Layers that have ``parts``, for all of them at once."""
    parts: list[EncoderLayerParts] = [layer.parts for layer in layers]  # type: ignore[misc]
    return EncoderStack(
        list(layers), parts, heads=config.num_attention_heads, scale=config.query_scale, activation=config.hidden_act
    )


def self_attention(qkv: JointLinears, x: Tensor, ctx: ForwardContext, config: ModelConfig) -> Tensor:
    """Heads of x [T, D] attend within their sequences: [T, D], before the output projection.

    Args:
        qkv: the projections to queries, keys and values.
    """
    heads = (x.shape[0], config.num_attention_heads, config.head_dim)
    q, k, v = (y.view(heads) for y in qkv(x, ctx))
    # Layer 0: encoders keep no cache, so the index is never read.
    return attention(q, k, v, ctx, 0, scale=config.query_scale).reshape(x.shape[0], -1)
