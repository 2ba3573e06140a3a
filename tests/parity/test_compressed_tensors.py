"""Quantized checkpoints against compressed-tensors: what we write loads there, what it writes loads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.context import packed_context
from engine.engine import Engine
from engine.jobs import JobFailed, QuantizeFinished, QuantizeSpec
from engine.layers.linear import Embedding, Linear
from engine.loading import load_weights, open_checkpoint
from engine.models.base import CausalLM, build_model
from engine.quantization.base import scheme_map
from engine.tokenizer import Tokenizer
from tests.tiny import save_tiny_llama

TOLERANCE = 1e-4
"""Largest accepted absolute difference of logits in float32; they are of the size of 10."""


def load(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint.config, scheme_map(checkpoint.config.quantization_config), dtype)
    load_weights(model, checkpoint, dtype, torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            module.scheme.after_loading(module)
    assert isinstance(model, CausalLM)
    return model.eval()


@torch.no_grad()
def logits(model: CausalLM, ids: Tensor) -> Tensor:
    return model.compute_logits(model(ids, packed_context([len(ids)])))


def quantize(source: Path, output: Path, **options: Any) -> QuantizeFinished:
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=4 << 20, num_threads=2))
    engine.load_model("source", source)
    engine.start_job(
        QuantizeSpec(job_id="1", model="source", output_dir=str(output), output_name="out", load=False, **options)
    )
    event = None
    while engine.has_jobs():
        for event in engine.advance_jobs():
            assert not isinstance(event, JobFailed), event
    assert isinstance(event, QuantizeFinished)
    return event


OPTIONS: dict[str, dict[str, Any]] = {
    "q8": {"scheme": "q8"},
    "q8-all": {"scheme": "q8", "quantize_embeddings": True, "quantize_head": True},
    "q4-32": {"scheme": "q4", "group_size": 32},
    "q4-64-asymmetric": {"scheme": "q4", "group_size": 64, "symmetric": False},
    "q4-32-head": {"scheme": "q4", "group_size": 32, "quantize_head": True},
    "q4-32-all-asymmetric": {
        "scheme": "q4",
        "group_size": 32,
        "symmetric": False,
        "quantize_embeddings": True,
        "quantize_head": True,
    },
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_transformers_loads_what_we_write_and_gives_our_logits(tmp_path: Path, name: str, tied: bool) -> None:
    """As it dequantizes while loading, and, where it can, as it keeps the weights packed until the first forward.

    With compressed-tensors 0.20 transformers 5.23 cannot keep packed zero points or packed embeddings, whoever wrote
    them: the one has the unpacked shape on the meta device, the other an initialiser that wants ``weight``.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = save_tiny_llama(tmp_path / "source", intermediate_size=128, tie_word_embeddings=tied)
    output = tmp_path / "out"
    quantize(source, output, **OPTIONS[name])
    ids = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    ours = logits(load(output), ids)
    assert float((ours - logits(load(source), ids)).abs().max()) > 0.01, "nothing was quantized"
    options: list[dict[str, Any]] = [{"quantization_config": CompressedTensorsConfig(dequantize=True)}]
    if OPTIONS[name].get("symmetric", True) and not OPTIONS[name].get("quantize_embeddings"):
        options.append({})
    for extra in options:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            output, dtype=torch.float32, output_loading_info=True, **extra
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            assert float((theirs(ids[None]).logits[0] - ours).abs().max()) < TOLERANCE


def compress(directory: Path, scheme: dict[str, Any], *, form: str | None = None, embeddings: bool = False) -> Any:
    """A tiny Llama that compressed-tensors itself quantizes and writes; returns its decompressed weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    source = save_tiny_llama(directory.with_name("source"), intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    targets = ["Linear", "Embedding"] if embeddings else ["Linear"]
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": targets, "weights": scheme}}, ignore=[] if embeddings else ["lm_head"]
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            arguments = module.quantization_scheme.weights
            grouped = module.weight.detach().unflatten(-1, (-1, scheme.get("group_size") or module.weight.shape[-1]))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    compressor.decompress_model(model)
    return model.eval()


@pytest.mark.parametrize(
    ("scheme", "form", "embeddings"),
    [
        ({"num_bits": 8, "strategy": "channel"}, None, False),
        ({"num_bits": 8, "strategy": "channel"}, "int-quantized", False),
        ({"num_bits": 4, "strategy": "group", "group_size": 32}, None, True),
        ({"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}, None, False),
    ],
    ids=["q8-packed", "q8-int", "q4", "q4-asymmetric"],
)
def test_what_compressed_tensors_writes_loads_with_equal_weights(
    tmp_path: Path, scheme: dict[str, Any], form: str | None, embeddings: bool
) -> None:
    reference = compress(tmp_path / "out", scheme, form=form, embeddings=embeddings)
    ours = load(tmp_path / "out")
    weights = dict(reference.named_parameters())
    compared = 0
    for module in ours.modules():
        if isinstance(module, Linear | Embedding) and module.scheme.name != "none":
            assert torch.equal(module.scheme.dequantize(module), weights[f"{module.name}.weight"]), module.name
            compared += 1
    assert compared == (16 if embeddings else 14)
    ids = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((reference(ids[None]).logits[0] - logits(ours, ids)).abs().max()) < TOLERANCE


def test_a_gguf_source_becomes_a_directory_that_transformers_loads(tmp_path: Path, smollm2_gguf: Path) -> None:
    """Configuration, weights and tokenizer of SmolLM2, of which the source has no Hugging Face file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "smollm2-q8"
    report = quantize(smollm2_gguf, output, scheme="q8")
    assert report.bytes_in == smollm2_gguf.stat().st_size
    assert report.bytes_out == (output / "model.safetensors").stat().st_size
    config = AutoConfig.from_pretrained(output)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    text = "The capital of France is"
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert ids.tolist() == Tokenizer.from_path(smollm2_gguf).encode(text)
    assert tokenizer.chat_template
    # Packed until the first forward: dequantizing while loading would round each weight to the scales' bfloat16.
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    del theirs
    ours = logits(load(output), ids)
    assert float((ours - expected).abs().max()) < 1e-3
    assert tokenizer.decode(ours[-1].argmax()).strip() == "Paris"
