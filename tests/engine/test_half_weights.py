"""A model whose 16-bit floats stay as they are stored computes what it computes with them widened to float32."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.context import packed_context
from engine.core import half_weights
from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.engine import Engine
from engine.jobs import QuantizeSpec, TrainFinished
from engine.layers.linear import Embedding, Linear
from engine.lora.adapter import Adapter, LoRABatch
from engine.ops import cpu
from engine.quantization.half import HalfPrecision
from tests.bench.work import run_job
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.training_runs import events_of, load_tiny, make_spec, random_examples
from tests.unit.loading_files import llama_metadata, llama_tensors, write_gguf

IDS = torch.randint(3, 30, (39,), generator=torch.Generator().manual_seed(0)).tolist()
HALF_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def save(kind: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model in a 16-bit type."""
    if kind in ("F16", "BF16"):
        tensors = llama_tensors()
        types = {name: gguf.GGMLQuantizationType[kind] for name, t in tensors.items() if t.ndim == 2}
        directory.mkdir()
        return write_gguf(directory / "model.gguf", tensors, "llama", llama_metadata(), types)
    if kind == "bert":
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        sizes = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
        BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(directory)
    elif kind == "experts":
        save_tiny_hybrid(directory, experts=True)
    else:
        save_tiny_llama(directory, tie_word_embeddings=kind == "tied")
    narrow(directory, dtype)
    return directory


def narrow(directory: Path, dtype: torch.dtype) -> None:
    """Rounds what a directory has to a 16-bit type."""
    file = directory / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def load(path: Path, mode: str, dtype: str = "float32") -> LoadedModel:
    engine = Engine(EngineConfig(device="cpu", dtype=dtype, half_weights=mode, num_threads=1, kv_cache_bytes=1 << 22))  # type: ignore[arg-type]
    engine.load_model("m", path)
    return engine._models["m"]


def results(loaded: LoadedModel, ids: list[int]) -> Tensor:
    """Logits, or an encoder's hidden states."""
    if loaded.config.task == "generate":
        return serving_logits(loaded, [ids])[0]
    with torch.no_grad():
        states: Tensor = loaded.model(torch.tensor(ids), packed_context([len(ids)], causal=False))
    return states


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "bf16"), ("llama", "f16"), ("tied", "bf16"), ("experts", "bf16"), ("bert", "f16"), ("F16", "f16"),
     ("BF16", "bf16")],
)  # fmt: skip
def test_results_are_those_of_wide_weights(
    tmp_path: Path, kind: str, name: str, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, some and many; with our kernels to the bit, as they are the same, and with torch alone."""
    if with_kernels and not cpu.available():
        pytest.skip("the CPU kernels were not built or this CPU lacks AVX2")
    if not with_kernels:
        monkeypatch.setattr(cpu.library, "_library", None)
    path = save(kind, tmp_path / "model", HALF_TYPES[name])
    stored, wide = load(path, "stored"), load(path, "float")
    assert (stored.info.quantization, wide.info.quantization) == (name, "none")
    assert stored.info.num_parameters == wide.info.num_parameters
    assert stored.info.weights_digest == wide.info.weights_digest
    held = [m for m in stored.model.modules() if isinstance(m, Linear | Embedding)]
    assert all(m.get_parameter("weight").dtype == HALF_TYPES[name] for m in held)
    saved = 2 * sum(m.in_features * m.out_features for m in held)
    assert stored.info.weights_bytes == wide.info.weights_bytes - saved
    for ids in (IDS[:1], IDS[:5], IDS):
        ours, expected = results(stored, ids), results(wide, ids)
        if with_kernels and kind != "bert":  # torch adds the bias within the wide product
            assert torch.equal(ours, expected)
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    if stored.config.task == "generate":
        hidden = torch.randn(40, stored.config.hidden_size)
        part = stored.causal_lm().compute_logits_part(hidden, 3, 29)
        torch.testing.assert_close(part, wide.causal_lm().compute_logits(hidden)[:, 3:29], rtol=1e-5, atol=1e-5)


def test_auto_keeps_them_where_kernels_multiply_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("llama", tmp_path / "model")
    assert load(path, "auto").info.quantization == ("bf16" if cpu.available() else "none")
    assert load(path, "auto", "auto").info.quantization == ("bf16" if cpu.available() else "none")
    assert load(path, "stored", "bfloat16").info.quantization == "none", "computed in the type that is stored"
    assert load(save_tiny_llama(tmp_path / "wide"), "stored").info.quantization == "none", "stored in float32"
    monkeypatch.setattr(cpu.library, "_library", None)
    assert load(path, "auto").info.quantization == "none"


def test_they_leave_the_map_for_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for embeddings of which only rows are read, and where the system has none."""
    monkeypatch.setattr(half_weights, "MIN_BYTES", 0)
    for kind, copied_embeddings in (("llama", False), ("tied", True)):
        model = load(save(kind, tmp_path / kind), "stored").model
        for given in (False, True):
            monkeypatch.setattr(half_weights, "are_given", lambda given=given: given)
            modules = [m for m in model.modules() if isinstance(m.__dict__.get("scheme"), HalfPrecision)]
            before = [(m.weight.data_ptr(), m.weight.clone()) for m in modules]
            half_weights.copy_halves(model)
            for module, (place, values) in zip(modules, before, strict=True):
                assert torch.equal(module.weight, values)
                moves = given and (isinstance(module, Linear) or copied_embeddings)
                assert (module.weight.data_ptr() != place) == moves


@pytest.mark.parametrize("name", HALF_TYPES)
def test_lora_trains_over_them(tmp_path: Path, name: str) -> None:
    """Gradients of A and B are those over the wide weights."""
    path = save("tied", tmp_path / "model", HALF_TYPES[name])
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
        }
        adapter = Adapter(name="a", version=1, rank=4, alpha=0.1, modules=modules)
        ctx = packed_context([len(IDS)], lora=LoRABatch([(adapter, 0, len(IDS))], len(IDS)))
        model.compute_logits(model(torch.tensor(IDS), ctx)).square().mean().backward()
        gradients.append([t.grad for pair in modules.values() for t in pair])
    for ours, expected in zip(*gradients, strict=True):
        assert ours is not None
        assert expected is not None
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("compute", ["auto", "bfloat16"])
def test_a_run_proves_its_forward(tmp_path: Path, compute: str) -> None:
    """Where serving may round activations, which it does for integers alone; and in the type that is stored."""
    path = save("llama", tmp_path / "model")
    loaded = load_tiny(path, tmp_path / "state", half_weights="stored")
    spec = make_spec(tmp_path, random_examples([20, 30]), max_steps=1, compute_dtype=compute)
    assert isinstance(events_of(spec, loaded)[-1], TrainFinished)


def test_what_is_quantized_from_them_is_the_same(tmp_path: Path) -> None:
    path = save("llama", tmp_path / "model")
    files = []
    for mode in ("stored", "float"):
        engine = Engine(EngineConfig(device="cpu", half_weights=mode, num_threads=1, kv_cache_bytes=1 << 22))  # type: ignore[arg-type]
        engine.load_model("m", path)
        output = tmp_path / mode
        run_job(
            engine,
            QuantizeSpec(job_id=mode, model="m", scheme="q8", output_dir=str(output), output_name="n", load=False),
        )
        files.append((output / "model.safetensors").read_bytes())
    assert files[0] == files[1]
