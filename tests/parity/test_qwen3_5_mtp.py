"""Qwen3.5's head for multi-token prediction against one that is put together of transformers' layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

from engine.config import EngineConfig
from engine.context import packed_context
from engine.engine import Engine
from engine.errors import FormatError, ShapeError
from engine.jobs import LoRAParams, QuantizeFinished, QuantizeSpec
from engine.lora.adapter import LoRABatch
from engine.models.qwen3_5_text import Qwen3_5ForCausalLM as OurModel
from engine.training.lora_init import new_adapter
from tests.mtp_reference import ReferenceMTP, add_mtp
from tests.parity.loading import TOLERANCE, assert_same_logits, load, packed_hidden, token_ids
from tests.tiny import save_tiny_hybrid
from tests.training_runs import load_tiny

torch.set_num_threads(1)

LENGTHS = [3, 4, 34, 67, 12]
SEQUENCES = token_ids(LENGTHS, 300)


def checkpoint(path: Path, kind: str, model: dict[str, Any] | None = None, **head: Any) -> tuple[Any, ReferenceMTP]:
    """transformers' model and the head, both saved at the path."""
    save_tiny_hybrid(path, experts=kind == "moe", initializer_range=0.1, **(model or {}))
    cls: Any = Qwen3_5MoeForCausalLM if kind == "moe" else Qwen3_5ForCausalLM
    reference = cls.from_pretrained(path, dtype=torch.float32).eval()
    return reference, add_mtp(path, reference.config, **head)


def ours(path: Path) -> OurModel:
    model = load(path)
    assert isinstance(model, OurModel)
    return model


