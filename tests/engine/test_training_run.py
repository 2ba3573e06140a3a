"""Runs on a tiny model: events, exact resume, skipped steps, early stopping, publication, and the untouched base."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.context import FrozenProduct
from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.engine import Engine
from engine.errors import (
    EngineError,
    FailedPreconditionError,
    FormatError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    TrainingError,
)
from engine.jobs import (
    JobEvent,
    JobFailed,
    JobWarning,
    LoRAParams,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainPublished,
    TrainSpec,
    TrainStarted,
    TrainStep,
)
from engine.lora.adapter import LoRABatch
from engine.lora.peft import load_adapter
from engine.request import Request, SamplingParams
from engine.training.data import Examples
from engine.training.trainer import StopAndCheckpoint, train
from tests.training_runs import events_of, load_tiny, losses, make_spec, of_type, random_examples, told

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = random_examples([10, 20, 30, 15, 9, 12, 25])
HELD_OUT = random_examples([11, 14], seed=1)


@pytest.fixture
def loaded(tiny_llama: Path, tmp_path: Path) -> LoadedModel:
    return load_tiny(tiny_llama, tmp_path / "state")


def test_events_of_a_run(loaded: LoadedModel, tmp_path: Path) -> None:
    """A run tells its start, step 0, every step and evaluation, its checkpoints, publication and end, in that order."""
    spec = make_spec(tmp_path, TRAIN, HELD_OUT, eval_every=2, checkpoint_every=3, schedule="linear", warmup_steps=2)
    events = events_of(spec, loaded)
    started = events[0]
    assert isinstance(started, TrainStarted)
    assert (started.num_examples, started.num_eval_examples, started.total_steps) == (7, 2, 6)
    assert started.num_tokens == sum(len(e.token_ids) for e in TRAIN)
    assert started.num_loss_tokens == sum(sum(e.loss_mask) for e in TRAIN)
    assert started.num_trainable_parameters == sum(
        4 * (linear.in_features + linear.out_features) for linear in loaded.model.linears().values()
    )
    assert 0.0 < started.forward_difference < 1e-4
    steps = of_type(events, TrainStep)
    assert [s.step for s in steps] == list(range(7))
    assert [s.learning_rate for s in steps[1:]] == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert steps[0].loss == pytest.approx(steps[1].loss, abs=1e-6), "step 0 is the first batch before training"
    assert steps[0].grad_norm is None
    assert all(s.grad_norm and s.tokens_per_second and s.eta_seconds is not None for s in steps[1:])
    assert [s.epoch for s in steps] == pytest.approx([0.0, 2 / 7, 4 / 7, 6 / 7, 1.0, 9 / 7, 11 / 7])
    evaluations = of_type(events, TrainEvaluation)
    assert [e.step for e in evaluations] == [0, 2, 4, 6]
    checkpoints = of_type(events, TrainCheckpoint)
    assert {3, 6} <= {c.step for c in checkpoints}
    assert [c.step for c in checkpoints if c.is_best] == [e.step for e in evaluations if e.is_best]
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert finished.stop_reason == "max_steps"
    assert finished.base_nll == evaluations[0].nll
    assert finished.final_nll == evaluations[-1].nll
    assert finished.best_nll == min(e.nll for e in evaluations)
    assert finished.num_tokens == sum(s.num_tokens for s in steps[1:])
    assert (finished.version, loaded.adapters.get("tone").version) == (1, 1)
    assert isinstance(events[-2], TrainPublished)
    assert sum(isinstance(e, TrainFinished | JobFailed) for e in events) == 1


def test_the_base_never_changes(loaded: LoadedModel, tmp_path: Path) -> None:
    """After a run every weight of the base is bit for bit what it was, and none has a gradient."""
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    events_of(make_spec(tmp_path, TRAIN, weight_decay=0.1), loaded)
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, before[name]), name
        assert value.grad is None
        assert not value.requires_grad


def interrupted_after(spec: TrainSpec, loaded: LoadedModel, num_slices: int, how: str) -> list[JobEvent]:
    """The events of a run that is ended from outside after so many slices."""
    run = train(spec, loaded)
    events = []
    for _ in range(num_slices):
        try:
            event = next(run)
        except StopIteration:
            return told(events)
        events.append(event)
    if how == "close":
        run.close()  # type: ignore[attr-defined]
    else:
        events.append(run.throw(StopAndCheckpoint()))  # type: ignore[attr-defined]
        events.extend(run)
    return told(events)


RESUME: dict[str, Any] = {
    "eval_every": 2, "checkpoint_every": 2, "max_steps": 7, "schedule": "cosine", "warmup_steps": 2, "batch_size": 3,
    "gradient_accumulation_steps": 2, "publish_every": 3, "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("how", ["close", "drain"])
@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}])
def test_resume_is_exact(tiny_llama: Path, tmp_path: Path, how: str, optimizer: dict[str, Any]) -> None:
    """However often and wherever a run is cut off, by cancellation or by a drain, going on from its last checkpoint
    gives the losses, gradient norms, evaluations and final weights of the run that nobody disturbed, bit for bit;
    dropout included."""
    lora = LoRAParams(rank=4, alpha=8.0, dropout=0.2)
    whole_spec = make_spec(tmp_path / "whole", TRAIN, HELD_OUT, lora=lora, **RESUME, **optimizer)
    whole_model = load_tiny(tiny_llama, tmp_path / "whole" / "state")
    whole = events_of(whole_spec, whole_model)
    spec = make_spec(tmp_path / "cut", TRAIN, HELD_OUT, lora=lora, **RESUME, **optimizer)
    seen: dict[int, tuple[float, float | None]] = {}
    evaluations: dict[int, float] = {}
    resumed_from = []
    for num_slices in (19, 60, 90, 140, 190, 10_000):
        loaded = load_tiny(tiny_llama, tmp_path / "cut" / "state")  # as a new process would
        events = interrupted_after(spec, loaded, num_slices, how)
        resumed_from += [e.resumed_from_step for e in of_type(events, TrainStarted)]
        for step, loss in losses(events).items():
            assert seen.setdefault(step, loss) == loss, f"step {step} was repeated with another loss"
        for evaluation in of_type(events, TrainEvaluation):
            assert evaluations.setdefault(evaluation.step, evaluation.nll) == evaluation.nll
        if isinstance(events[-1], TrainFinished):
            break
        if how == "drain":
            assert isinstance(events[-1], JobFailed)
            assert (events[-1].error_code, events[-1].error_reason) == ("cancelled", "INTERRUPTED")
    assert len(resumed_from) >= 3
    assert resumed_from[-1] > 0
    assert seen == losses(whole)
    assert evaluations == {e.step: e.nll for e in of_type(whole, TrainEvaluation)}
    finished, expected = events[-1], whole[-1]
    assert isinstance(finished, TrainFinished)
    assert isinstance(expected, TrainFinished)
    for field in ("step", "base_nll", "final_nll", "best_nll", "best_step", "num_tokens"):
        assert getattr(finished, field) == getattr(expected, field), field
    linears = whole_model.model.linears()
    ours = load_adapter(Path(finished.checkpoint_path), linears, name="tone")
    theirs = load_adapter(Path(expected.checkpoint_path), linears, name="tone")
    for name in theirs.modules:
        assert torch.equal(ours.modules[name][0], theirs.modules[name][0])
        assert torch.equal(ours.modules[name][1], theirs.modules[name][1])


def test_a_drain_writes_the_last_completed_step(loaded: LoadedModel, tmp_path: Path) -> None:
    """Interrupted in the middle of a step, with gradients accumulated, the checkpoint is that of the step before."""
    spec = make_spec(tmp_path, TRAIN, checkpoint_every=0)
    run = train(spec, loaded)
    while not (isinstance(event := next(run), TrainStep) and event.step == 3):
        pass
    for _ in range(2):
        next(run)
    event = run.throw(StopAndCheckpoint())  # type: ignore[attr-defined]
    assert isinstance(event, TrainCheckpoint)
    assert event.step == 3
    assert json.loads((Path(event.path) / "state.json").read_text())["step"] == 3


def test_resume_refuses_another_configuration(loaded: LoadedModel, tmp_path: Path) -> None:
    """A checkpoint is not continued under other parameters or data: the result would be of neither run."""
    spec = make_spec(tmp_path, TRAIN)
    events_of(spec, loaded)
    other = dataclasses.replace(spec, params=dataclasses.replace(spec.params, learning_rate=1.0))
    with pytest.raises(FailedPreconditionError, match="another configuration"):
        train(other, loaded)
    with pytest.raises(FailedPreconditionError, match="another configuration"):
        train(make_spec(tmp_path, TRAIN[1:]), loaded)


def test_a_finished_run_resumed_trains_no_further(loaded: LoadedModel, tmp_path: Path) -> None:
    """A run whose worker died between the last checkpoint and its end publishes and ends, with the same NLLs."""
    spec = make_spec(tmp_path, TRAIN, HELD_OUT)
    first = events_of(spec, loaded)
    again = events_of(spec, loaded)
    assert losses(again) == {}
    finished, expected = again[-1], first[-1]
    assert isinstance(finished, TrainFinished)
    assert isinstance(expected, TrainFinished)
    assert (finished.final_nll, finished.best_nll) == (expected.final_nll, expected.best_nll)


def poison(loaded: LoadedModel, token: int) -> None:
    """A token whose embedding is NaN: examples that hold it have a loss that is not finite."""
    weight = loaded.model.get_parameter("model.embed_tokens.weight")
    weight.data = weight.data.clone()  # it may be a view of the file
    weight.data[token] = torch.nan


def with_token(token: int, indices: set[int]) -> list[Any]:
    examples = random_examples([12] * 8)
    return [
        dataclasses.replace(e, token_ids=[token, *e.token_ids[1:]]) if i in indices else e
        for i, e in enumerate(examples)
    ]


def test_a_step_that_is_not_finite_is_skipped(loaded: LoadedModel, tmp_path: Path) -> None:
    """It is reported and warned of, changes no weight and no optimizer state, and the run goes on."""
    poison(loaded, 5)
    options: dict[str, Any] = {"batch_size": 1, "shuffle": False, "max_steps": 8}
    events = events_of(make_spec(tmp_path, with_token(5, {2, 4, 5}), **options), loaded)
    assert [s.step for s in of_type(events, TrainStep) if s.skipped] == [3, 5, 6]
    assert [w.step for w in of_type(events, JobWarning)] == [3, 5, 6]
    assert {w.reason for w in of_type(events, JobWarning)} == {"NON_FINITE_STEP"}
    assert isinstance(events[-1], TrainFinished)
    a, b = loaded.adapters.get("tone").modules["model.layers.0.mlp.up_proj"]
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    assert b.any()


def test_three_steps_that_are_not_finite_end_the_run(loaded: LoadedModel, tmp_path: Path) -> None:
    """The weights before them are checkpointed, and the error says where."""
    poison(loaded, 5)
    spec = make_spec(tmp_path, with_token(5, {2, 3, 4}), batch_size=1, shuffle=False, max_steps=8)
    events = []
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        events.extend(event for event in _collect(spec, loaded, events))
    assert caught.value.reason == "NON_FINITE"
    checkpoint = of_type(told(events), TrainCheckpoint)[-1]
    assert checkpoint.path in caught.value.message
    kept = load_adapter(Path(checkpoint.path), loaded.model.linears(), name="tone")
    good = events_of(
        make_spec(tmp_path / "good", with_token(5, set())[:2], batch_size=1, shuffle=False, max_steps=2), loaded
    )
    finished = good[-1]
    assert isinstance(finished, TrainFinished)
    expected = load_adapter(Path(finished.checkpoint_path), loaded.model.linears(), name="tone")
    for name in kept.modules:
        assert torch.equal(kept.modules[name][0], expected.modules[name][0])
        assert torch.equal(kept.modules[name][1], expected.modules[name][1])
    with pytest.raises(NotFoundError):
        loaded.adapters.get("nothing-published-by-the-failed-run")


def test_an_evaluation_that_is_not_finite_is_no_improvement(loaded: LoadedModel, tmp_path: Path) -> None:
    """It is warned of, never counted as best, and the run goes on."""
    poison(loaded, 5)
    bad = [dataclasses.replace(HELD_OUT[0], token_ids=[5, *HELD_OUT[0].token_ids[1:]])]
    events = events_of(make_spec(tmp_path, TRAIN, bad, eval_every=3), loaded)
    assert not any(e.is_best for e in of_type(events, TrainEvaluation))
    assert [(w.step, w.reason) for w in of_type(events, JobWarning)] == [
        (step, "NON_FINITE_EVALUATION") for step in (0, 3, 6)
    ]
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert (finished.best_nll, finished.best_step, finished.version) == (None, None, 1)


def test_weights_of_an_evaluation_that_is_not_finite_are_not_published(loaded: LoadedModel, tmp_path: Path) -> None:
    """Nor those of the steps after it, until an evaluation says that they are whole again."""
    held_out = [dataclasses.replace(HELD_OUT[0], token_ids=[5, *HELD_OUT[0].token_ids[1:]])]
    weight = loaded.model.get_parameter("model.embed_tokens.weight")
    whole = weight.data.clone()
    events: list[Any] = []
    for event in train(make_spec(tmp_path, TRAIN, held_out, max_steps=6, eval_every=2, publish_every=1), loaded):
        events.append(event)
        if isinstance(event, TrainStep) and event.step == 1:
            poison(loaded, 5)
        elif isinstance(event, TrainEvaluation) and event.step == 2:
            weight.data = whole
    assert [e.step for e in of_type(events, TrainEvaluation) if not math.isfinite(e.nll)] == [2]
    assert [(e.step, e.version) for e in of_type(events, TrainPublished)] == [(1, 1), (4, 2), (5, 3), (6, 4)]
    told = [(w.step, w.reason) for w in of_type(events, JobWarning)]
    assert told == [(2, "NON_FINITE_EVALUATION"), (2, "NOT_PUBLISHED"), (3, "NOT_PUBLISHED")]


def _collect(spec: TrainSpec, loaded: LoadedModel, into: list[Any]) -> list[Any]:
    for event in train(spec, loaded):
        into.append(event)
    return []


def test_early_stopping_and_the_best_weights(loaded: LoadedModel, tmp_path: Path) -> None:
    """Memorising random examples makes held-out random examples worse: the run stops after ``patience`` evaluations
    without improvement, and what goes live are the weights of the best one."""
    spec = make_spec(tmp_path, TRAIN, HELD_OUT, max_steps=200, eval_every=1, early_stopping_patience=3)
    events = events_of(spec, loaded)
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert finished.stop_reason == "early_stopping"
    assert finished.best_step is not None
    assert finished.step == finished.best_step + 3
    best = load_adapter(tmp_path / "run" / "checkpoints" / "best", loaded.model.linears(), name="tone")
    live = loaded.adapters.get("tone")
    for name in best.modules:
        assert torch.equal(live.modules[name][0], best.modules[name][0])
        assert torch.equal(live.modules[name][1], best.modules[name][1])
    assert loaded.adapters.info("tone").best_nll == finished.best_nll
    assert [w.reason for w in of_type(events, JobWarning)] == (["NO_IMPROVEMENT"] if finished.best_step == 0 else [])


def test_publishing_the_last_weights(loaded: LoadedModel, tmp_path: Path) -> None:
    """With publish="last" the weights of the last step go live, however the evaluations were."""
    spec = make_spec(tmp_path, TRAIN, HELD_OUT, max_steps=30, learning_rate=0.05, publish="last")
    finished = events_of(spec, loaded)[-1]
    assert isinstance(finished, TrainFinished)
    last = load_adapter(Path(finished.checkpoint_path), loaded.model.linears(), name="tone")
    live = loaded.adapters.get("tone")
    assert all(torch.equal(live.modules[name][1], last.modules[name][1]) for name in last.modules)


def test_versions_published_on_the_way(loaded: LoadedModel, tmp_path: Path) -> None:
    """publish_every makes a version live at each multiple, and the end one more."""
    events = events_of(make_spec(tmp_path, TRAIN, publish_every=2), loaded)
    assert [(p.step, p.version) for p in of_type(events, TrainPublished)] == [(2, 1), (4, 2), (6, 3)]
    assert [i.version for i in loaded.adapters.list()] == [1, 2, 3]


def test_epochs_end_a_run(loaded: LoadedModel, tmp_path: Path) -> None:
    """1.5 epochs of 7 examples in batches of 2 are 6 steps; the smaller of epochs and max_steps counts."""
    finished = events_of(make_spec(tmp_path / "a", TRAIN, epochs=1.5, max_steps=None), loaded)[-1]
    assert isinstance(finished, TrainFinished)
    assert (finished.step, finished.stop_reason) == (6, "epochs")
    finished = events_of(make_spec(tmp_path / "b", TRAIN, epochs=100, max_steps=2), loaded)[-1]
    assert isinstance(finished, TrainFinished)
    assert (finished.step, finished.stop_reason) == (2, "max_steps")


def test_packing_does_not_leak_between_examples(loaded: LoadedModel, tmp_path: Path) -> None:
    """Examples packed into one forward give the hidden states and the gradients of forwards of their own; changing one
    example leaves the states of the others as they were, bit for bit."""
    from engine.training.batching import MicroBatch
    from engine.training.forward import TrainingForward
    from engine.training.lora_init import new_adapter
    from engine.training.proof import probe

    forward = TrainingForward(loaded, torch.float32)
    adapter = probe(new_adapter("tone", loaded.model.linears(), LoRAParams(), 0, "cpu"), 0)
    for pair in adapter.modules.values():
        for factor in pair:
            factor.requires_grad_()
    examples = list(Examples.of(TRAIN[:4]))

    def gradients(batches: list[MicroBatch]) -> tuple[list[Tensor], Tensor]:
        hidden = [forward.hidden(batch, adapter) for batch in batches]
        total = sum((forward.nll_sum(h, b) for h, b in zip(hidden, batches, strict=True)), torch.zeros(()))
        parameters = [factor for pair in adapter.modules.values() for factor in pair]
        return list(torch.autograd.grad(total, parameters)), torch.cat(hidden).detach()

    packed, packed_hidden = gradients([MicroBatch.of(examples)])
    alone, alone_hidden = gradients([MicroBatch.of([e]) for e in examples])
    torch.testing.assert_close(packed_hidden, alone_hidden, atol=1e-5, rtol=1e-5)
    for ours, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    changed = list(Examples.of([TRAIN[0], random_examples([20], seed=9)[0], *TRAIN[2:4]]))
    _, other = gradients([MicroBatch.of(changed)])
    outside = torch.ones(len(other), dtype=torch.bool)
    outside[10:30] = False
    assert torch.equal(other[outside], packed_hidden[outside])
    assert not torch.equal(other[10:30], packed_hidden[10:30])


@pytest.mark.parametrize("cut", [{"gradient_accumulation_steps": 3}, {"packing": False}, {"small": True}])
def test_the_cut_into_micro_batches_does_not_change_the_run(
    tiny_llama: Path, tmp_path: Path, cut: dict[str, Any]
) -> None:
    """Gradients are normalised over all loss tokens of the step, so accumulation, packing and the size of a forward
    change nothing but rounding, though the micro-batches hold different numbers of tokens."""
    whole = load_tiny(tiny_llama, tmp_path / "state-a")
    expected = losses(events_of(make_spec(tmp_path / "a", TRAIN, batch_size=5), whole))
    small = {"max_batch_tokens": 16} if cut.pop("small", False) else {}
    loaded = load_tiny(tiny_llama, tmp_path / "state-b", **small)
    actual = losses(events_of(make_spec(tmp_path / "b", TRAIN, batch_size=5, **cut), loaded))
    for step, (loss, norm) in expected.items():
        assert actual[step][0] == pytest.approx(loss, rel=1e-4)
        if norm is not None:
            assert actual[step][1] == pytest.approx(norm, rel=1e-3)


def test_going_on_from_an_adapter(loaded: LoadedModel, tmp_path: Path) -> None:
    """A second run begins where the first one's weights are: its step 0 has their loss, it keeps their shape whatever
    the LoRA parameters say, and it publishes the next version with its parent."""
    lora = LoRAParams(rank=3, alpha=5.0, use_rslora=True, target_modules=["q_proj", "down_proj"], layers=[1])
    options: dict[str, Any] = {"shuffle": False, "batch_size": 7, "max_steps": 8}
    first = events_of(make_spec(tmp_path, TRAIN, lora=lora, **options), loaded)
    spec = dataclasses.replace(make_spec(tmp_path, TRAIN, run="second", **options), init_adapter="tone")
    second = events_of(spec, loaded)
    steps = of_type(second, TrainStep)
    assert steps[0].loss < of_type(first, TrainStep)[-1].loss
    info = loaded.adapters.info("tone")
    assert (info.version, info.rank, info.alpha, info.use_rslora) == (2, 3, 5.0, True)
    assert info.target_modules == ["down_proj", "q_proj"]
    assert set(loaded.adapters.get("tone").modules) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert json.loads((Path(info.path) / "lineage.json").read_text())["parent"] == ["tone", 1]


def test_going_on_from_an_adapter_that_was_renamed(loaded: LoadedModel, tmp_path: Path) -> None:
    """A run that is resumed before its first checkpoint finds the weights that it named under their present name."""
    events_of(make_spec(tmp_path, TRAIN, max_steps=2), loaded)
    spec = make_spec(tmp_path, TRAIN, run="second", max_steps=2)
    spec = dataclasses.replace(spec, adapter="child", init_adapter="tone", init_adapter_version=1)
    loaded.adapters.rename("tone", "voice")
    assert isinstance(events_of(spec, loaded)[-1], TrainFinished)
    assert loaded.adapters.info("child").parent == ("voice", 1)


def test_weights_that_give_no_number_are_not_published(loaded: LoadedModel, tmp_path: Path) -> None:
    """Steps so large that the model overflows, where the base does not: the version before stays live."""
    spec = make_spec(tmp_path, TRAIN, TRAIN, learning_rate=1e3, weight_decay=1e3, max_steps=3, publish="last")
    with pytest.raises(TrainingError, match="held-out NLL") as caught:
        events_of(spec, loaded)
    assert caught.value.reason == "NON_FINITE"
    assert not loaded.adapters.list()


def test_adapting_online(loaded: LoadedModel, tmp_path: Path) -> None:
    """A few steps on a few examples, held out as well: base and final NLL are the loss on them before and after."""
    options: dict[str, Any] = {"batch_size": 2, "max_steps": 3, "publish": "last"}
    events = events_of(make_spec(tmp_path, TRAIN[:2], TRAIN[:2], **options), loaded)
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    assert finished.base_nll is not None
    assert finished.final_nll is not None
    assert finished.base_nll == pytest.approx(of_type(events, TrainStep)[0].loss, rel=1e-5)
    assert finished.final_nll < finished.base_nll


def test_a_forward_that_differs_is_refused(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If training applied adapters otherwise than serving does, nothing would be trained: though B begins at zero, the
    proof runs with a B that is not."""
    right = LoRABatch.linear

    def wrong(self: LoRABatch, name: str, x: Tensor, layer: FrozenProduct) -> Tensor:
        result = right(self, name, x, layer)
        return result if torch.is_grad_enabled() else result * 1.01 - 0.01 * layer.product(x)

    monkeypatch.setattr(LoRABatch, "linear", wrong)
    events: list[Any] = []
    with pytest.raises(TrainingError, match="differ by") as caught:
        _collect(make_spec(tmp_path, TRAIN, forward_tolerance=1e-4), loaded, events)
    assert caught.value.reason == "FORWARD_MISMATCH"
    assert not told(events)


