"""The Llama family against transformers: logits of packed sequences, through our loader, tiny random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.models.base import CausalLM
from tests.parity.loading import (
    TOLERANCE,
    assert_same_logits,
    packed_hidden,
    randomize,
    through_our_loader,
    token_ids,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LENGTHS = [1, 33, 64, 5]


def check(config: Any, model_class: Any, path: Path, **save: Any) -> None:
    reference = randomize(model_class(config), 1)
    model = through_our_loader(reference, path, **save)
    assert_same_logits(model, reference, token_ids(LENGTHS, config.vocab_size))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 24},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
    ],
    ids=["gqa", "mha", "mqa_wide_heads", "attention_bias", "mlp_bias", "biases_tied", "gelu"],
)
def test_llama(tmp_path: Path, options: dict[str, Any]) -> None:
    """Head layouts, biases, tied and untied heads."""
    check(LlamaConfig(**{**SIZES, **options}), LlamaForCausalLM, tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
    ],
    ids=["theta", "linear", "llama3", "yarn", "yarn_factors"],
)
def test_llama_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Every variant of rotary scaling whose frequencies do not depend on the sequence."""
    check(LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **rope}), LlamaForCausalLM, tmp_path)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_of_the_configured_length(tmp_path: Path, rope_type: str) -> None:
    """Variants that follow the length of the text are fixed at the configured length, whatever the text's own: a
    sequence of that length agrees with the reference."""
    long_factor, short_factor = [1.5, 2.0, 3.0, 4.0], [1.0, 1.1, 1.2, 1.3]
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 3.0}
    if rope_type == "longrope":
        rope |= {"long_factor": long_factor, "short_factor": short_factor, "original_max_position_embeddings": 32}
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 96, "head_dim": 8}, rope_parameters=rope)
    reference = randomize(LlamaForCausalLM(config), 1)
    model = through_our_loader(reference, tmp_path)
    sequence = token_ids([96], 97)[0]
    with torch.no_grad():
        expected = reference.eval()(input_ids=sequence[None], use_cache=False).logits[0]
        assert isinstance(model, CausalLM)
        logits = model.compute_logits(packed_hidden(model, [sequence])[0])
        assert (logits - expected).abs().max() < TOLERANCE
        # The first tokens come out the same when no more of the text is there.
        part = model.compute_logits(packed_hidden(model, [sequence[:20]])[0])
        assert (part - logits[:20]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 7, "head_dim": 20}],
    ids=["full", "sliding", "sliding_head_dim"],
)
def test_mistral(tmp_path: Path, options: dict[str, Any]) -> None:
    """All layers full, or all of them sliding."""
    check(MistralConfig(**{**SIZES, **options}), MistralForCausalLM, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}],
    ids=["untied", "tied", "sliding"],
)
def test_qwen2(tmp_path: Path, options: dict[str, Any]) -> None:
    """Biases on q, k and v, none on o; sliding layers above max_window_layers."""
    check(Qwen2Config(**{**SIZES, **options}), Qwen2ForCausalLM, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"head_dim": 32}, {"head_dim": 12, "attention_bias": True}, {"head_dim": 16, "tie_word_embeddings": True}],
    ids=["wide_heads", "biases", "tied"],
)
def test_qwen3(tmp_path: Path, options: dict[str, Any]) -> None:
    """Norms of q and k, and heads whose widths do not add up to the hidden size."""
    check(Qwen3Config(**{**SIZES, **options}), Qwen3ForCausalLM, tmp_path)


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (LlamaConfig, LlamaForCausalLM),
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_sharded_safetensors(tmp_path: Path, config_class: Any, model_class: Any) -> None:
    """The same logits from a checkpoint in many files with an index."""
    check(config_class(**SIZES), model_class, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
