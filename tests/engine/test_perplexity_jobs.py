"""Perplexity jobs through the Engine: progress, packing, bounded logits, adapters, bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, FailedPreconditionError, InvalidArgumentError, NotFoundError, OutOfRangeError
from engine.evaluation import scoring
from engine.evaluation.scoring import iter_window_logits, plan_windows, token_kl, token_nll
from engine.jobs import JobEvent, JobFailed, PerplexityFinished, PerplexityProgress, PerplexitySpec
from engine.models.base import CausalLM
from tests.parity.loading import load

CONFIG = EngineConfig(device="cpu", dtype="float32", num_threads=2, kv_cache_bytes=1 << 20)
VOCAB = 97


def text(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def make_engine(path: Path, **overrides: Any) -> Engine:
    engine = Engine(dataclasses.replace(CONFIG, **overrides))
    engine.load_model("m", path)
    return engine


def run(engine: Engine, **spec: Any) -> list[JobEvent]:
    engine.start_job(PerplexitySpec(job_id="p", model="m", **spec))
    events: list[JobEvent] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    return events


def finish(engine: Engine, **spec: Any) -> PerplexityFinished:
    event = run(engine, **spec)[-1]
    assert isinstance(event, PerplexityFinished), event
    return event


@torch.no_grad()
def token_losses(reference: Any, ids: list[int]) -> torch.Tensor:
    """NLL of every token but the first, in one window."""
    logits = reference(input_ids=torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").double()


def test_progress_mean_and_standard_error(tiny_llama: Path) -> None:
    """Windows count up to their total, the running mean ends in the result, the standard error is that of the mean."""
    engine = make_engine(tiny_llama, job_slice_seconds=1e-6)
    ids = text(60)
    *progress, finished = run(engine, token_ids=ids, window=16, stride=8)
    assert isinstance(finished, PerplexityFinished)
    assert all(isinstance(event, PerplexityProgress) for event in progress)
    counts = [event.windows_done for event in progress if isinstance(event, PerplexityProgress)]
    assert counts == sorted(set(counts))
    assert counts[-1] == finished.num_windows == len(plan_windows(60, 16, 8))
    last = progress[-1]
    assert isinstance(last, PerplexityProgress)
    assert (last.nll, last.num_tokens) == (finished.nll, finished.num_tokens)
    assert finished.num_tokens == 59
    assert finished.perplexity == pytest.approx(math.exp(finished.nll))
    one = finish(engine, token_ids=ids, window=64, stride=64)
    losses = token_losses(LlamaForCausalLM.from_pretrained(tiny_llama).eval(), ids)
    assert one.num_windows == 1
    assert one.nll == pytest.approx(losses.mean().item(), abs=1e-5)
    assert one.standard_error == pytest.approx(losses.std().item() / math.sqrt(59), rel=1e-3)


@pytest.mark.parametrize("max_batch_tokens", [2, 40, 4096])
def test_packing_changes_nothing(tiny_llama: Path, max_batch_tokens: int) -> None:
    """One window a forward or many: the same mean, within the last bits of float32."""
    spec = {"token_ids": text(200), "window": 16, "stride": 5}
    alone = finish(make_engine(tiny_llama, max_batch_tokens=16), **spec)
    packed = finish(make_engine(tiny_llama, max_batch_tokens=max_batch_tokens, job_slice_seconds=10.0), **spec)
    assert packed.nll == pytest.approx(alone.nll, abs=1e-6)
    assert (packed.num_tokens, packed.num_windows) == (alone.num_tokens, alone.num_windows)


def test_logits_exist_only_for_scored_positions_and_in_bounded_chunks(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window that scores 8 of its 32 tokens, no more than 8 rows are computed, and never more than fit a chunk."""
    model = load(tiny_llama)
    assert isinstance(model, CausalLM)
    rows: list[int] = []
    whole = model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda hidden: (rows.append(len(hidden)), whole(hidden))[1])
    ids = torch.tensor(text(120))
    windows = plan_windows(120, 32, 8)
    sizes = {"max_tokens": 96, "chunk_bytes": 4 * model.config.vocab_size * 5}
    small = list(iter_window_logits(model, ids, windows, **sizes))
    assert max(rows) == 5
    assert sum(rows) == 119
    assert torch.cat([chunk.indices for chunk in small]).tolist() == list(range(1, 120))
    (large,) = iter_window_logits(model, ids, windows, max_tokens=10_000)
    assert torch.equal(large.targets, ids[1:])
    nll = torch.cat([token_nll(chunk.logits, chunk.targets) for chunk in small])
    assert torch.allclose(nll, token_nll(large.logits, large.targets), atol=1e-5)
    assert scoring.LOGITS_CHUNK_BYTES <= 64 << 20


