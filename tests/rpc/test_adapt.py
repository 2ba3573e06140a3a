"""Online adaptation over the wire: it learns, within bounds, beside live traffic, from whichever version is live."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.calls import TIMEOUT, Reply, examples, generate, request, text_prompt
from tests.rpc.conftest import CONTEXT, MODEL
from tests.rpc.harness import Stubs, fails
from whet.v1 import common_pb2, model_pb2, training_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PROBES = [text_prompt("Once upon a time"), text_prompt("The capital of France")]

names = (f"adapted-{i}" for i in itertools.count())


def ids_prompt(ids: list[int]) -> common_pb2.Prompt:
    """A prompt as token ids."""
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=ids))


def adapt(stubs: Stubs, name: str, **fields: Any) -> training_pb2.AdaptResponse:
    values = {"examples": examples(4), "steps": 3, "learning_rate": 1e-2} | fields
    message = training_pb2.AdaptRequest(model=MODEL, adapter=name, **values)
    return stubs.training.Adapt(message, timeout=TIMEOUT)


def test_adapt_learns_and_goes_on_from_where_it_was(stubs: Stubs) -> None:
    name = next(names)
    first = adapt(stubs, name)
    assert first.loss_after < first.loss_before
    assert (first.version, first.steps) == (1, 3)
    assert first.num_loss_tokens > 0
    second = adapt(stubs, name)
    assert second.version == 2
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-4)
    assert second.loss_after < second.loss_before
    reply = generate(stubs, adapter=common_pb2.AdapterSelector(name=name))
    assert reply.started.adapter_version == 2


def test_adapt_is_done_once_for_one_request_id(stubs: Stubs) -> None:
    name = next(names)
    first = adapt(stubs, name, request_id=f"adapt-{name}")
    assert adapt(stubs, name, request_id=f"adapt-{name}") == first
    assert adapt(stubs, name).version == 2


def test_adapt_says_how_many_examples_were_cut(stubs: Stubs) -> None:
    """Each is counted once, though its loss is measured as well, in the reply and in the archive alike."""
    name = next(names)
    assert adapt(stubs, name).num_truncated == 0
    long = [
        training_pb2.TrainExample(prompt_completion=training_pb2.PromptCompletion(prompt="x" * 80, completion=" yes")),
        training_pb2.TrainExample(text="y" * 80),
    ]
    reply = adapt(stubs, name, examples=[*long, *examples(1)], max_seq_len=64, request_id=f"cut-{name}")
    assert reply.num_truncated == 2
    assert adapt(stubs, name, examples=[*long, *examples(1)], max_seq_len=64, request_id=f"cut-{name}") == reply
    watch = stubs.training.WatchRun(
        training_pb2.WatchRunRequest(run_id=runs_of(stubs, name)[0].run_id), timeout=TIMEOUT
    )
    dataset = next(iter(watch)).event.started.dataset
    assert (dataset.num_examples, dataset.num_eval_examples, dataset.num_truncated) == (3, 3, 2)
    with fails(INVALID, field="examples[0]", reason="TOO_LONG"):
        completion = training_pb2.PromptCompletion(prompt="x", completion="y" * 80)
        adapt(stubs, name, examples=[training_pb2.TrainExample(prompt_completion=completion)], max_seq_len=64)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("examples", {"examples": []}),
        ("examples", {"examples": examples(65)}),
        ("examples[0]", {"examples": [training_pb2.TrainExample(text="")]}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": 101}),
        ("learning_rate", {"learning_rate": math.inf}),
        ("max_seq_len", {"max_seq_len": 1}),
        ("lora.rank", {"lora": training_pb2.LoRAConfig(rank=-1)}),
        ("adapter", {"adapter": "a/b"}),
        ("seed", {"seed": -1}),
        ("optimizer", {"optimizer": 9}),
        ("momentum", {"momentum": 1.0}),
        ("weight_decay", {"weight_decay": -1.0}),
        ("max_kl", {"max_kl": 0.1}),  # without probes
        ("max_kl", {"max_kl": math.nan, "probe_prompts": PROBES}),
        ("max_kl", {"max_kl": math.inf, "probe_prompts": PROBES}),
        ("max_kl", {"max_kl": 0.0, "probe_prompts": PROBES}),
        ("max_kl", {"max_kl": -1.0, "probe_prompts": PROBES}),
        ("probe_prompts[1]", {"probe_prompts": [text_prompt("a"), common_pb2.Prompt()]}),
        ("probe_prompts[0].text", {"probe_prompts": [text_prompt("")]}),
        ("probe_prompts[0].token_ids", {"probe_prompts": [ids_prompt([])]}),
        ("probe_prompts[0].token_ids", {"probe_prompts": [ids_prompt([300])]}),
        ("probe_prompts[0]", {"probe_prompts": [ids_prompt([1] * (CONTEXT + 1))]}),
        ("probe_prompts[8]", {"probe_prompts": [ids_prompt([1] * 512)] * 9}),
        ("probe_prompts", {"probe_prompts": [text_prompt("a")] * 33}),
    ],
)
def test_adapt_names_a_bad_value(stubs: Stubs, field: str, values: dict[str, Any]) -> None:
    with fails(INVALID, field=field):
        message = {"model": MODEL, "adapter": "bad", "examples": examples(1)} | values
        stubs.training.Adapt(training_pb2.AdaptRequest(**message), timeout=TIMEOUT)


# ------------------------------------------------------------------------------------------------------------- bounds


def test_adapt_without_probes_says_nothing_of_kl(stubs: Stubs) -> None:
    response = adapt(stubs, next(names))
    assert not response.HasField("kl")
    assert response.stop_reason == training_pb2.STOP_REASON_MAX_STEPS


@pytest.mark.parametrize("optimizer", [training_pb2.OPTIMIZER_ADAMW, training_pb2.OPTIMIZER_SGD])
def test_adapt_stays_within_the_kl_that_it_is_given(stubs: Stubs, optimizer: Any) -> None:
    """At a learning rate a hundred times too large the loss still falls, and the reply tells a KL below the limit."""
    name = next(names)
    far = adapt(stubs, next(names), probe_prompts=PROBES, learning_rate=1.0, optimizer=optimizer)
    assert far.kl > 0.5
    near = adapt(stubs, name, probe_prompts=PROBES, max_kl=0.02, learning_rate=1.0, optimizer=optimizer)
    assert 0.0 < near.kl <= 0.02
    assert near.loss_after < near.loss_before
    assert near.version == 1
    assert near.steps >= 1
    run = runs_of(stubs, name)[0]
    events = [
        r.event for r in stubs.training.WatchRun(training_pb2.WatchRunRequest(run_id=run.run_id), timeout=TIMEOUT)
    ]
    steps = [event.step for event in events if event.WhichOneof("event") == "step"]
    assert all(0.0 < step.kl <= 0.02 for step in steps[1:])
    assert not steps[0].HasField("kl")
    assert events[-1].finished.kl == near.kl
    assert "MAX_KL" in {event.warning.reason for event in events if event.WhichOneof("event") == "warning"}


def test_adapt_publishes_nothing_where_no_step_is_within_the_limit(stubs: Stubs) -> None:
    name = next(names)
    response = adapt(stubs, name, probe_prompts=PROBES, max_kl=1e-12, learning_rate=10.0)
    assert not response.HasField("version")
    assert not response.HasField("kl")
    assert (response.steps, response.stop_reason) == (0, training_pb2.STOP_REASON_MAX_KL)
    assert response.loss_after == response.loss_before
    with fails(grpc.StatusCode.NOT_FOUND):
        generate(stubs, adapter=common_pb2.AdapterSelector(name=name))
    [run] = runs_of(stubs, name)
    assert run.state == training_pb2.RUN_STATE_FINISHED
    assert not run.HasField("version")


def test_probes_may_be_token_ids(stubs: Stubs) -> None:
    tokenized = adapt(stubs, next(names), probe_prompts=[ids_prompt([5, 6, 7])])
    assert tokenized.kl > 0.0


# ----------------------------------------------------------------------------------------- live traffic and versions


def runs_of(stubs: Stubs, adapter: str) -> list[training_pb2.Run]:
    return list(stubs.training.ListRuns(training_pb2.ListRunsRequest(adapter=adapter), timeout=TIMEOUT).runs)


def test_adapt_interrupts_no_stream(stubs: Stubs) -> None:
    """A stream that is under way when Adapt begins, and those that begin while it works, end with the tokens that they
    have without it."""
    alone = generate(stubs, max_tokens=400).token_ids()
    assert len(alone) == 400
    stream = stubs.generation.Generate(request(max_tokens=400), timeout=TIMEOUT)
    first = [next(stream), next(stream)]
    message = training_pb2.AdaptRequest(
        model=MODEL, adapter=next(names), examples=examples(8), steps=8, probe_prompts=PROBES, max_kl=1.0
    )
    adaptation = stubs.training.Adapt.future(message, timeout=TIMEOUT)
    assert Reply([*first, *stream]).token_ids() == alone
    while not adaptation.done():
        assert generate(stubs, max_tokens=400).token_ids() == alone
    assert adaptation.result().steps == 8


def test_adapt_goes_on_from_the_version_that_was_made_live(stubs: Stubs) -> None:
    """adapt, adapt, back to version 1, adapt: the third begins with the weights of the first, gets a new number, and
    says what it comes from."""
    name = next(names)
    first = adapt(stubs, name)
    second = adapt(stubs, name)
    assert (first.version, second.version) == (1, 2)
    stubs.model.LoadAdapter(model_pb2.LoadAdapterRequest(model=MODEL, name=name, version=1), timeout=TIMEOUT)
    third = adapt(stubs, name)
    assert third.version == 3
    assert third.loss_before == second.loss_before != second.loss_after
    assert third.loss_after == second.loss_after  # the same steps from the same weights
    [last, *_] = runs_of(stubs, name)
    assert (last.config.init_adapter.name, last.config.init_adapter.version) == (name, 1)
    watch = stubs.training.WatchRun(training_pb2.WatchRunRequest(run_id=last.run_id), timeout=TIMEOUT)
    [*_, end] = [response.event for response in watch]
    lineage = json.loads((Path(end.finished.adapter_path) / "lineage.json").read_text())
    assert lineage["parent"] == [name, 1]
    assert lineage["run_id"] == last.run_id
