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


def save_tiny_hybrid(directory: Path, *, seed: int = 0, experts: bool = False, **overrides: Any) -> Path:
    """A Qwen3.5 of three delta-net layers and one of attention, vocabulary 300, as a Hugging Face directory (float32).

    Its decays are spread as those of trained models are, so that states remember.

    Args:
        experts: with a mixture of experts in place of each MLP.
        overrides: of the configuration.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    model: Any
    if experts:
        sizes = {"num_experts": 6, "num_experts_per_tok": 2}
        sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**(values | sizes | overrides)))
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**(values | {"intermediate_size": 96} | overrides)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-5.0, 1.0)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return directory
