"""config.json in all its spellings: the same ModelConfig as transformers understands, and typed errors for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.errors import FormatError
from engine.loading.hf_config import load_hf_config, model_config
from tests.unit.loading_files import TINY_LLAMA

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama2": transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=4),
    "llama3": transformers.LlamaConfig(
        num_key_value_heads=8,
        head_dim=64,
        attention_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        eos_token_id=[2, 3],
    ),
    "mistral": transformers.MistralConfig(num_hidden_layers=3, sliding_window=16),
    "mistral-full": transformers.MistralConfig(num_hidden_layers=3, sliding_window=None),
    "qwen2": transformers.Qwen2Config(num_hidden_layers=4),
    "qwen2-window": transformers.Qwen2Config(
        num_hidden_layers=4, use_sliding_window=True, max_window_layers=2, sliding_window=8
    ),
    "qwen3": transformers.Qwen3Config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(num_hidden_layers=7, sliding_window=512, final_logit_softcapping=30.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    """What transformers writes, in full and as differences from its defaults, is read as transformers means it."""
    theirs = CONFIGS[name]
    for text in (theirs.to_json_string(use_diff=False), theirs.to_json_string(use_diff=True)):
        raw = json.loads(text)
        # Sizes that equal a class's default are left out of the difference; those must be in a real config.json.
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        raw |= {
            key: getattr(theirs, key)
            for key in (*sizes, "num_key_value_heads", "sliding_window")
            if hasattr(theirs, key)
        }
        (tmp_path / "config.json").write_text(json.dumps(raw))
        ours = load_hf_config(tmp_path)
        for key in (*sizes, "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "bos_token_id"):
            assert getattr(ours, key) == getattr(theirs, key), key
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
        window = getattr(theirs, "sliding_window", None)
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(
            ours.layer_types
        )
        assert ours.layer_types == tuple(kinds)
        assert ours.sliding_window == (window if "sliding_attention" in kinds else None)
        for kind, rope in ours.rope.items():
            expected = theirs.rope_parameters.get(kind, theirs.rope_parameters)
            assert (rope.rope_type, rope.theta) == (expected["rope_type"], expected["rope_theta"])
            assert dict(rope.parameters) == {k: v for k, v in expected.items() if k not in ("rope_type", "rope_theta")}


def test_old_spellings_mean_the_same() -> None:
    """rope_theta with rope_scaling, and sliding_window_pattern, of transformers 4."""
    scaling = {"type": "linear", "factor": 4.0}
    old = model_config({**TINY_LLAMA, "rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16"}, "old")
    new = model_config(
        {
            **TINY_LLAMA,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
            "dtype": "bfloat16",
        },
        "new",
    )
    assert old.rope == new.rope
    gemma = {**TINY_LLAMA, "model_type": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 4, "head_dim": 16}
    old = model_config({**gemma, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 5e3}, "old")
    ropes = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 5e3}}
    kinds = ["sliding_attention", "full_attention"] * 2
    new = model_config({**gemma, "layer_types": kinds, "rope_parameters": ropes}, "new")
    assert (old.rope, old.layer_types) == (new.rope, new.layer_types)


def test_nested_gemma3_reads_the_language_model() -> None:
    """A multimodal Gemma 3 keeps sizes in text_config and ids above it; missing sizes are its class's defaults."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = model_config({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}, "config.json")
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("gemma3_text", 8, 4)
    assert config.eos_token_ids == (1, 106)
    assert config.rope["full_attention"].rope_type == "linear"
    assert config.rope["sliding_attention"].rope_type == "default"


def test_generation_config_adds_end_of_sequence_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_hf_config(tmp_path).eos_token_ids == (2, 7)


def test_code_in_a_configuration_is_never_looked_at(tmp_path: Path) -> None:
    """auto_map and trust_remote_code change nothing, and no module beside config.json is imported."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    hostile = {**TINY_LLAMA, "auto_map": {"AutoConfig": "evil.Config"}, "trust_remote_code": True}
    (tmp_path / "config.json").write_text(json.dumps(hostile))
    assert load_hf_config(tmp_path).hidden_size == 64


FAULTS: dict[str, dict[str, Any]] = {
    "model_type": {"model_type": "gpt_bigcode"},
    "hidden_size": {"hidden_size": 0},
    "num_hidden_layers": {"num_hidden_layers": -1},
    "vocab_size": {"vocab_size": 1 << 40},
    "intermediate_size": {"intermediate_size": "96"},
    "num_attention_heads": {"num_attention_heads": 5},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "head_dim": {"head_dim": 15},
    "rms_norm_eps": {"rms_norm_eps": float("nan")},
    "rope_theta": {"rope_theta": -1},
    "rope_type": {"rope_scaling": {"rope_type": "magic"}},
    "factor": {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    "high_freq_factor": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}
    },
    "short_factor": {"rope_scaling": {"rope_type": "longrope", "short_factor": "x", "long_factor": [1.0]}},
    "layer_types": {"layer_types": ["full_attention"]},
    "sliding_window": {"layer_types": ["sliding_attention"] * 2},
    "eos_token_id": {"eos_token_id": "</s>"},
    "tie_word_embeddings": {"tie_word_embeddings": "no"},
    "quantization_config": {"quantization_config": "q4"},
}


@pytest.mark.parametrize("field", FAULTS)
def test_faults_name_file_and_key(field: str) -> None:
    with pytest.raises(FormatError, match=field) as caught:
        model_config({**TINY_LLAMA, **FAULTS[field]}, "somewhere/config.json")
    assert "somewhere/config.json" in str(caught.value)


def test_unsupported_model_type_lists_the_supported() -> None:
    with pytest.raises(FormatError, match=r"gemma3, gemma3_text, llama") as caught:
        model_config({"model_type": "mamba"}, "c")
    assert "mamba" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN'])
def test_malformed_json_is_a_format_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        load_hf_config(tmp_path)


KEYS = [
    *TINY_LLAMA,
    "head_dim",
    "linear_num_value_heads",
    "num_experts",
    "full_attention_interval",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "sliding_window",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["llama3", "yarn"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "factor", "full_attention", "rope_theta", "x"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


FUZZED_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_5_text", "qwen3_5_moe_text"]
FUZZED_TYPES += ["bert", "distilbert", "mpnet"]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    st.sampled_from(FUZZED_TYPES),
)
def test_any_values_give_a_configuration_or_a_format_error(changes: dict[str, Any], model_type: str) -> None:
    """No other exception escapes, whatever the values."""
    try:
        config = model_config({**TINY_LLAMA, "model_type": model_type, **changes}, "c")
    except FormatError:
        return
    assert isinstance(config, ModelConfig)
    assert len(config.layer_types) == config.num_hidden_layers
    assert set(config.layer_types) - {"linear_attention"} <= set(config.rope) or config.task == "embed"
