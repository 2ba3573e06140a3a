"""A GGUF model whose quantized weights stay as the file has them computes what it computes with them wide."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.context import packed_context
from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.engine import Engine
from engine.layers.linear import Embedding, Linear
from engine.lora.adapter import Adapter, LoRABatch
from engine.ops import cpu
from tests.unit.loading_files import llama_metadata, llama_tensors, write_gguf

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
IDS = [
    3,
    1,
    4,
    1,
    5,
    9,
    2,
    6,
    5,
    3,
    5,
    8,
    9,
    7,
    9,
    3,
    2,
    3,
    8,
    4,
    6,
    2,
    6,
    4,
    3,
    3,
    8,
    3,
    2,
    7,
    9,
    5,
    0,
    2,
    8,
    8,
    4,
    1,
    9,
]


def write(path: Path, kind: str) -> Path:
    tensors = llama_tensors()
    types = {name: gguf.GGMLQuantizationType[kind] for name, t in tensors.items() if t.ndim == 2}
    return write_gguf(path / f"{kind}.gguf", tensors, "llama", llama_metadata(), types)


def load(path: Path, mode: str, dtype: str = "float32") -> LoadedModel:
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, gguf_weights=mode, num_threads=1, kv_cache_bytes=1 << 22))  # type: ignore[arg-type]
    engine.load_model("m", path)
    return engine._models["m"]


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_wide_weights(
    tmp_path: Path, kind: str, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows and many, with our kernels and with torch alone."""
    if with_kernels and not cpu.available():
        pytest.skip("the CPU kernels were not built or this CPU lacks AVX2")
    if not with_kernels:
        monkeypatch.setattr(cpu.library, "_library", None)
    path = write(tmp_path, kind)
    stored, wide = load(path, "stored"), load(path, "float")
    assert stored.info.quantization == kind.lower()
    assert wide.info.quantization == "none"
    assert stored.info.num_parameters == wide.info.num_parameters
    for ids in (IDS[:1], IDS[:5], IDS):
        (ours,), (expected,) = serving_logits(stored, [ids]), serving_logits(wide, [ids])
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    hidden = torch.randn(40, stored.config.hidden_size)
    part = stored.causal_lm().compute_logits_part(hidden, 3, 29)
    torch.testing.assert_close(part, wide.causal_lm().compute_logits(hidden)[:, 3:29], rtol=1e-5, atol=1e-5)
    modules = dict(wide.model.named_modules())
    for name, module in stored.model.named_modules():
        if isinstance(module, Linear | Embedding):
            assert module.scheme.name == kind.lower()
            assert torch.equal(module.scheme.dequantize(module), modules[name].weight), name


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "Q4_0")
    stored, wide = load(path, "stored").info.weights_bytes, load(path, "float").info.weights_bytes
    assert stored < wide / 6


def test_auto_keeps_blocks_where_kernels_multiply_by_them(tmp_path: Path) -> None:
    path = write(tmp_path, "Q8_0")
    assert load(path, "auto").info.quantization == ("q8_0" if cpu.available() else "none")
    assert load(path, "auto", "bfloat16").info.quantization == "none"
    assert load(path, "stored", "bfloat16").info.quantization == "q8_0"


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_lora_trains_over_them(tmp_path: Path, kind: str) -> None:
    """Gradients of A and B are those over the wide weights."""
    path = write(tmp_path, kind)
    gradients = []
    for mode in ("stored", "float"):
        model = load(path, mode).causal_lm()
        generator = torch.Generator().manual_seed(0)
        modules = {
            name: (
                torch.randn(4, linear.in_features, generator=generator).requires_grad_(),
                torch.randn(linear.out_features, 4, generator=generator).requires_grad_(),
            )
            for name, linear in model.linears().items()
            if name != "lm_head"
        }
        adapter = Adapter(name="a", version=1, rank=4, alpha=0.1, modules=modules)
        ctx = packed_context([len(IDS)], lora=LoRABatch([(adapter, 0, len(IDS))], len(IDS)))
        model.compute_logits(model(torch.tensor(IDS), ctx)).square().mean().backward()
        gradients.append([t.grad for pair in modules.values() for t in pair])
    for ours, expected in zip(*gradients, strict=True):
        assert ours is not None
        assert expected is not None
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_types_without_kept_integers_are_made_wide(tmp_path: Path) -> None:
    tensors = llama_tensors()
    types = {
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.F16,
        "blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0,
    }
    path = write_gguf(tmp_path / "mixed.gguf", tensors, "llama", llama_metadata(), types)
    loaded = load(path, "stored")
    schemes = {name: m.scheme.name for name, m in loaded.model.named_modules() if isinstance(m, Linear)}
    kept = {name: scheme for name, scheme in schemes.items() if scheme != "none"}
    halves = {"model.layers.0.self_attn.q_proj": "f16"} if cpu.available() else {}
    assert kept == {"model.layers.0.mlp.up_proj": "q8_0"} | halves
    np.testing.assert_allclose(
        loaded.model.get_parameter("model.layers.1.mlp.up_proj.weight").numpy(), tensors["blk.1.ffn_up.weight"]
    )