def test_bfloat16_compute_with_float32_masters(tiny_llama: Path, tmp_path: Path) -> None:
    """bfloat16 by autocast over a float32 model, and over a model resident in bfloat16: both learn, and what they save
    has values that bfloat16 cannot hold."""
    for name, dtype, compute in (("cast", torch.float32, "bfloat16"), ("resident", torch.bfloat16, "auto")):
        loaded = load_tiny(tiny_llama, tmp_path / name / "state", dtype=dtype)
        spec = make_spec(tmp_path / name, TRAIN, batch_size=7, max_steps=15, compute_dtype=compute)
        events = events_of(spec, loaded)
        steps = of_type(events, TrainStep)
        assert steps[-1].loss < 0.9 * steps[0].loss
        finished = events[-1]
        assert isinstance(finished, TrainFinished)
        saved = load_adapter(Path(finished.adapter_path), loaded.model.linears(), name="tone")
        a, _ = saved.modules["model.layers.0.mlp.up_proj"]
        assert a.dtype == torch.float32
        assert not torch.equal(a, a.bfloat16().float())
        assert loaded.adapters.get("tone").modules["model.layers.0.mlp.up_proj"][0].dtype == dtype
    with pytest.raises(FailedPreconditionError, match="compute_dtype"):
        train(make_spec(tmp_path / "no", TRAIN, compute_dtype="float32"), loaded)


