"""Qwen3.5, dense and with experts, against transformers: through our loader, with tiny random configurations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from engine.context import packed_context
from engine.core.batch import pack
from engine.core.memory import make_cache, make_states
from engine.models.base import CausalLM
from tests.parity.loading import TOLERANCE, assert_same_logits, randomize, through_our_loader, token_ids

torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "eos_token_id": 2,
}
DENSE: dict[str, Any] = {**SIZES, "intermediate_size": 72}
MOE: dict[str, Any] = {
    **SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}
LENGTHS = [1, 2, 31, 33, 64, 65, 130]  # around the chunk sizes, ours and theirs


@torch.no_grad()
def quieten(reference: Any) -> Any:
    """Halves the matrices: else the residual stream grows to tens within four layers, and rounding with it."""
    for parameter in reference.parameters():
        if parameter.dim() > 1:
            parameter.mul_(0.5)
    return reference


def prepared(reference: Any, seed: int) -> Any:
    """Random values everywhere, and decays as a trained model has them: from nearly none to nearly all."""
    randomize(reference, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.empty(parameter.shape).uniform_(-4, 2, generator=generator))
    return quieten(reference)


def make(kind: str, seed: int) -> Any:
    """The default configuration, "dense" or "moe"."""
    if kind == "dense":
        return prepared(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**DENSE)), seed)
    return prepared(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**MOE)), seed)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
        {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 2},
        {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
        {"attention_bias": True, "rms_norm_eps": 1e-3},
        {"layer_types": ["linear_attention"] * 3, "num_hidden_layers": 3},
        {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
        {"layer_types": ["full_attention", "linear_attention"] * 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 1.0}},
        {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
    ],
    ids=[
        "default", "three_values_to_a_key", "equal_heads", "mqa_tied", "biases", "linear_only", "full_only",
        "full_first", "half_rotary", "whole_rotary", "mrope",
    ],
)  # fmt: skip
def test_dense(tmp_path: Path, options: dict[str, Any]) -> None:
    """Each fact that the configuration may state; sequences of unlike lengths packed in one forward."""
    reference = prepared(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**DENSE, **options})), 1)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_experts_per_tok": 6}, {"num_experts": 33, "num_experts_per_tok": 3, "tie_word_embeddings": True}],
    ids=["default", "all_experts", "many_experts"],
)
def test_moe(tmp_path: Path, options: dict[str, Any]) -> None:
    """Experts are read from single tensors, as transformers writes them."""
    reference = prepared(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**MOE, **options})), 2)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97))


def test_moe_without_renormalisation(tmp_path: Path) -> None:
    """norm_topk_prob false: the weights stay those of the softmax over all experts; transformers' block is told so by
    scaling what it renormalised."""
    reference = prepared(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**MOE)), 3)
    reference.config.norm_topk_prob = False
    model = through_our_loader(reference, tmp_path)
    assert model.config.moe is not None
    assert not model.config.moe.normalize_top_k

    def unnormalise(module: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, experts = output
        return logits, weights * logits.softmax(-1).gather(-1, experts).sum(-1, keepdim=True), experts

    for layer in reference.model.layers:
        layer.mlp.gate.register_forward_hook(unnormalise)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97))


def test_stacked_experts_load_as_they_are(tmp_path: Path) -> None:
    """The published checkpoints store stacked experts under the multimodal model's prefix."""
    from safetensors.torch import save_file

    reference = prepared(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**MOE)), 4)
    model = through_our_loader(reference, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in reference.state_dict().items()}
    tensors["mtp.fc.weight"] = torch.zeros(2, 2)
    tensors["model.visual.patch_embed.weight"] = torch.zeros(2, 2)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    from tests.parity.loading import load

    again = load(tmp_path)
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }


def test_language_model_of_the_multimodal_checkpoint(tmp_path: Path) -> None:
    """A nested configuration and names under the multimodal model's prefix; the vision tower is passed over."""
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 40,
        "num_position_embeddings": 16,
    }
    nested = Qwen3_5Config(text_config={**DENSE}, vision_config=vision, tie_word_embeddings=True)
    reference = prepared(Qwen3_5ForConditionalGeneration(nested), 5)
    model = through_our_loader(reference, tmp_path)
    assert model.config.model_type == "qwen3_5_text"
    assert model.config.eos_token_ids == (2,)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_lengths_around_the_chunk_sizes(tmp_path: Path, kind: str) -> None:
    """One token less than one and two chunks, as many, and one more, packed in one forward."""
    reference = make(kind, 8)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids([63, 64, 65, 127, 128, 129], 97))