@torch.no_grad()
def drafted(model: OurModel, hidden: list[Tensor], sequences: list[Tensor], step: int = 0) -> list[Tensor]:
    """Our head over all sequences in one packed forward; row t of each has token t + 1 + step."""
    lengths = [len(rows) for rows in hidden]
    following = torch.cat([ids[1 + step : 1 + step + n] for ids, n in zip(sequences, lengths, strict=True)])
    return list(model.mtp_hidden(torch.cat(hidden), following, packed_context(lengths), step).split(lengths))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    ("base", "head"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True, "attention_bias": True}, {"dedicated": True}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}, {"seed": 3}),
    ],
    ids=["shared", "dedicated_tied_biased", "half_rotary"],
)
def test_drafts_equal_the_reference(tmp_path: Path, kind: str, base: dict[str, Any], head: dict[str, Any]) -> None:
    """Logits of the tokens after the next ones, all sequences packed here, one at a time there; and the base model's
    logits are what they were without the head."""
    reference, mtp = checkpoint(tmp_path, kind, base, **head)
    model = ours(tmp_path)
    assert_same_logits(model, reference, SEQUENCES)
    hidden = [rows[:-1] for rows in packed_hidden(model, SEQUENCES)]
    for ids, rows in zip(SEQUENCES, drafted(model, hidden, SEQUENCES), strict=True):
        states = reference.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        expected = reference.lm_head(mtp(states[:-1], ids[1:], reference.model.embed_tokens))
        assert expected.std() > 0.05
        assert (model.compute_logits(rows) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_second_layer_drafts_from_the_first(tmp_path: Path) -> None:
    """Step 1 takes step 0's states and the tokens one further, through the second layer."""
    reference, mtp = checkpoint(tmp_path, "dense", num_layers=2)
    model = ours(tmp_path)
    assert model.num_mtp_layers == 2
    hidden = [rows[:-2] for rows in packed_hidden(model, SEQUENCES)]
    second = drafted(model, drafted(model, hidden, SEQUENCES), SEQUENCES, step=1)
    embed = reference.model.embed_tokens
    for ids, rows in zip(SEQUENCES, second, strict=True):
        states = reference.model(input_ids=ids[None], use_cache=False).last_hidden_state[0][:-2]
        expected = mtp(mtp(states, ids[1:-1], embed), ids[2:], embed, step=1)
        assert (rows - expected).abs().max() < TOLERANCE


def test_gradients_of_the_head(tmp_path: Path) -> None:
    """Training the head: gradients of its weights and of the states it reads are those of the reference."""
    reference, mtp = checkpoint(tmp_path, "dense")
    model = ours(tmp_path)
    ids = SEQUENCES[3]
    hidden = packed_hidden(model, [ids])[0][:-2]
    grads = []
    for forward, head in (
        (lambda h: model.mtp_hidden(h, ids[1:-1], packed_context([len(h)])), model.mtp),
        (lambda h: mtp(h, ids[1:-1], reference.model.embed_tokens), mtp),
    ):
        assert head is not None
        head.requires_grad_()
        states = hidden.clone().requires_grad_()
        logits = torch.nn.functional.linear(forward(states), reference.lm_head.weight.detach())
        torch.nn.functional.cross_entropy(logits, ids[2:]).backward()  # type: ignore[no-untyped-call]
        grads.append({name: p.grad for name, p in head.named_parameters()} | {"hidden": states.grad})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[1].items():
        assert expected is not None
        assert expected.norm() > 1e-6, name
        assert (grads[0][name] - expected).norm() < 1e-4 * expected.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_stored_under_the_published_names(tmp_path: Path, kind: str) -> None:
    """The head's tensors are the published ones, none more; experts that are stored one by one give the same model."""
    checkpoint(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    names = {name for name in tensors if name.startswith("mtp.")}
    model = ours(tmp_path)
    assert {name for name in model.state_dict() if name.startswith("mtp.")} == names
    layer = "mtp.layers.0."
    plain = {"fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"}
    assert {f"mtp.{name}.weight" for name in plain} == {name for name in names if not name.startswith(layer)}
    if kind == "moe":
        prefix = f"{layer}mlp.experts."
        gate_up, down = tensors.pop(f"{prefix}gate_up_proj"), tensors.pop(f"{prefix}down_proj")
        for i, (both, third) in enumerate(zip(gate_up, down, strict=True)):
            gate, up = both.chunk(2)
            for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", third)):
                tensors[f"{prefix}{i}.{part}.weight"] = value.clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again = ours(tmp_path).state_dict()
        assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_what_the_file_has_is_loaded(tmp_path: Path) -> None:
    """An announced head of which the file has nothing leaves a model without one, one that is there in part or of
    another shape is an error, and one that is not announced is passed over."""
    checkpoint(tmp_path, "dense")
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    assert load_tiny(tmp_path, tmp_path / "state").info.num_mtp_layers == 1

    def store(changed: dict[str, Tensor]) -> None:
        save_file(changed, file, metadata={"format": "pt"})

    store({name: t for name, t in tensors.items() if name != "mtp.norm.weight"})
    with pytest.raises(FormatError, match=r"mtp\.norm\.weight"):
        load(tmp_path)
    store(tensors | {"mtp.fc.weight": torch.zeros(64, 64)})
    with pytest.raises(ShapeError, match=r"mtp\.fc\.weight"):
        load(tmp_path)
    store({name: t for name, t in tensors.items() if not name.startswith("mtp.")})
    info = load_tiny(tmp_path, tmp_path / "state").info
    assert (info.num_mtp_layers, ours(tmp_path).mtp) == (0, None)
    store(tensors)
    values = json.loads(config.read_text())
    config.write_text(json.dumps({name: v for name, v in values.items() if not name.startswith("mtp_")}))
    assert ours(tmp_path).num_mtp_layers == 0


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_adapters_and_caches_leave_the_head_alone(tmp_path: Path, kind: str) -> None:
    """What adapters target, the layers of the cache, and drafts under an adapter are as without a head."""
    base = save_tiny_hybrid(tmp_path / "base", experts=kind == "moe", initializer_range=0.1)
    checkpoint(tmp_path / "with", kind)
    plain, loaded = load_tiny(base, tmp_path / "a"), load_tiny(tmp_path / "with", tmp_path / "b")
    assert plain.model.lora_targets().keys() == loaded.model.lora_targets().keys()
    model = loaded.model
    assert isinstance(model, OurModel)
    assert model.num_attention_layers == plain.causal_lm().num_attention_layers == 1
    assert loaded.info.kv_cache_bytes == plain.info.kv_cache_bytes
    assert loaded.info.linear_modules == plain.info.linear_modules
    assert loaded.info.num_parameters - plain.info.num_parameters == sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("mtp.")
    )
    adapter = new_adapter("tone", model.linears(), LoRAParams(rank=2, alpha=4.0), 0, "cpu")
    ids = SEQUENCES[2]
    hidden = packed_hidden(model, [ids])[0][:-1]
    ctx = packed_context([len(hidden)], lora=LoRABatch([(adapter, 0, len(hidden))], len(hidden)))
    with torch.no_grad():
        assert torch.equal(model.mtp_hidden(hidden, ids[1:], ctx), drafted(model, [hidden], [ids])[0])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_quantized_copy_keeps_the_head(tmp_path: Path, kind: str) -> None:
    """Its linears are quantized as all others are, it drafts nearly as before, and transformers loads the copy."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    checkpoint(tmp_path / "source", kind, {"tie_word_embeddings": True}, dedicated=True)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=4 << 20, num_threads=1))
    engine.load_model("tiny", tmp_path / "source")
    spec = QuantizeSpec(
        job_id="1", model="tiny", scheme="q8", output_name="out", output_dir=str(tmp_path / "out"), quantize_head=True
    )
    engine.start_job(spec)
    events: list[Any] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    assert isinstance(events[-1], QuantizeFinished), events[-1]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {"mtp.fc.weight_packed", "mtp.layers.0.self_attn.q_proj.weight_scale", "mtp.norm.weight"} <= stored.keys()
    assert "mtp.embed_tokens.weight" in stored
    source, quantized = ours(tmp_path / "source"), load_tiny(tmp_path / "out", tmp_path / "state").model
    assert isinstance(quantized, OurModel)
    assert quantized.num_mtp_layers == 1
    hidden = [rows[:-1] for rows in packed_hidden(source, SEQUENCES)]
    for before, after in zip(drafted(source, hidden, SEQUENCES), drafted(quantized, hidden, SEQUENCES), strict=True):
        assert 0 < (before - after).norm() < 0.05 * before.norm()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert_same_logits(quantized, theirs.eval(), SEQUENCES)