def test_two_models_compare_over_the_same_positions(tiny_llama: Path) -> None:
    """The divergence of a model from itself is 0, from a changed copy it is not, and positions pair up."""
    base, changed = load(tiny_llama), load(tiny_llama)
    assert isinstance(base, CausalLM)
    assert isinstance(changed, CausalLM)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.data = parameter.data * 1.2
    ids, windows = torch.tensor(text(50)), plan_windows(50, 16, 8)

    def divergence(other: CausalLM) -> float:
        first, second = (iter_window_logits(model, ids, windows, max_tokens=32) for model in (base, other))
        total = 0.0
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.indices, b.indices)
            total += token_kl(a.logits, b.logits).sum().item()
        return total / 49

    assert divergence(base) == 0.0
    assert divergence(changed) > 1e-3


def test_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    """An adapter that peft wrote scores as peft does; the base's score stays."""
    engine, ids = make_engine(tiny_llama), text(40)
    base = finish(engine, token_ids=ids, window=40, stride=40)
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), lora).eval()
    tuned.save_pretrained(tmp_path)
    info = engine.load_adapter("m", "tone", tmp_path)
    scored = finish(engine, token_ids=ids, window=40, stride=40, adapter="tone")
    assert scored.nll == pytest.approx(token_losses(tuned, ids).mean().item(), abs=1e-4)
    assert abs(scored.nll - base.nll) > 1e-3
    assert scored.adapter_version == info.version
    assert finish(engine, token_ids=ids, window=40, stride=40).nll == base.nll


def test_one_scored_token_has_no_standard_error(tiny_llama: Path) -> None:
    finished = finish(make_engine(tiny_llama), token_ids=[5, 6], window=2, stride=1)
    assert (finished.num_tokens, finished.standard_error) == (1, None)


@pytest.mark.parametrize(
    ("spec", "error", "field"),
    [
        ({"token_ids": []}, InvalidArgumentError, "token_ids"),
        ({"token_ids": [5]}, InvalidArgumentError, "token_ids"),
        ({"token_ids": [5, 1 << 40]}, InvalidArgumentError, "token_ids"),
        ({"token_ids": [5, -1]}, InvalidArgumentError, "token_ids"),
        ({"token_ids": [5, 6], "window": 1, "stride": 1}, InvalidArgumentError, "window"),
        ({"token_ids": [5, 6], "window": 8, "stride": 9}, InvalidArgumentError, "stride"),
        ({"token_ids": [5, 6], "window": 8, "stride": 0}, InvalidArgumentError, "stride"),
        ({"token_ids": [5, 6], "window": 1 << 30, "stride": 8}, OutOfRangeError, "window"),
        ({"token_ids": [5, 6], "adapter": "nobody"}, NotFoundError, "adapter"),
    ],
)
def test_bad_input_is_refused_at_the_start(
    tiny_llama: Path, spec: dict[str, Any], error: type[EngineError], field: str
) -> None:
    """The error comes from start_job and names the field; the engine goes on."""
    engine = make_engine(tiny_llama)
    with pytest.raises(error) as raised:
        engine.start_job(PerplexitySpec(job_id="p", model="m", **{"window": 16, "stride": 8, **spec}))
    assert raised.value.field == field
    assert not engine.has_jobs()
    assert finish(engine, token_ids=[5, 6, 7], window=16, stride=8).num_tokens == 2


def test_encoders_have_no_perplexity(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(FailedPreconditionError, match="is an encoder"):
        make_engine(tmp_path).start_job(PerplexitySpec(job_id="p", model="m", token_ids=[1, 2]))


def test_non_finite_logits_fail_the_job_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """The error names the first token whose likelihood is not a number; no mean is reported."""
    reference = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        reference.model.embed_tokens.weight[50] = float("inf")
    reference.save_pretrained(tmp_path)
    failed = run(make_engine(tmp_path), token_ids=[5, 6, 50, 7, 8], window=8, stride=4)[-1]
    assert isinstance(failed, JobFailed)
    assert failed.error_reason == "NON_FINITE"
