"""Which scheme a module has, from the quantization_config of a checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig

from engine.errors import FormatError, InvalidArgumentError
from engine.loading.hf_config import model_config
from engine.quantization.base import UNQUANTIZED, scheme_map
from engine.quantization.compressed_tensors import quantization_config
from engine.quantization.export import write_config
from engine.quantization.int4 import Int4Grouped
from engine.quantization.int8 import Int8PerChannel


def w4(**weights: Any) -> dict[str, Any]:
    config = quantization_config(Int4Grouped(64), ["lm_head"], embeddings=False)
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


def test_what_is_written_is_read_back_and_by_compressed_tensors_itself() -> None:
    for scheme in (Int8PerChannel(), Int4Grouped(32), Int4Grouped(128, symmetric=False)):
        config = quantization_config(scheme, ["lm_head"], embeddings=True)
        ours = scheme_map(config).for_module("model.layers.0.mlp.up_proj")
        assert type(ours) is type(scheme)
        assert vars(ours) == vars(scheme)
        values = {key: value for key, value in config.items() if key != "version"}
        group = QuantizationConfig.model_validate(values).config_groups["group_0"]
        assert group.weights.num_bits == (8 if isinstance(scheme, Int8PerChannel) else 4)
        assert group.weights.symmetric == getattr(scheme, "symmetric", True)
        assert group.weights.group_size == getattr(scheme, "group_size", None)


def test_targets_and_ignored_modules() -> None:
    config = w4()
    config["ignore"] = ["lm_head", "re:.*layers\\.1\\..*"]
    schemes = scheme_map(config)
    assert isinstance(schemes.for_module("model.layers.0.self_attn.q_proj"), Int4Grouped)
    for name in ("lm_head", "model.layers.1.mlp.up_proj", "model.embed_tokens"):
        assert schemes.for_module(name) is UNQUANTIZED
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    assert isinstance(scheme_map(config).for_module("model.embed_tokens"), Int4Grouped)


def test_the_most_specific_target_wins() -> None:
    config = w4()
    groups = config["config_groups"]
    for index, targets in enumerate((["re:.*down_proj"], ["model.layers.0.mlp.down_proj"]), start=1):
        groups[f"group_{index}"] = copy.deepcopy(groups["group_0"])
        groups[f"group_{index}"]["targets"] = targets
    groups["group_1"]["weights"]["group_size"] = 32
    groups["group_2"]["weights"]["group_size"] = 128
    schemes = scheme_map(config)
    sizes = {
        "model.layers.0.mlp.up_proj": 64,
        "model.layers.1.mlp.down_proj": 32,
        "model.layers.0.mlp.down_proj": 128,
    }
    for name, size in sizes.items():
        scheme = schemes.for_module(name)
        assert isinstance(scheme, Int4Grouped)
        assert scheme.group_size == size


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("config_groups", None, "config_groups"),
        ("config_groups", {}, "config_groups"),
        ("config_groups", {"group_0": 3}, "config_groups.group_0"),
        ("quantization_status", "frozen", "quantization_status"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("transform_config", {"config_groups": {}}, "transform_config"),
        ("ignore", "lm_head", "ignore"),
        ("ignore", ["re:("], "ignore"),
    ],
)
def test_unsupported_or_malformed_keys_are_named(key: str, value: object, named: str) -> None:
    with pytest.raises(FormatError, match=rf"quantization_config\.{named}"):
        scheme_map({**w4(), key: value})


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 3},
        {"num_bits": 8},
        {"group_size": 16},
        {"strategy": "channel", "group_size": None},
        {"type": "float"},
        {"symmetric": "yes"},
        {"dynamic": True},
        {"actorder": "group"},
        {"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False},
    ],
)
def test_unsupported_weights_are_named(weights: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"config_groups\.group_0\.weights"):
        scheme_map(w4(**weights))


def test_quantized_activations_and_other_formats_are_refused() -> None:
    config = w4()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(FormatError, match="input_activations"):
        scheme_map(config)
    config = w4()
    config["config_groups"]["group_0"]["format"] = "marlin-24"
    with pytest.raises(FormatError, match="marlin-24"):
        scheme_map(config)
    with pytest.raises(InvalidArgumentError, match="gptq"):
        scheme_map({"quant_method": "gptq"})


@pytest.mark.parametrize("outer", ["Gemma3Config", "Qwen3_5Config", "Qwen3_5MoeConfig"])
def test_a_wrapped_language_model_is_written_as_itself(tmp_path: Path, outer: str) -> None:
    """Its class in transformers is the causal one of its own family, and its own keys are kept."""
    import transformers

    raw = json.loads(getattr(transformers, outer)().to_json_string(use_diff=False))
    raw["text_config"]["mtp_num_hidden_layers"] = 1
    config = model_config(raw, "config.json")
    write_config(tmp_path, config, {"quant_method": "compressed-tensors"}, dtype="bfloat16", tied=False)
    written = json.loads((tmp_path / "config.json").read_text())
    [name] = written["architectures"]
    assert getattr(transformers, name).config_class.model_type == written["model_type"] == config.model_type
    assert written["mtp_num_hidden_layers"] == 1
    assert "text_config" not in written
