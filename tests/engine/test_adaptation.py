"""Adaptation within bounds: the KL against the base on probe prompts, and steps that stay within its limit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core.loaded import LoadedModel
from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.jobs import JobFailed, JobWarning, KLBound, LoRAParams, TrainFinished, TrainPublished, TrainSpec, TrainStep
from engine.lora.adapter import Adapter
from engine.training import adaptation
from engine.training.adaptation import MAX_HALVINGS, BoundedSteps
from engine.training.lora_init import new_adapter
from engine.training.trainer import StopAndCheckpoint, train
from tests.training_runs import events_of, load_tiny, losses, make_spec, of_type, random_examples, told

EXAMPLES = random_examples([10, 20, 15])
PROBES = [example.token_ids for example in random_examples([1, 17, 40], seed=9)]


@pytest.fixture
def loaded(tiny_llama: Path, tmp_path: Path) -> LoadedModel:
    return load_tiny(tiny_llama, tmp_path / "state")


def adapt_spec(directory: Path, max_kl: float | None, **values: Any) -> TrainSpec:
    """A run as Adapt makes it: every step on all examples, which are held out as well."""
    params = {"max_steps": 3, "batch_size": 3, "shuffle": False, "publish": "last"} | values
    spec = make_spec(directory, EXAMPLES, EXAMPLES, **params)
    return dataclasses.replace(spec, bound=KLBound(probes=PROBES, max_kl=max_kl))


def with_update(path: Path, adapter: Adapter | None) -> Any:
    """The model in transformers, in float64, with the adapter merged into its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    for name, (a, b) in adapter.modules.items() if adapter is not None else ():
        assert adapter is not None
        weight = model.get_submodule(name).weight
        weight.data += adapter.scaling(name) * b.detach().double() @ a.detach().double()
    return model


@torch.no_grad()
def independent_kl(path: Path, adapter: Adapter) -> float:
    """Sum of p (log p - log q) over the vocabulary, mean over all positions of all probes; by transformers."""
    base, adapted = with_update(path, None), with_update(path, adapter)
    rows: list[Tensor] = []
    for ids in PROBES:
        p, q = (model(torch.tensor([ids])).logits[0].log_softmax(dim=-1) for model in (base, adapted))
        rows.append((p.exp() * (p - q)).sum(dim=-1))
    return float(torch.cat(rows).mean())


