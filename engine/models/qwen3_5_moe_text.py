"""Qwen3.5's language model with a mixture of experts in place of each MLP."""

from __future__ import annotations

from engine.models.base import models
from engine.models.qwen3_5_text import Qwen3_5ForCausalLM


@models.register("qwen3_5_moe_text")
class Qwen3_5MoeForCausalLM(Qwen3_5ForCausalLM):
    """The hybrid decoder with ``config.moe``. Source: transformers' ``models/qwen3_5_moe``."""
