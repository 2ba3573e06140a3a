"""Mistral 7B and its kin: Llama with a sliding window in some releases (arXiv:2310.06825)."""

from __future__ import annotations

from engine.models.base import models
from engine.models.llama import LlamaForCausalLM


@models.register("mistral")
class MistralForCausalLM(LlamaForCausalLM):
    """The Llama decoder with the facts that ModelConfig states. Source: transformers' ``models/mistral``."""
