"""A hybrid of a published shape with random weights: how fast it runs does not depend on what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

QWEN3_5_0_8B: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
}
"""``text_config`` of Qwen/Qwen3.5-0.8B, of its numbers those that the shape and the work depend on."""


def save_hybrid(directory: Path, num_layers: int) -> Path:
    """Saves that shape as a Hugging Face directory in bfloat16: 1.5 GB with all its 24 layers.

    Args:
        num_layers: fewer take less; a multiple of 4 keeps three delta-net layers to one of attention.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**(QWEN3_5_0_8B | {"num_hidden_layers": num_layers}))
    Qwen3_5ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory
