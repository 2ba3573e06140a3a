"""Merged models: logits are those of base and adapter, here, in transformers, and by peft's merge_and_unload."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import engine.merge as merging
from engine.config import EngineConfig
from engine.core.chunked import serving_logits
from engine.engine import Engine
from engine.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from engine.info import AdapterSource
from engine.jobs import (
    JobEvent,
    JobFailed,
    LoRAParams,
    MergeFinished,
    MergeProgress,
    MergeSpec,
    QuantizeFinished,
    QuantizeSpec,
    WeightedAdapter,
)
from engine.loading import open_checkpoint
from engine.lora.adapter import Adapter
from engine.training.lora_init import new_adapter
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.training_runs import random_examples

CONFIG = EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=4 << 20, num_threads=2)
PROMPTS = [e.token_ids for e in random_examples([12, 20, 9])]


def make_engine(source: Path, state: Path, **overrides: Any) -> Engine:
    engine = Engine(dataclasses.replace(CONFIG, state_dir=str(state), **overrides))
    engine.load_model("tiny", source)
    return engine


def publish(engine: Engine, name: str = "tone", *, model: str = "tiny", seed: int = 0, **lora: Any) -> Adapter:
    """An adapter with an effect, on every kind of module."""
    loaded = engine._model(model)
    params = LoRAParams(**({"rank": 4, "alpha": 6.0} | lora))
    adapter = new_adapter(name, loaded.model.lora_targets(), params, seed, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for a, b in adapter.modules.values():
        a.data.copy_(0.1 * torch.randn(a.shape, generator=generator))
        b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))
    loaded.adapters.publish(adapter)
    return loaded.adapters.read_exact(name)


def spec(output: Path, *adapters: WeightedAdapter, **values: Any) -> MergeSpec:
    return MergeSpec(
        **({"job_id": "1", "model": "tiny", "output_name": output.name, "output_dir": str(output)} | values),
        adapters=list(adapters or [WeightedAdapter(name="tone")]),
    )


def run(engine: Engine, spec: Any) -> list[JobEvent]:
    engine.start_job(spec)
    events: list[JobEvent] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    return events


def report(events: list[JobEvent]) -> MergeFinished:
    assert isinstance(events[-1], MergeFinished), events[-1]
    return events[-1]


def logits(engine: Engine, model: str, adapter: str | None = None) -> Tensor:
    loaded = engine._model(model)
    return torch.cat(serving_logits(loaded, PROMPTS, loaded.adapters.get(adapter) if adapter else None))


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS])


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(str(file)).items()}


MODELS: dict[str, Any] = {
    "llama": lambda path: save_tiny_llama(path),
    "llama, tied": lambda path: save_tiny_llama(path, tie_word_embeddings=True),
    "hybrid": lambda path: save_tiny_hybrid(path),
    "hybrid, tied": lambda path: save_tiny_hybrid(path, tie_word_embeddings=True),
    "experts": lambda path: save_tiny_hybrid(path, experts=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_model_says_what_base_and_adapter_say(tmp_path: Path, kind: str) -> None:
    """On every linear module, all in_proj_* of a delta net among them; and transformers loads it as it lies there."""
    from peft import PeftModel

    source = MODELS[kind](tmp_path / "source")
    engine = make_engine(source, tmp_path / "state")
    adapter = publish(engine, use_rslora=kind == "llama")
    if "hybrid" in kind:
        kinds = {module.rsplit(".", 1)[-1] for module in adapter.modules}
        assert kinds >= {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj", "down_proj"}
    expected = logits(engine, "tiny", "tone")
    finished = report(run(engine, spec(tmp_path / "merged")))
    assert (finished.num_merged, finished.dtype) == (len(adapter.modules), "float32")
    assert finished.adapters == [AdapterSource(name="tone", version=1, weight=1.0)]
    assert (logits(engine, "merged") - expected).abs().max() < 1e-4
    assert (expected - logits(engine, "tiny")).abs().max() > 0.05, "an adapter without effect would prove nothing"
    assert (reference_logits(reference(tmp_path / "merged")) - expected).abs().max() < 1e-3
    unloaded = PeftModel.from_pretrained(reference(source), str(engine.adapter_path("tiny", "tone"))).merge_and_unload()
    before, after, theirs = stored(source), stored(tmp_path / "merged"), unloaded.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in adapter.modules}
    for name in changed:
        assert torch.allclose(after[name], theirs[name], rtol=1e-5, atol=1e-6), name
    assert (reference_logits(unloaded) - reference_logits(reference(tmp_path / "merged"))).abs().max() < 1e-4
    change = sum(float((after[n] - before[n]).double().square().sum()) for n in changed)
    whole = sum(float(before[n].double().square().sum()) for n in changed)
    assert finished.relative_change == pytest.approx((change / whole) ** 0.5, rel=1e-3)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == {
        "base_model": "tiny",
        "base_digest": engine._model("tiny").info.weights_digest,
        "adapters": [{"name": "tone", "version": 1, "weight": 1.0}],
    }


@pytest.mark.parametrize("layout", ["single", "stacked"])
def test_experts_are_merged_in_the_layout_in_which_they_lie(tmp_path: Path, layout: str) -> None:
    """With LoRA on the experts themselves, whether the files have a tensor for each or all in one; everything that is
    not resident (mtp.*, a vision tower) is carried over as it is."""
    source = save_tiny_hybrid(tmp_path / "source", experts=True)
    tensors = stored(source)  # as transformers writes them: a tensor for each expert and part
    if layout == "stacked":
        checkpoint = open_checkpoint(source)
        tensors = {name: checkpoint.get(name).clone() for name in checkpoint.names()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors) == (layout == "stacked")
    extra = {"mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 3, 4), "mtp.fc.weight": torch.randn(3, 3)}
    extra["model.visual.patch_embed.weight"] = torch.randn(2, 5).bfloat16()
    tensors |= extra
    save_file(tensors, str(source / "model.safetensors"), metadata={"format": "pt"})
    engine = make_engine(source, tmp_path / "state")
    adapter = publish(engine, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], rank=2)
    assert "model.layers.0.mlp.experts.gate_up_proj" in adapter.modules
    expected = logits(engine, "tiny", "tone")
    finished = report(run(engine, spec(tmp_path / "merged")))
    assert (logits(engine, "merged") - expected).abs().max() < 1e-4
    assert (expected - logits(engine, "tiny")).abs().max() > 0.01
    after = stored(tmp_path / "merged")
    assert after.keys() == tensors.keys()
    changed = {name for name in tensors if not torch.equal(tensors[name], after[name])}
    assert len(changed) == finished.num_merged == (4 * 6 * 3 if layout == "single" else 4 * 2)
    assert all(".experts." in name for name in changed)
    assert all(torch.equal(after[name], value) for name, value in extra.items())


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """The sum of the weighted updates, as peft's cat combination has it; versions may be named."""
    engine = make_engine(save_tiny_llama(tmp_path / "source"), tmp_path / "state")
    publish(engine, "a", seed=1)
    publish(engine, "a", seed=3)
    publish(engine, "b", seed=2, rank=2, target_modules=["q_proj", "up_proj"])
    chosen = [WeightedAdapter(name="a", version=1, weight=0.75), WeightedAdapter(name="b", weight=-0.5)]
    engine.combine_adapters("tiny", "mixed", chosen)
    expected = logits(engine, "tiny", "mixed")
    finished = report(run(engine, spec(tmp_path / "merged", *chosen)))
    assert [(s.name, s.version, s.weight) for s in finished.adapters] == [("a", 1, 0.75), ("b", 1, -0.5)]
    assert (logits(engine, "merged") - expected).abs().max() < 1e-4


