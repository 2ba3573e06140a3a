"""Qwen3: Llama with RMSNorm over head_dim on q and k (``qk_norm``), no biases."""

from __future__ import annotations

from engine.models.base import models
from engine.models.llama import LlamaForCausalLM


@models.register("qwen3")
class Qwen3ForCausalLM(LlamaForCausalLM):
    """The Llama decoder with the facts that ModelConfig states. Source: transformers' ``models/qwen3``."""
