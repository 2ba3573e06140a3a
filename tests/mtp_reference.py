"""Qwen3.5's head for multi-token prediction in plain torch, from transformers' layers, and checkpoints that carry it.

transformers has no such head, so it is put together here of the decoder layer, norm and rotation that it does have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class ReferenceMTP(nn.Module):
    """For one sequence at a time.

    Args:
        config: of a Qwen3_5ForCausalLM or Qwen3_5MoeForCausalLM, with mtp_num_hidden_layers.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

        layer: Any
        if config.model_type == "qwen3_5_moe_text":
            layer, norm, rotary = moe.Qwen3_5MoeDecoderLayer, moe.Qwen3_5MoeRMSNorm, moe.Qwen3_5MoeTextRotaryEmbedding
        else:
            layer, norm, rotary = dense.Qwen3_5DecoderLayer, dense.Qwen3_5RMSNorm, dense.Qwen3_5TextRotaryEmbedding
        size, index = config.hidden_size, config.layer_types.index("full_attention")
        self.pre_fc_norm_embedding = norm(size, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(size, eps=config.rms_norm_eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([layer(config, index) for _ in range(config.mtp_num_hidden_layers)])
        self.norm = norm(size, eps=config.rms_norm_eps)
        if config.mtp_use_dedicated_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.rotary = [rotary(config=config)]  # in a list: no part of the checkpoint

    def forward(self, hidden: Tensor, token_ids: Tensor, embed_tokens: nn.Module, step: int = 0) -> Tensor:
        """hidden [n, D] at positions 0 … n - 1, and the tokens [n] that follow: [n, D]."""
        embedded = getattr(self, "embed_tokens", embed_tokens)(token_ids)
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)), dim=-1))[None]
        positions = torch.arange(len(hidden)).expand(3, 1, -1)
        mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)[None, None]
        x = self.layers[step](x, position_embeddings=self.rotary[0](x, positions), attention_mask=mask)
        out: Tensor = self.norm(x[0] if isinstance(x, tuple) else x)
        return out.view_as(hidden)


def add_mtp(
    directory: Path, config: Any, *, num_layers: int = 1, dedicated: bool = False, seed: int = 0, scale: float = 0.2
) -> ReferenceMTP:
    """Puts a random head into a checkpoint that transformers has saved, and the announcement into its configuration."""
    values = {"mtp_num_hidden_layers": num_layers, "mtp_use_dedicated_embeddings": dedicated}
    config.update(values)
    config._attn_implementation = "eager"
    head = ReferenceMTP(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0.0, scale if parameter.dim() > 1 else 0.1, generator=generator)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"mtp.{name}": tensor.clone() for name, tensor in head.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return head