@pytest.mark.parametrize(
    "options",
    [
        {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "moe_intermediate_size": 12},
        {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2, "shared_expert_intermediate_size": 8},
        {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "num_experts_per_tok": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 1.0}},
    ],
    ids=["three_values_to_a_key", "linear_only", "full_only", "half_rotary", "whole_rotary"],
)
def test_moe_of_odd_shapes(tmp_path: Path, options: dict[str, Any]) -> None:
    """With experts, what test_dense has of layers and heads."""
    reference = prepared(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**MOE, **options})), 9)
    model = through_our_loader(reference, tmp_path)
    assert_same_logits(model, reference, token_ids(LENGTHS, 97))


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_chunked_prefill_at_random_cuts(tmp_path: Path, kind: str, seed: int) -> None:
    """A batch of unequal lengths, of which each step takes some tokens of some sequences, from single ones to more than
    a chunk, through block cache and states: every logit is that of transformers for the whole sequence."""
    reference = make(kind, 7)
    model = through_our_loader(reference, tmp_path)
    assert isinstance(model, CausalLM)
    sequences = [ids.tolist() for ids in token_ids([129, 65, 3, 64, 40], 97, seed)]
    cpu, block_size = torch.device("cpu"), 8
    counts = [-(-len(ids) // block_size) for ids in sequences]
    firsts = [1 + sum(counts[:s]) for s in range(len(counts))]
    tables = [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]
    cache = make_cache(model.config, model.num_attention_layers, 1 + sum(counts), block_size, cpu, torch.float32)
    states = make_states(model.config, model.num_recurrent_layers, 1 + len(sequences), cpu)
    generator = random.Random(seed)
    done, parts = [0] * len(sequences), [list[Tensor]() for _ in sequences]
    while any(d < len(ids) for d, ids in zip(done, sequences, strict=True)):
        takes = [
            (s, min(generator.choice([0, 1, 1, 2, 7, 31, 33, 70]), len(ids) - done[s]))
            for s, ids in enumerate(sequences)
        ]
        takes = [(s, n) for s, n in takes if n] or [
            next((s, 1) for s, ids in enumerate(sequences) if done[s] < len(ids))
        ]
        packed, ctx = pack(
            [sequences[s][done[s] : done[s] + n] for s, n in takes],
            [done[s] for s, _ in takes],
            [tables[s] for s, _ in takes],
            [None] * len(takes),
            cache,
            cpu,
            states=states,
            state_slots=[1 + s for s, _ in takes],
        )
        for (s, n), hidden in zip(takes, model(packed, ctx).split([n for _, n in takes]), strict=True):
            parts[s].append(hidden)
            done[s] += n
    for ids, hidden in zip(sequences, parts, strict=True):
        expected = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        assert (model.compute_logits(torch.cat(hidden)) - expected).abs().max() < TOLERANCE, len(ids)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_layer(tmp_path: Path, kind: str) -> None:
    """The output of each decoder layer and of each token mixer, not of the last alone."""
    reference = make(kind, 6)
    model = through_our_loader(reference, tmp_path)
    assert isinstance(model, CausalLM)
    sequences = token_ids(LENGTHS, 97)
    seen: dict[str, list[Tensor]] = {}

    def watch(prefix: str, layers: Any) -> None:
        for index, layer in enumerate(layers):
            mixer = "linear_attn" if hasattr(layer, "linear_attn") else "self_attn"
            for name, module in ((f"{index}", layer), (f"{index}.{mixer}", getattr(layer, mixer))):
                key = f"{prefix}{name}"
                module.register_forward_hook(
                    lambda _m, _a, out, key=key: seen.setdefault(key, []).append(
                        (out[0] if isinstance(out, tuple) else out).reshape(-1, 40)
                    )
                )

    watch("ours.", model.model.layers)  # type: ignore[union-attr, arg-type]
    watch("theirs.", reference.model.layers)
    model(torch.cat(sequences), packed_context(LENGTHS))
    for sequence in sequences:
        reference(input_ids=sequence[None], use_cache=False)
    for name in [f"{i}{suffix}" for i in range(4) for suffix in ("", ".self_attn" if i == 3 else ".linear_attn")]:
        ours, theirs = seen[f"ours.{name}"][0], torch.cat(seen[f"theirs.{name}"])
        assert theirs.std() > 0.01, name
        assert (ours - theirs).abs().max() < TOLERANCE, name