def test_the_type_of_the_base_is_kept_unless_another_is_chosen(tmp_path: Path) -> None:
    """A bfloat16 base gives bfloat16 rounded once from float32; dtype float32 keeps every bit of the sum."""
    source = save_tiny_llama(tmp_path / "source")
    tensors = {name: value.bfloat16() for name, value in stored(source).items()}
    save_file(tensors, str(source / "model.safetensors"), metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16"}))
    engine = make_engine(source, tmp_path / "state")
    adapter = publish(engine)
    finished = report(run(engine, spec(tmp_path / "kept")))
    wide = report(run(engine, spec(tmp_path / "wide", dtype="float32")))
    assert (finished.dtype, wide.dtype) == ("bfloat16", "float32")
    kept, chosen = stored(tmp_path / "kept"), stored(tmp_path / "wide")
    for module, (a, b) in adapter.modules.items():
        exact = tensors[f"{module}.weight"].float() + b @ (a * adapter.scaling(module))
        assert torch.allclose(chosen[f"{module}.weight"], exact, rtol=1e-6, atol=1e-7)
        assert torch.equal(kept[f"{module}.weight"], chosen[f"{module}.weight"].bfloat16())
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    assert chosen["model.norm.weight"].dtype == torch.bfloat16, "vectors keep their type"
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert (logits(engine, "wide") - logits(engine, "tiny", "tone")).abs().max() < 1e-4
    assert reference(tmp_path / "wide").dtype == torch.float32


@pytest.mark.parametrize("scheme", ["q4", "q8"])
def test_a_quantized_base_is_merged_in_floats(tmp_path: Path, scheme: str) -> None:
    """What the quantized weights stand for, plus the update; the new model is not quantized."""
    source = save_tiny_llama(tmp_path / "source", intermediate_size=128)
    engine = make_engine(source, tmp_path / "state")
    quantized = QuantizeSpec(
        job_id="q", model="tiny", scheme=scheme, output_dir=str(tmp_path / "small"), output_name="small",  # type: ignore[arg-type]
        quantize_head=True, quantize_embeddings=scheme == "q8",
    )  # fmt: skip
    assert isinstance(run(engine, quantized)[-1], QuantizeFinished)
    publish(engine, model="small")
    expected = logits(engine, "small", "tone")
    finished = report(run(engine, spec(tmp_path / "merged", model="small")))
    assert finished.dtype == "float32"
    assert engine._model("merged").info.quantization == "none"
    assert (logits(engine, "merged") - expected).abs().max() < 1e-4
    assert stored(tmp_path / "merged").keys() == stored(source).keys()
    assert (reference_logits(reference(tmp_path / "merged")) - expected).abs().max() < 1e-3


def test_a_gguf_base_is_merged_in_floats(tmp_path: Path, smollm2_gguf: Path) -> None:
    """SmolLM2's four bits become bfloat16, or float32 where that is asked for: then the logits are those of base and
    adapter, here and in transformers, and the tokenizer comes along."""
    from transformers import AutoTokenizer

    engine = Engine(dataclasses.replace(CONFIG, state_dir=str(tmp_path / "state"), kv_cache_bytes=32 << 20))
    engine.load_model("tiny", smollm2_gguf)
    publish(engine, rank=2, target_modules=["q_proj", "down_proj"], layers=[0, 5, 29])
    expected = logits(engine, "tiny", "tone")
    finished = report(run(engine, spec(tmp_path / "wide", dtype="float32")))
    assert (finished.num_merged, finished.dtype) == (6, "float32")
    assert (logits(engine, "wide") - expected).abs().max() < 1e-3
    assert (reference_logits(reference(tmp_path / "wide")) - expected).abs().max() < 1e-2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "wide")
    assert tokenizer.decode(tokenizer("Hello there")["input_ids"]) == "Hello there"
    assert tokenizer.chat_template
    narrow = report(run(engine, spec(tmp_path / "narrow", load=False)))
    assert narrow.dtype == "bfloat16"
    assert narrow.bytes_out < 0.51 * finished.bytes_out


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("merge") / "llama")


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("adapters", "values", "error", "field"), [
    ([WeightedAdapter(name="unknown")], {}, NotFoundError, "adapter"),
    ([WeightedAdapter(name="tone", version=7)], {}, NotFoundError, "adapter_version"),
    ([WeightedAdapter(name="tone", weight=float("nan"))], {}, InvalidArgumentError, "sources[0].weight"),
    ([WeightedAdapter(name="a/b")], {}, InvalidArgumentError, "sources[0].adapter.name"),
    ([WeightedAdapter(name="tone")] * 65, {}, InvalidArgumentError, "sources"),
    ([WeightedAdapter(name="tone")], {"dtype": "int8"}, InvalidArgumentError, "dtype"),
    ([WeightedAdapter(name="tone")], {"output_name": "../x"}, InvalidArgumentError, "output_name"),
])  # fmt: skip
def test_what_cannot_be_merged(
    source: Path, tmp_path: Path, adapters: list[WeightedAdapter], values: Mapping[str, Any], error: Any, field: str
) -> None:
    engine = make_engine(source, tmp_path / "state")
    publish(engine)
    with pytest.raises(error) as caught:
        engine.start_job(spec(tmp_path / "out" / "merged", *adapters, **values))
    assert caught.value.field == field
    assert not (tmp_path / "out").exists()


