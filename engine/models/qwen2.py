"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (``attention_bias``), none on o."""

from __future__ import annotations

from engine.models.base import models
from engine.models.llama import LlamaForCausalLM


@models.register("qwen2")
class Qwen2ForCausalLM(LlamaForCausalLM):
    """The Llama decoder with the facts that ModelConfig states. Source: transformers' ``models/qwen2``."""
