"""A Llama written out in plain torch operations, which never changes: what the regression check measures against.

One stream, float32, a cache of fixed size, no batching, no engine code. Slow parts of it are slow on purpose: a ratio
is to move only where the engine does. Shapes: T new tokens, S context, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class LoopShape:
    """What the loop has to know besides the weights."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float


def shape_of(config: Any) -> LoopShape:
    """Of a transformers LlamaConfig with the default rotary embedding."""
    rope = config.rope_parameters
    assert config.model_type == "llama"
    assert rope["rope_type"] == "default"
    return LoopShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
    )


class FixedLoop:
    """Greedy decoding of one stream.

    Args:
        weights: under their Hugging Face names, float32.
        max_tokens: that the cache holds.
    """

    def __init__(self, weights: Mapping[str, Tensor], shape: LoopShape, max_tokens: int) -> None:
        self._weights = weights
        self._shape = shape
        self._keys = torch.zeros(shape.num_layers, shape.num_kv_heads, max_tokens, shape.head_dim)
        self._values = torch.zeros_like(self._keys)
        inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(max_tokens).float(), inverse).repeat(1, 2)
        self._cos, self._sin = angles.cos(), angles.sin()
        self._length = 0

    def reset(self) -> None:
        """Forgets the context."""
        self._length = 0

    @torch.inference_mode()
    def forward(self, token_ids: list[int]) -> Tensor:
        """Takes in tokens; returns the logits after the last, [vocabulary]."""
        weights, count = self._weights, len(token_ids)
        begin, end = self._length, self._length + count
        x = F.embedding(torch.tensor(token_ids), weights["model.embed_tokens.weight"])
        causal = torch.ones(count, end, dtype=torch.bool).tril(begin) if count > 1 else None
        for layer in range(self._shape.num_layers):
            prefix = f"model.layers.{layer}."
            hidden = self._norm(x, f"{prefix}input_layernorm.weight")
            x = x + self._attention(hidden, layer, begin, end, causal)
            hidden = self._norm(x, f"{prefix}post_attention_layernorm.weight")
            gate = F.silu(F.linear(hidden, weights[f"{prefix}mlp.gate_proj.weight"]))
            up = F.linear(hidden, weights[f"{prefix}mlp.up_proj.weight"])
            x = x + F.linear(gate * up, weights[f"{prefix}mlp.down_proj.weight"])
        self._length = end
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return F.linear(self._norm(x[-1], "model.norm.weight"), head)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._shape.norm_eps) * self._weights[name]

    def _attention(self, x: Tensor, layer: int, begin: int, end: int, causal: Tensor | None) -> Tensor:
        shape, weights, prefix = self._shape, self._weights, f"model.layers.{layer}.self_attn."

        def heads(name: str, count: int) -> Tensor:
            return F.linear(x, weights[f"{prefix}{name}.weight"]).view(-1, count, shape.head_dim).transpose(0, 1)

        keys, values = self._keys[layer], self._values[layer]
        keys[:, begin:end] = self._rotate(heads("k_proj", shape.num_kv_heads), begin, end)
        values[:, begin:end] = heads("v_proj", shape.num_kv_heads)
        queries = self._rotate(heads("q_proj", shape.num_heads), begin, end)
        group = shape.num_heads // shape.num_kv_heads
        all_keys = keys[:, :end].repeat_interleave(group, 0)
        all_values = values[:, :end].repeat_interleave(group, 0)
        scores = queries @ all_keys.transpose(1, 2) / math.sqrt(shape.head_dim)  # [H, T, S]
        if causal is not None:
            scores = scores.masked_fill(~causal, -math.inf)
        mixed = (scores.softmax(-1) @ all_values).transpose(0, 1).reshape(x.shape[0], -1)
        return F.linear(mixed, weights[f"{prefix}o_proj.weight"])

    def _rotate(self, x: Tensor, begin: int, end: int) -> Tensor:
        """x: [heads, T, D]."""
        first, second = x.chunk(2, -1)
        return x * self._cos[begin:end] + torch.cat((-second, first), -1) * self._sin[begin:end]
