"""The Quantize job through the Engine: what is written, what is reported, what is refused, what is left behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import engine.quantization.job as job
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import (
    AlreadyExistsError,
    EngineError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from engine.jobs import (
    EmbedFinished,
    EmbedSpec,
    JobEvent,
    JobFailed,
    JobWarning,
    LoRAParams,
    PerplexityFinished,
    PerplexitySpec,
    QuantizeFinished,
    QuantizeProgress,
    QuantizeSpec,
    TokenizedExample,
    TrainFinished,
    TrainParams,
    TrainSpec,
    TrainStep,
)
from engine.request import Request, SamplingParams
from tests.tiny import save_tiny_llama

CONFIG = EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=2 << 20, num_threads=2)
TEXT = torch.randint(3, 300, (600,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with an untied head, in float32."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), intermediate_size=128, max_position_embeddings=512)


def make_engine(source: Path, **overrides: Any) -> Engine:
    engine = Engine(dataclasses.replace(CONFIG, **overrides))
    engine.load_model("tiny", source)
    return engine


def spec(output: Path, **values: Any) -> QuantizeSpec:
    defaults: dict[str, Any] = {
        "job_id": "1",
        "model": "tiny",
        "scheme": "q4",
        "output_name": output.name,
        "output_dir": str(output),
    }
    return QuantizeSpec(**(defaults | values))


def run(engine: Engine, spec: QuantizeSpec) -> list[JobEvent]:
    engine.start_job(spec)
    events: list[JobEvent] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    return events


def report(events: list[JobEvent]) -> QuantizeFinished:
    assert isinstance(events[-1], QuantizeFinished), events[-1]
    return events[-1]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(directory / "model.safetensors"), framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_the_report_tells_what_is_on_the_disk(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source)
    output = tmp_path / "tiny-q4"
    events = run(engine, spec(output, load=False))
    finished = report(events)
    assert finished.bytes_in == (source / "model.safetensors").stat().st_size
    assert finished.bytes_out == (output / "model.safetensors").stat().st_size
    assert finished.ratio == finished.bytes_in / finished.bytes_out
    tensors, originals = stored(output), stored(source)
    assert finished.num_quantized == len(finished.tensors) == 14
    assert finished.num_kept == len(originals) - 14
    for error in finished.tensors:
        module = error.name.removesuffix(".weight")
        parts = [value for name, value in tensors.items() if name.startswith(f"{module}.weight_")]
        assert error.bits * error.num_elements == 8 * sum(part.nbytes for part in parts)
        assert 0.02 < error.relative_rmse < 0.15
        assert error.max_abs > 0
    for name, value in originals.items():
        if name in tensors:
            assert torch.equal(tensors[name], value)
            assert tensors[name].dtype == value.dtype
    progress = [event for event in events if isinstance(event, QuantizeProgress)]
    assert [event.tensors_done for event in progress] == list(range(1, len(originals) + 1))
    assert progress[-1].tensors_total == len(originals)
    assert any(isinstance(event, JobWarning) and event.reason == "NO_TOKENIZER" for event in events)
    assert finished.logit_kl is finished.perplexity_before is finished.perplexity_after is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_reported_errors_are_those_of_the_stored_tensors(source: Path, tmp_path: Path, symmetric: bool) -> None:
    engine = make_engine(source)
    output = tmp_path / "out"
    finished = report(run(engine, spec(output, symmetric=symmetric, group_size=64)))
    originals = stored(source)
    model = engine._model("out").model
    for error in finished.tensors:
        module = model.get_submodule(error.name.removesuffix(".weight"))
        difference = module.scheme.dequantize(module) - originals[error.name]  # type: ignore[union-attr,operator]
        assert error.max_abs == pytest.approx(float(difference.abs().max()), rel=1e-6)
        relative = difference.norm() / originals[error.name].norm()
        assert error.relative_rmse == pytest.approx(float(relative), rel=1e-4)


def test_perplexity_and_divergence_are_those_of_the_two_models(source: Path, tmp_path: Path) -> None:
    """Against transformers on the same windows, which here are one: the text fits in the context."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    engine = make_engine(source)
    output = tmp_path / "out"
    text = TEXT[:400]
    events = run(engine, spec(output, eval_token_ids=text))
    finished = report(events)
    dequantize = CompressedTensorsConfig(dequantize=True)
    log_probs = []
    for path, extra in ((source, {}), (output, {"quantization_config": dequantize})):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra)
        with torch.no_grad():
            log_probs.append(F.log_softmax(model(torch.tensor([text])).logits[0, :-1].double(), dim=-1))
    targets = torch.tensor(text[1:])
    before, after = (math.exp(F.nll_loss(p, targets)) for p in log_probs)
    kl = F.kl_div(log_probs[1], log_probs[0], reduction="batchmean", log_target=True)
    assert finished.num_eval_tokens == 399
    assert finished.perplexity_before == pytest.approx(before, rel=1e-4)
    assert finished.perplexity_after == pytest.approx(after, rel=1e-4)
    assert finished.logit_kl == pytest.approx(float(kl), rel=1e-3)
    assert finished.logit_kl > 0
    assert any(isinstance(event, QuantizeProgress) and event.stage == "evaluating" for event in events)