def test_a_taken_name_and_other_bases_are_refused(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source, tmp_path / "state")
    publish(engine)
    (tmp_path / "taken").mkdir()
    with pytest.raises(AlreadyExistsError):
        engine.start_job(spec(tmp_path / "taken"))
    with pytest.raises(InvalidArgumentError):
        engine.start_job(dataclasses.replace(spec(tmp_path / "merged"), adapters=[]))
    other = make_engine(save_tiny_llama(tmp_path / "other", seed=1), tmp_path / "state")
    named = WeightedAdapter(name="tone", version=1)
    with pytest.raises(FailedPreconditionError) as caught:
        other.start_job(spec(tmp_path / "merged", named))
    assert caught.value.reason == "ADAPTER_BASE_MISMATCH"
    report(run(other, spec(tmp_path / "merged", named, force=True)))


def test_a_weight_beyond_its_type_fails_the_job(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source, tmp_path / "state")
    publish(engine)
    huge = WeightedAdapter(name="tone", weight=1e9)
    (failed,) = [
        e for e in run(engine, spec(tmp_path / "out" / "x", huge, dtype="float16")) if isinstance(e, JobFailed)
    ]
    assert failed.error_field == "dtype"
    assert "float16 does not hold" in failed.error_message
    assert left(tmp_path / "out") == []


