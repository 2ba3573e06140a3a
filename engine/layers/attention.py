"""Grouped-query self-attention with rotary positions (arXiv:2305.13245), as the decoder families share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext, Stage, State
from engine.layers.joint import JointLinears
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rope import apply_rope
from engine.ops.attention import attention
from engine.ops.elementwise import gated_activation
from engine.quantization.base import SchemeMap


class Attention(nn.Module):
    """q, k, v projections, optional norms of q and k per head, rotation, attention, output projection.

    Args:
        name: full module name, prefix of the projections' names.
        layer_index: index in the attention cache.
        window: tokens a query sees, itself included; None: all.
        shifted_norms: q_norm and k_norm multiply by 1 + weight.

    With ``config.attention_output_gate``, q_proj gives [query | gate] for each head, and the output of attention is
    multiplied by sigmoid(gate) before o_proj (arXiv:2505.06708).
    """

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        layer_index: int,
        schemes: SchemeMap,
        dtype: torch.dtype,
        *,
        window: int | None = None,
        shifted_norms: bool = False,
    ) -> None:
        super().__init__()

        def linear(suffix: str, in_features: int, out_features: int, bias: bool) -> Linear:
            full = f"{name}.{suffix}"
            return Linear(in_features, out_features, name=full, bias=bias, scheme=schemes.for_module(full), dtype=dtype)

        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.output_gate = config.attention_output_gate
        q_out = 2 * q_size if self.output_gate else q_size
        self.q_proj = linear("q_proj", config.hidden_size, q_out, config.attention_bias)
        self.k_proj = linear("k_proj", config.hidden_size, kv_size, config.attention_bias)
        self.v_proj = linear("v_proj", config.hidden_size, kv_size, config.attention_bias)
        self.o_proj = linear("o_proj", q_size, config.hidden_size, config.attention_out_bias)
        self.qkv = JointLinears(self.q_proj, self.k_proj, self.v_proj)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, shifted=shifted_norms, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, shifted=shifted_norms, dtype=dtype)
        self.head_dim = config.head_dim
        self.layer_index = layer_index
        self.scale = config.query_scale
        self.window = window
        self.softcap = config.attn_logit_softcapping

    def stages(self, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> list[Stage]:
        """``forward`` in stages, from (x,) to (y,): what comes before attention, attention, its output's product. What
        stands before these is handed on."""

        def project(state: State) -> State:
            *rest, x = state
            q, k, v, gate = self._project(x, ctx, cos, sin)
            return (*rest, q, k, v) if gate is None else (*rest, q, k, v, gate)

        def attend(state: State) -> State:
            if self.output_gate:
                *rest, q, k, v, gate = state
                return (*rest, self._attend(q, k, v, gate, ctx))
            *rest, q, k, v = state
            return (*rest, self._attend(q, k, v, None, ctx))

        def output(state: State) -> State:
            *rest, out = state
            return (*rest, self.o_proj(out, ctx))

        return [project, attend, output]

    def forward(self, x: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, D] and the rotation's cos and sin [T, R]: [T, D]."""
        q, k, v, gate = self._project(x, ctx, cos, sin)
        return self.o_proj(self._attend(q, k, v, gate, ctx), ctx)  # type: ignore[no-any-return]

    def _project(
        self, x: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [T, H, head_dim], k and v [T, H_kv, head_dim], rotated, and the gate of the output as q, where there is
        one."""
        num_tokens = x.shape[0]
        q, k, v = self.qkv(x, ctx)
        gate: Tensor | None = None
        if self.output_gate:
            q, gate = q.view(num_tokens, -1, 2 * self.head_dim).chunk(2, dim=-1)
        else:
            q = q.view(num_tokens, -1, self.head_dim)
        k = k.view(num_tokens, -1, self.head_dim)
        v = v.view(num_tokens, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, gate

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, ctx: ForwardContext) -> Tensor:
        """[T, H * head_dim], gated."""
        out = attention(q, k, v, ctx, self.layer_index, scale=self.scale, window=self.window, softcap=self.softcap)
        if gate is not None:
            out = gated_activation(gate, out, "sigmoid")
        return out.reshape(q.shape[0], -1)