def run_to_end(generator: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("family", ["llama", "hybrid", "moe"])
def test_the_kl_is_that_of_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Over probes of unlike lengths, with forwards shorter than a probe and logits of five positions at a time, the
    mean KL is the one that plain logits of another implementation give, to 1e-5."""
    path = request.getfixturevalue(f"tiny_{family}")
    model = load_tiny(path, tmp_path / "state")
    adapter = new_adapter("a", model.model.linears(), LoRAParams(rank=4, dropout=0.5), 0, "cpu")
    filler = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in adapter.modules.values():
            b.normal_(0.0, 0.02, generator=filler)
    monkeypatch.setattr(adaptation, "LOGITS_CHUNK_BYTES", 5 * 4 * model.config.vocab_size)
    measured = run_to_end(BoundedSteps(KLBound(probes=PROBES), model, 16).kl(adapter))
    expected = independent_kl(path, adapter)
    assert expected > 1e-3
    assert measured == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.5}])
def test_steps_that_are_far_too_large_stay_within_the_limit(
    tiny_llama: Path, loaded: LoadedModel, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    """At a learning rate that would ruin the model, the published KL is within the limit, measured by another
    implementation on the published files, and the loss has fallen."""
    events = events_of(adapt_spec(tmp_path, 0.05, learning_rate=1.0, **optimizer), loaded)
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert finished.base_nll is not None
    assert finished.final_nll is not None
    assert finished.final_nll < finished.base_nll
    assert finished.kl is not None
    assert 0.0 < finished.kl <= 0.05
    kept = of_type(events, TrainStep)[1:]
    assert [step.kl for step in kept][-1] == pytest.approx(finished.kl, rel=1e-6)
    assert all(step.kl is not None and step.kl <= 0.05 for step in kept)
    assert {warning.reason for warning in of_type(events, JobWarning)} == {"MAX_KL"}
    published = loaded.adapters.get("tone")
    assert published.version == finished.version == 1
    assert independent_kl(tiny_llama, published) <= 0.05 + 1e-6
    assert independent_kl(tiny_llama, published) == pytest.approx(finished.kl, abs=1e-5)


def test_without_the_limit_the_same_steps_go_too_far(tiny_llama: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """Probes without a limit measure and change nothing: the same run as without probes, to the bit."""
    spec = adapt_spec(tmp_path, None, learning_rate=1.0)
    events = events_of(spec, loaded)
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert finished.kl is not None
    assert finished.kl > 1.0
    assert independent_kl(tiny_llama, loaded.adapters.get("tone")) == pytest.approx(finished.kl, rel=1e-4)
    plain = dataclasses.replace(spec, bound=None, run_dir=str(tmp_path / "plain"), job_id="plain")
    without = events_of(plain, loaded)
    assert losses(without) == losses(events)
    assert all(step.kl is None for step in of_type(without, TrainStep))
    last = without[-1]
    assert isinstance(last, TrainFinished)
    assert last.kl is None


def test_where_no_step_is_within_the_limit_nothing_is_published(loaded: LoadedModel, tmp_path: Path) -> None:
    events = events_of(adapt_spec(tmp_path, 1e-9, learning_rate=100.0), loaded)
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert (finished.step, finished.stop_reason, finished.version, finished.kl) == (0, "max_kl", None, None)
    assert finished.adapter_path == ""
    assert finished.final_nll == finished.base_nll
    assert not of_type(events, TrainPublished)
    assert loaded.adapters.list() == []
    [warning] = of_type(events, JobWarning)
    assert (warning.reason, warning.step) == ("MAX_KL", 0)
    assert f"after {MAX_HALVINGS} halvings" in warning.message


def test_an_interruption_between_halvings_leaves_the_step_before(tiny_llama: Path, tmp_path: Path) -> None:
    """Wherever a drain falls, in the middle of trying a step too, the run that goes on is the run that nobody
    disturbed."""
    values = {"learning_rate": 0.3, "max_steps": 4}
    whole = events_of(adapt_spec(tmp_path / "whole", 0.05, **values), load_tiny(tiny_llama, tmp_path / "whole" / "s"))
    assert len(of_type(whole, JobWarning)) >= 2
    spec = adapt_spec(tmp_path / "cut", 0.05, **values)
    seen: dict[int, tuple[float, float | None]] = {}
    for num_slices in (30, 50, 70, 90, 10_000):
        run = train(spec, load_tiny(tiny_llama, tmp_path / "cut" / "s"))
        events = []
        for _ in range(num_slices):
            try:
                events.append(next(run))
            except StopIteration:
                break
        else:
            events.append(run.throw(StopAndCheckpoint()))  # type: ignore[attr-defined]
            events += list(run)
        happened = told(events)
        for step, loss in losses(happened).items():
            assert seen.setdefault(step, loss) == loss
        if isinstance(happened[-1], TrainFinished):
            break
        assert isinstance(happened[-1], JobFailed)
    assert seen == losses(whole)
    last, expected = happened[-1], whole[-1]
    assert isinstance(last, TrainFinished)
    assert isinstance(expected, TrainFinished)
    assert (last.kl, last.final_nll, last.stop_reason) == (expected.kl, expected.final_nll, expected.stop_reason)


@pytest.mark.parametrize(
    ("field", "bound"),
    [
        ("bound.max_kl", KLBound(probes=PROBES, max_kl=math.nan)),
        ("bound.max_kl", KLBound(probes=PROBES, max_kl=0.0)),
        ("bound.max_kl", KLBound(probes=PROBES, max_kl=-1.0)),
        ("bound.max_kl", KLBound(probes=PROBES, max_kl=math.inf)),
        ("bound.probes", KLBound(probes=[], max_kl=1.0)),
        ("bound.probes[1]", KLBound(probes=[[1], []], max_kl=1.0)),
        ("bound.probes[0]", KLBound(probes=[[300]], max_kl=1.0)),
        ("bound.probes[0]", KLBound(probes=[[-1]], max_kl=1.0)),
        ("bound.probes[0]", KLBound(probes=[[1] * 257], max_kl=1.0)),
    ],
)
def test_a_bad_bound_is_named(loaded: LoadedModel, tmp_path: Path, field: str, bound: KLBound) -> None:
    spec = dataclasses.replace(adapt_spec(tmp_path, 1.0), bound=bound)
    with pytest.raises((InvalidArgumentError, OutOfRangeError)) as caught:
        train(spec, loaded)
    assert caught.value.field == field
