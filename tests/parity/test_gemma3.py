"""Gemma 3 against transformers: logits of packed sequences, through our loader, with tiny random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from engine.models.gemma3_text import Gemma3ForCausalLM as OurGemma3
from tests.parity.loading import assert_same_logits, load, randomize, through_our_loader, token_ids

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LENGTHS = [1, 8, 9, 60, 31]  # below, at and beyond the window


def config(**options: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig(**{**SIZES, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 1, "head_dim": 32, "sliding_window": 3},
        {"num_key_value_heads": 4, "attention_bias": True, "rms_norm_eps": 1e-3},
        {"layer_types": ["full_attention"] * 4},
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 1},
        {"final_logit_softcapping": 1.5},
        {"tie_word_embeddings": False},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ],
    ids=["default", "mqa", "biases", "full", "window_of_one", "final_softcap", "untied", "scaled_rope"],
)
def test_gemma3(tmp_path: Path, options: dict[str, Any]) -> None:
    """Each fact that the configuration may state."""
    reference = randomize(Gemma3ForCausalLM(config(**options)), 1)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97))


def test_attention_softcap(tmp_path: Path) -> None:
    """transformers' Gemma 3 caps scores only if its caller passes the cap; ours goes by the configuration."""
    text = config(attn_logit_softcapping=0.7)
    reference = randomize(Gemma3ForCausalLM._from_config(text, attn_implementation="eager"), 2)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97), softcap=0.7)
    with pytest.raises(AssertionError, match="length"):
        assert_same_logits(model, reference, token_ids(LENGTHS, 97))


def test_language_model_of_the_multimodal_checkpoint(tmp_path: Path) -> None:
    """A nested configuration and names under the multimodal model's prefix; the vision tower is passed over."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    nested = Gemma3Config(text_config=config(), vision_config=vision, mm_tokens_per_image=4)
    reference = randomize(Gemma3ForConditionalGeneration(nested), 3)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97), token_type_ids=None)


def test_embedding_multiplier_is_rounded_to_the_compute_type(tmp_path: Path) -> None:
    """In bfloat16 sqrt(40) = 6.3246 is 6.3125, as in the reference; embeddings agree to the bit."""
    reference = randomize(Gemma3ForCausalLM(config()), 4).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    exact = load(tmp_path)
    assert isinstance(exact, OurGemma3)
    assert exact.model.embedding_multiplier == pytest.approx(40**0.5)
    from engine.loading import load_weights, open_checkpoint
    from engine.models.base import build_model
    from engine.quantization.base import SchemeMap

    checkpoint = open_checkpoint(tmp_path)
    model = build_model(checkpoint.config, SchemeMap(), torch.bfloat16)
    load_weights(model, checkpoint, torch.bfloat16, torch.device("cpu"))
    assert isinstance(model, OurGemma3)
    assert model.model.embedding_multiplier == 6.3125
    ids = torch.arange(97)
    ours = model.model.embed_tokens(ids) * model.model.embedding_multiplier
    assert torch.equal(ours, reference.model.embed_tokens(ids))