def test_q8_diverges_less_than_q4_and_small_groups_less_than_large(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source)
    divergence = {}
    for name, options in {
        "q8": {"scheme": "q8"},
        "q4-32": {"group_size": 32},
        "q4-64": {"group_size": 64},
    }.items():
        finished = report(run(engine, spec(tmp_path / name, load=False, eval_token_ids=TEXT[:300], **options)))
        divergence[name] = finished.logit_kl or 0.0
    assert 0 < divergence["q8"] < divergence["q4-32"] < divergence["q4-64"]


def test_the_result_is_loaded_and_answers(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source)
    run(engine, spec(tmp_path / "out", scheme="q8"))
    info = next(info for info in engine.models() if info.name == "out")
    assert info.quantization == "q8"
    plain = next(info for info in engine.models() if info.name == "tiny")
    linear = sum(m.in_features * m.out_features for m in engine._model("tiny").model.linears().values())
    assert plain.weights_bytes - info.weights_bytes >= 3 * linear - 4 * 2 * (64 * 3 + 32 * 2 + 128 * 2)  # the scales
    engine.add_request(
        Request(
            request_id="1",
            model="out",
            prompt_token_ids=TEXT[:20],
            sampling=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),
        )
    )
    tokens = []
    while engine.has_requests():
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert len(tokens) == 5


def test_a_dry_run_reports_the_same_errors_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source)
    dry = report(run(engine, spec(tmp_path / "out", dry_run=True, eval_token_ids=TEXT[:100])))
    assert dry.bytes_out is dry.ratio is None
    assert list(tmp_path.iterdir()) == []
    assert [info.name for info in engine.models()] == ["tiny"]
    wet = report(run(engine, spec(tmp_path / "out", load=False)))
    assert dry.tensors == wet.tensors
    assert dry.bytes_in == wet.bytes_in


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_by_option(tmp_path: Path, tied: bool) -> None:
    source = save_tiny_llama(tmp_path / "source", intermediate_size=128, tie_word_embeddings=tied)
    engine = make_engine(source)
    run(engine, spec(tmp_path / "kept"))
    run(engine, spec(tmp_path / "head", quantize_head=True))
    run(engine, spec(tmp_path / "all", quantize_head=True, quantize_embeddings=True))
    names = {name: stored(tmp_path / name).keys() for name in ("kept", "head", "all")}
    ties = {name: json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] for name in names}
    assert ties == {"kept": tied, "head": False, "all": False}
    assert "model.embed_tokens.weight" in names["kept"]
    assert ("lm_head.weight" in names["kept"]) == (not tied)
    assert {"model.embed_tokens.weight", "lm_head.weight_packed"} <= names["head"]
    assert {"model.embed_tokens.weight_packed", "lm_head.weight_packed"} <= names["all"]
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & names["all"]
    if tied:
        with pytest.raises(InvalidArgumentError, match="quantize_embeddings without quantize_head"):
            engine.start_job(spec(tmp_path / "embeddings", quantize_embeddings=True))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"scheme": "q5"}, InvalidArgumentError, "scheme is 'q5'; accepted: q8, q4"),
        ({"group_size": 16}, InvalidArgumentError, "group_size is 16; accepted: 32, 64, 128"),
        ({"group_size": 128}, InvalidArgumentError, "does not divide the 64 inputs of .*; accepted for this model: 32"),
        ({"output_name": "../out"}, InvalidArgumentError, "output_name"),
        ({"eval_token_ids": [5]}, InvalidArgumentError, "1 tokens"),
        ({"eval_token_ids": [5, 300]}, InvalidArgumentError, r"token_ids\[1\] is 300"),
    ],
)
def test_bad_values_are_refused_before_any_work(
    source: Path, tmp_path: Path, values: dict[str, Any], error: type[EngineError], message: str
) -> None:
    engine = make_engine(source)
    with pytest.raises(error, match=message) as raised:
        engine.start_job(spec(tmp_path / "out", **values))
    assert raised.value.field in values
    assert list(tmp_path.iterdir()) == []
    assert not engine.has_jobs()


def test_taken_outputs_and_quantized_sources_are_refused(source: Path, tmp_path: Path) -> None:
    engine = make_engine(source)
    run(engine, spec(tmp_path / "out"))
    with pytest.raises(AlreadyExistsError, match="'out' exists"):
        engine.start_job(spec(tmp_path / "out"))
    with pytest.raises(FailedPreconditionError, match=r"quantized already \(q4\)"):
        engine.start_job(spec(tmp_path / "again", model="out"))


def test_a_source_whose_files_changed_is_refused(tmp_path: Path) -> None:
    """Else the copy would not be of the model that answers under that name."""
    source = save_tiny_llama(tmp_path / "source")
    engine = make_engine(source)
    save_tiny_llama(source, seed=1)
    with pytest.raises(FailedPreconditionError, match="have changed since it was loaded"):
        engine.start_job(spec(tmp_path / "out", scheme="q8"))


