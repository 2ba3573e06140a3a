"""Configurations and checkpoints of the Qwen3.5 family: published and default values, faults, stacked experts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from engine.config import LinearAttentionConfig
from engine.errors import FormatError, ShapeError
from engine.loading.experts import StackedExperts, has_single_experts
from engine.loading.hf_config import load_hf_config, model_config


def test_published_configuration(shared: Path) -> None:
    """The 0.8B's nested configuration: 18 delta-net layers and 6 of attention, a quarter of each head rotated."""
    config = load_hf_config(shared / "configs" / "qwen3.5-0.8b.config.json")
    assert config.model_type == "qwen3_5_text"
    assert (config.layer_types.count("linear_attention"), config.layer_types.count("full_attention")) == (18, 6)
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (1024, 256, 248320)
    assert config.linear_attention == LinearAttentionConfig(
        num_key_heads=16, num_value_heads=16, key_head_dim=128, value_head_dim=128, conv_width=4
    )
    assert config.linear_attention.conv_dim == 6144
    rope = config.rope["full_attention"]
    assert (rope.theta, rope.partial_rotary_factor) == (1e7, 0.25)
    assert config.eos_token_ids == (248044,)
    assert config.tie_word_embeddings
    assert config.moe is None


@pytest.mark.parametrize("kind", [Qwen3_5TextConfig, Qwen3_5MoeTextConfig])
def test_defaults_are_those_of_transformers(kind: Any) -> None:
    """What a configuration leaves out, sizes apart, is what transformers' class has."""
    theirs = kind()
    raw = {"model_type": theirs.model_type, "hidden_size": theirs.hidden_size, "num_hidden_layers": 8}
    if kind is Qwen3_5TextConfig:
        raw["intermediate_size"] = theirs.intermediate_size
    ours = model_config(raw, "c")
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.layer_types == tuple(kind(num_hidden_layers=8).layer_types)
    assert ours.rope["full_attention"].partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]
    assert ours.rope["full_attention"].theta == theirs.rope_parameters["rope_theta"]
    linear = ours.linear_attention
    assert linear is not None
    assert (linear.num_key_heads, linear.num_value_heads) == (
        theirs.linear_num_key_heads,
        theirs.linear_num_value_heads,
    )
    assert (linear.key_head_dim, linear.value_head_dim) == (theirs.linear_key_head_dim, theirs.linear_value_head_dim)
    assert linear.conv_width == theirs.linear_conv_kernel_dim
    if kind is Qwen3_5MoeTextConfig:
        assert ours.moe is not None
        assert (ours.moe.num_experts, ours.moe.num_experts_per_token) == (
            theirs.num_experts,
            theirs.num_experts_per_tok,
        )
        assert ours.moe.intermediate_size == theirs.moe_intermediate_size
        assert ours.moe.shared_intermediate_size == theirs.shared_expert_intermediate_size
        assert ours.moe.normalize_top_k


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("linear_num_value_heads", 24),
        ("linear_num_key_heads", 0),
        ("linear_conv_kernel_dim", 1),
        ("linear_key_head_dim", "128"),
        ("layer_types", ["sliding_attention"] * 4),
        ("attn_output_gate", False),
        ("full_attention_interval", 0),
        ("num_experts_per_tok", 300),
        ("mlp_only_layers", [0]),
        ("norm_topk_prob", 1),
    ],
)
def test_faults_name_the_key(field: str, value: object) -> None:
    raw = {"model_type": "qwen3_5_moe_text", "hidden_size": 64, "num_hidden_layers": 4, "linear_num_key_heads": 16}
    with pytest.raises(FormatError, match=field):
        model_config({**raw, field: value}, "c")


class Tensors:
    """A checkpoint of tensors in memory."""

    path = Path("somewhere")
    kind = "safetensors"
    config = SimpleNamespace()
    stored_bytes = 1

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def digest(self) -> str:
        return json.dumps(sorted(self.tensors))


def experts(count: int = 3) -> dict[str, torch.Tensor]:
    tensors = {"model.norm.weight": torch.ones(4)}
    for i in range(count):
        for part, shape in (("gate_proj", (2, 4)), ("up_proj", (2, 4)), ("down_proj", (4, 2))):
            tensors[f"m.mlp.experts.{i}.{part}.weight"] = torch.randn(shape)
    return tensors


def test_single_experts_are_stacked_in_their_order() -> None:
    """Gate above up; 11 experts, so that an order by name would show."""
    tensors = experts(11)
    stacked = StackedExperts(Tensors(tensors))  # type: ignore[arg-type]
    assert set(stacked.names()) == {"model.norm.weight", "m.mlp.experts.gate_up_proj", "m.mlp.experts.down_proj"}
    assert has_single_experts(tensors)
    assert not has_single_experts(stacked.names())
    gate_up, down = stacked.get("m.mlp.experts.gate_up_proj"), stacked.get("m.mlp.experts.down_proj")
    assert tuple(gate_up.shape) == stacked.shape("m.mlp.experts.gate_up_proj") == (11, 4, 4)
    assert tuple(down.shape) == stacked.shape("m.mlp.experts.down_proj") == (11, 4, 2)
    for i in range(11):
        assert torch.equal(gate_up[i, :2], tensors[f"m.mlp.experts.{i}.gate_proj.weight"])
        assert torch.equal(gate_up[i, 2:], tensors[f"m.mlp.experts.{i}.up_proj.weight"])
        assert torch.equal(down[i], tensors[f"m.mlp.experts.{i}.down_proj.weight"])
    assert stacked.get("model.norm.weight") is tensors["model.norm.weight"]


@pytest.mark.parametrize("missing", ["m.mlp.experts.1.up_proj.weight", "m.mlp.experts.2.gate_proj.weight"])
def test_missing_experts_are_named(missing: str) -> None:
    tensors = experts()
    del tensors[missing]
    with pytest.raises(FormatError, match=r"m\.mlp\.experts has"):
        StackedExperts(Tensors(tensors))  # type: ignore[arg-type]


def test_experts_of_unlike_shapes_are_refused() -> None:
    tensors = experts()
    tensors["m.mlp.experts.1.down_proj.weight"] = torch.randn(4, 3)
    stacked = StackedExperts(Tensors(tensors))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="down_proj"):
        stacked.shape("m.mlp.experts.down_proj")
