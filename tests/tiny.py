"""Tiny models with random weights, saved by transformers, for tests that need a model but not its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_tiny_llama(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A two-layer Llama of vocabulary 300 with grouped-query attention, as a Hugging Face directory (float32).

    Args:
        overrides: of the LlamaConfig.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | overrides)))
    model.save_pretrained(directory)
    return directory