def test_a_cancelled_or_failed_job_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(source, job_slice_seconds=0.0)
    engine.start_job(spec(tmp_path / "out"))
    for _ in range(5):
        engine.advance_jobs()
    assert any(tmp_path.iterdir()), "it writes beside its destination"
    assert not (tmp_path / "out").exists()
    engine.cancel_job("1")
    assert list(tmp_path.iterdir()) == []

    def full(*args: Any) -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job.SafetensorsWriter, "write", full)
    failed = run(engine, spec(tmp_path / "out"))[-1]
    assert isinstance(failed, JobFailed)
    assert (failed.error_code, failed.error_reason) == ("resource_exhausted", "DISK_FULL")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_tiny_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    failed = run(make_engine(source), spec(tmp_path / "out", scheme="q8"))[-1]
    assert isinstance(failed, JobFailed)
    assert "model.layers.1.mlp.up_proj" in failed.error_message
    assert not (tmp_path / "out").exists()


def test_bfloat16_gives_the_same_answers_for_one_row_and_for_many(source: Path, tmp_path: Path) -> None:
    """Decoding takes the kernel and prefill widens the weight: their logits differ by bfloat16's roundings alone."""
    output = tmp_path / "out"
    run(make_engine(source), spec(output, load=False))
    engine = make_engine(output, dtype="bfloat16")
    model = engine._model("tiny").causal_lm()
    assert "weight_kernel" in dict(model.get_submodule("model.layers.0.mlp.up_proj").named_buffers())
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for linear in model.linears().values():
        if linear.in_features == 64:
            whole = linear.scheme.apply(linear, hidden).float()
            alone = torch.cat([linear.scheme.apply(linear, row) for row in hidden.split(1)]).float()
            assert float((whole - alone).abs().max() / whole.abs().max()) < 2**-7


def test_an_encoder_keeps_its_embeddings(tmp_path: Path) -> None:
    """BERT, whose directory has no head and whose pooler is not among our modules."""
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    source = tmp_path / "bert"
    BertModel(
        BertConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(source)
    engine = make_engine(source)
    output = tmp_path / "bert-q8"
    with pytest.raises(FailedPreconditionError, match="encoder"):
        engine.start_job(spec(output, scheme="q8", eval_token_ids=TEXT[:50]))
    with pytest.raises(InvalidArgumentError, match="quantize_head"):
        engine.start_job(spec(output, scheme="q8", quantize_head=True))
    assert report(run(engine, spec(output, scheme="q8"))).num_quantized == 12
    vectors = []
    for model in ("tiny", "bert-q8"):
        engine.start_job(EmbedSpec(job_id=model, model=model, inputs=[TEXT[:30]], pooling="mean"))
        events: list[JobEvent] = []
        while engine.has_jobs():
            events += engine.advance_jobs()
        finished = events[-1]
        assert isinstance(finished, EmbedFinished)
        vectors.append(torch.frombuffer(bytearray(finished.vectors), dtype=torch.float32))
    assert float(F.cosine_similarity(vectors[0], vectors[1], dim=0)) > 0.999
    assert not torch.equal(vectors[0], vectors[1])
    theirs = AutoModel.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        hidden = theirs(torch.tensor([TEXT[:30]])).last_hidden_state[0].mean(dim=0)
    assert float(F.cosine_similarity(vectors[1], hidden, dim=0)) > 0.99999


def test_lora_trains_over_the_quantized_model_and_then_serves(source: Path, tmp_path: Path) -> None:
    """One sequence is learned by heart; the base stays as it was, and the new adapter answers."""
    from engine.training.dataset import write_dataset

    engine = make_engine(source, state_dir=str(tmp_path / "state"))
    run(engine, spec(tmp_path / "out", symmetric=False))
    before = {name: p.clone() for name, p in engine._model("out").model.named_parameters()}
    text = TEXT[:40]
    write_dataset(tmp_path / "data", [TokenizedExample(token_ids=text, loss_mask=[False] + [True] * 39)])
    engine.start_job(
        TrainSpec(
            job_id="run",
            model="out",
            adapter="tone",
            lora=LoRAParams(rank=8, alpha=16.0),
            params=TrainParams(learning_rate=2e-2, max_steps=40, batch_size=1),
            dataset_path=str(tmp_path / "data"),
            run_dir=str(tmp_path / "state" / "runs" / "run"),
        )
    )
    events: list[JobEvent] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    assert isinstance(events[-1], TrainFinished), events[-1]
    losses = [event.loss for event in events if isinstance(event, TrainStep)]
    assert losses[-1] < losses[0] / 2
    for name, parameter in engine._model("out").model.named_parameters():
        assert torch.equal(parameter, before[name])
    nll = {}
    for adapter in (None, "tone"):
        engine.start_job(PerplexitySpec(job_id=str(adapter), model="out", token_ids=text, adapter=adapter))
        events = []
        while engine.has_jobs():
            events += engine.advance_jobs()
        assert isinstance(events[-1], PerplexityFinished)
        nll[adapter] = events[-1].nll
    assert nll["tone"] < nll[None] / 2