def test_cancelling_leaves_nothing_half_done(loaded: LoadedModel, tmp_path: Path) -> None:
    """Closed anywhere, a run leaves only whole checkpoints and no version."""
    for num_slices in range(1, 90, 7):
        spec = make_spec(tmp_path / str(num_slices), TRAIN, HELD_OUT, checkpoint_every=1)
        interrupted_after(spec, loaded, num_slices, "close")
        for path in (tmp_path / str(num_slices) / "run" / "checkpoints").glob("*"):
            assert path.name == "best" or path.name.startswith("step-")
            load_adapter(path, loaded.model.linears(), name="tone")
    assert loaded.adapters.list() == []


def test_a_full_disk_keeps_the_checkpoint_before(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be written ends the run with that error; the one before is whole and goes on exactly."""
    spec = make_spec(tmp_path, TRAIN, checkpoint_every=2)
    whole = losses(events_of(make_spec(tmp_path / "whole", TRAIN, checkpoint_every=2), loaded))
    from engine.training import checkpoint

    save, calls = checkpoint.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        events_of(spec, loaded)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    events = events_of(spec, loaded)
    assert losses(events) == {step: loss for step, loss in whole.items() if step > 2}


BAD: dict[str, tuple[Callable[[TrainSpec], TrainSpec], type[EngineError], str]] = {
    "unknown target": (
        lambda s: dataclasses.replace(s, lora=LoRAParams(target_modules=["c_attn"])),
        InvalidArgumentError, "'c_attn'; accepted: down_proj, gate_proj",
    ),
    "layer out of range": (
        lambda s: dataclasses.replace(s, lora=LoRAParams(layers=[2])), InvalidArgumentError, r"2; accepted.*\[0, 1\]",
    ),
    "rank": (lambda s: dataclasses.replace(s, lora=LoRAParams(rank=0)), InvalidArgumentError, "rank is 0"),
    "alpha": (lambda s: dataclasses.replace(s, lora=LoRAParams(alpha=0.0)), InvalidArgumentError, "alpha is 0"),
    "dropout": (lambda s: dataclasses.replace(s, lora=LoRAParams(dropout=1.0)), InvalidArgumentError, "dropout is 1"),
    "init_adapter": (lambda s: dataclasses.replace(s, init_adapter="gone"), NotFoundError, "no adapter 'gone'"),
    "dataset": (lambda s: dataclasses.replace(s, dataset_path="/nowhere"), FormatError, "cannot be read as a dataset"),
    "name": (lambda s: dataclasses.replace(s, adapter="../up"), InvalidArgumentError, r"\.\./up"),
    "too long": (
        lambda s: dataclasses.replace(s, params=dataclasses.replace(s.params, max_seq_len=20)),
        OutOfRangeError, "30 tokens; accepted: at most 20",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_runs_are_refused_when_they_are_started(loaded: LoadedModel, tmp_path: Path, fault: str) -> None:
    """Before any work, naming what is wrong and what would be accepted."""
    change, error, message = BAD[fault]
    with pytest.raises(error, match=message):
        train(change(make_spec(tmp_path, TRAIN)), loaded)


def test_token_ids_outside_of_the_vocabulary(loaded: LoadedModel, tmp_path: Path) -> None:
    """A dataset of another tokenizer is refused."""
    with pytest.raises(InvalidArgumentError, match=r"token id \d+; accepted: \[0, 300\)"):
        train(make_spec(tmp_path, random_examples([30], vocab_size=3000)), loaded)


def test_serving_goes_on_and_requests_keep_their_version(tiny_llama: Path, tmp_path: Path) -> None:
    """While a run trains and publishes, greedy streams of the base and of the adapter's first version go on, and give
    exactly what they give without it; requests that come after a publication get the new version."""
    state_dir = str(tmp_path / "state")
    engine = Engine(
        EngineConfig(device="cpu", kv_cache_bytes=4 << 20, block_size=4, num_threads=1, state_dir=state_dir)
    )
    engine.load_model("tiny", tiny_llama)
    engine.start_job(make_spec(tmp_path / "first", TRAIN, max_steps=20))
    while engine.has_jobs():
        engine.advance_jobs()

    def request(request_id: str, adapter: str | None) -> Request:
        sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        return Request(
            request_id=request_id, model="tiny", prompt_token_ids=[9, 8, 7], sampling=sampling, adapter=adapter
        )

    def run(requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, set[int | None]], list[JobEvent]]:
        tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        versions: dict[str, set[int | None]] = {r.request_id: set() for r in requests}
        events: list[JobEvent] = []
        for entry in requests:
            engine.add_request(entry)
        while engine.has_requests():
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
                versions[output.request_id].add(output.adapter_version)
            events += engine.advance_jobs()
        return tokens, versions, events

    alone, _, _ = run([request("base", None), request("tuned", "tone")])
    assert alone["base"] != alone["tuned"]
    engine.start_job(make_spec(tmp_path / "second", TRAIN, run="second", max_steps=40, publish_every=1))
    beside, versions, events = run([request("base", None), request("tuned", "tone")])
    assert of_type(events, TrainPublished), "a version was published while the requests ran"
    assert beside == alone
    assert versions == {"base": {None}, "tuned": {1}}
    while engine.has_jobs():
        events += engine.advance_jobs()
    last = of_type(events, TrainPublished)[-1].version
    _, versions, _ = run([request("later", "tone")])
    assert versions == {"later": {last}}


def test_the_published_adapter_serves_what_was_trained(loaded: LoadedModel, tmp_path: Path) -> None:
    """The NLL of the held-out examples through the serving path with the live version is the run's final NLL."""
    spec = make_spec(tmp_path, TRAIN, HELD_OUT, publish="last", max_steps=10)
    finished = events_of(spec, loaded)[-1]
    assert isinstance(finished, TrainFinished)
    adapter = loaded.adapters.get("tone")
    logits = serving_logits(loaded, [e.token_ids for e in HELD_OUT], adapter)
    total, count = 0.0, 0
    for example, rows in zip(HELD_OUT, logits, strict=True):
        ids = torch.tensor(example.token_ids)
        nll = torch.nn.functional.cross_entropy(rows[:-1], ids[1:], reduction="none")
        mask = torch.tensor(example.loss_mask[1:])
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    assert finished.final_nll == pytest.approx(total / count, abs=1e-5)