def test_a_full_disk_or_a_cancelled_job_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(source, tmp_path / "state", job_slice_seconds=1e-6)  # one slice, then control returns
    publish(engine)
    engine.start_job(spec(tmp_path / "out" / "merged"))
    events: list[JobEvent] = []
    while not any(isinstance(event, MergeProgress) for event in events):
        events += engine.advance_jobs()
    engine.cancel_job("1")
    assert left(tmp_path / "out") == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging.SafetensorsWriter, "write_rows", full)
    (failed,) = run(engine, spec(tmp_path / "full" / "merged"))
    assert isinstance(failed, JobFailed)
    assert (failed.error_code, failed.error_reason) == ("resource_exhausted", "DISK_FULL")
    assert left(tmp_path / "full") == []


def test_slices_give_what_a_whole_gives(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: the files do not depend on how much is done in one slice."""
    engine = make_engine(source, tmp_path / "state")
    publish(engine)
    report(run(engine, spec(tmp_path / "whole", load=False)))
    monkeypatch.setattr(merging, "SLICE_ELEMENTS", 192)
    report(run(engine, spec(tmp_path / "sliced", load=False)))
    whole, sliced = stored(tmp_path / "whole"), stored(tmp_path / "sliced")
    assert whole.keys() == sliced.keys()
    for name, value in whole.items():
        assert torch.allclose(value, sliced[name], rtol=1e-6, atol=1e-7), name


def test_a_small_tensor_is_one_slice(tmp_path: Path) -> None:
    """However many axes it has: the taps of a convolution are [C, 1, W]."""
    engine = make_engine(save_tiny_hybrid(tmp_path / "source"), tmp_path / "state")
    publish(engine)
    job = merging.merge(
        spec(tmp_path / "merged", load=False), engine._model("tiny"), tmp_path / "source", engine.load_model
    )
    events = list(job)
    assert events.count(None) == sum(isinstance(event, MergeProgress) for event in events) + 1
    assert engine.load_model("merged", tmp_path / "merged").num_parameters == engine._model("tiny").info.num_parameters
