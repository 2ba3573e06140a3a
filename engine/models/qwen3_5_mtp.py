"""Qwen3.5's head for multi-token prediction (``mtp.*``): drafts the token after the next one.

The base model gives the final hidden state h_t, from which token t + 1 is predicted. The head takes h_t together with
that token and predicts token t + 2:

    u_t = fc([norm(embed(x_{t+1})) | norm(h_t)])        out_t = norm(layer(u_t))

where layer is a decoder layer with full attention over u_0 … u_t, at the positions 0 … t of the hidden states, not
those of the tokens. Embeddings and output head are the base model's, unless the head has embeddings of its own. With
several layers, step k goes on from out of step k - 1 and token t + 1 + k through layer k.

Source: arXiv:2412.19437, section 2.2; names and order as in the published checkpoints and in vLLM's ``qwen3_5_mtp``
(transformers passes these weights over). Reference: tests/parity/test_qwen3_5_mtp.py.

Shapes: T packed rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ForwardContext
from engine.layers.linear import Embedding, Linear
from engine.layers.moe import Experts
from engine.layers.norm import RMSNorm
from engine.quantization.base import SchemeMap


class Qwen3_5MTP(nn.Module):
    """The head's own weights.

    Adapters do not target it: PEFT trains the base model, which in transformers has no such head.

    Args:
        layers: its decoder layers, named mtp.layers.N.
    """

    def __init__(
        self, config: ModelConfig, layers: Sequence[nn.Module], schemes: SchemeMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.embed_tokens: Embedding | None = None
        if config.mtp_dedicated_embeddings:
            name = "mtp.embed_tokens"
            self.embed_tokens = Embedding(
                config.vocab_size, size, name=name, scheme=schemes.for_module(name), dtype=dtype
            )
        self.pre_fc_norm_embedding = RMSNorm(size, eps, shifted=True, dtype=dtype)
        self.pre_fc_norm_hidden = RMSNorm(size, eps, shifted=True, dtype=dtype)
        self.fc = Linear(2 * size, size, name="mtp.fc", scheme=schemes.for_module("mtp.fc"), dtype=dtype)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(size, eps, shifted=True, dtype=dtype)
        for module in self.modules():
            if isinstance(module, Linear | Experts):
                module.lora = False

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        ctx: ForwardContext,
        rotation: tuple[Tensor, Tensor],
        embed_tokens: Embedding,
        step: int = 0,
    ) -> Tensor:
        """See Qwen3_5ForCausalLM.mtp_hidden.

        Args:
            rotation: cos and sin of ctx.positions.
            embed_tokens: the base model's, for a head without its own.
        """
        embedded = (embed_tokens if self.embed_tokens is None else self.embed_tokens)(token_ids)
        pair = torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)), dim=-1)
        x = self.fc(pair, ctx)
        return self.norm(self.layers[step % len(self.layers)](x, ctx, *rotation))  # type: ignore[no-any-return]
