"""Training over the wire: runs, their events and their archive; Adapt."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from tests.rpc.calls import TIMEOUT, examples, generate, train, train_messages
from tests.rpc.conftest import CONTEXT, EMBEDDER, MODEL
from tests.rpc.harness import ServerProcess, Stubs, fails
from whet.v1 import common_pb2, training_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
names = (f"adapter-{number}" for number in itertools.count())


def kinds(events: list[training_pb2.TrainEvent]) -> list[str]:
    return [event.WhichOneof("event") or "" for event in events]


def get_run(stubs: Stubs, run_id: str) -> training_pb2.Run:
    return stubs.training.GetRun(training_pb2.GetRunRequest(run_id=run_id), timeout=TIMEOUT).run


def watch(stubs: Stubs, run_id: str, from_step: int = 0) -> list[training_pb2.TrainEvent]:
    message = training_pb2.WatchRunRequest(run_id=run_id, from_step=from_step)
    return [response.event for response in stubs.training.WatchRun(message, timeout=TIMEOUT)]


def test_a_run_from_configuration_to_a_live_adapter(stubs: Stubs) -> None:
    name = next(names)
    bad = training_pb2.TrainExample(prompt_completion=training_pb2.PromptCompletion(prompt="x", completion=""))
    events = train(
        stubs,
        adapter=name,
        train=[*examples(8), bad],
        held_out=examples(2),
        params={"max_steps": 6, "eval_every": 3, "checkpoint_every": 3},
    )
    assert kinds(events)[0] == "started"
    assert kinds(events)[-1] == "finished"
    assert {"step", "evaluation", "checkpoint", "published"} <= set(kinds(events))
    started = events[0].started
    assert started.num_trainable_parameters > 0
    assert (started.dataset.num_examples, started.dataset.num_eval_examples) == (8, 2)
    [rejected] = started.dataset.rejected
    assert (started.dataset.num_rejected, rejected.index, rejected.reason) == (1, 8, "NO_COMPLETION")
    assert started.forward_difference < 1e-3
    assert 0 < started.estimated_memory_bytes < 100 << 20
    steps = [event.step for event in events if event.WhichOneof("event") == "step"]
    assert [step.step for step in steps] == list(range(7))
    assert not steps[0].HasField("grad_norm")
    assert all(step.peak_memory_bytes > 10 << 20 for step in steps)  # of the whole process, on the CPU as well
    assert all(step.grad_norm > 0 for step in steps[1:])
    finished = events[-1].finished
    assert finished.stop_reason == training_pb2.STOP_REASON_MAX_STEPS
    assert finished.final_nll < finished.base_nll
    assert finished.version == 1
    reply = generate(stubs, "3 is", adapter=common_pb2.AdapterSelector(name=name))
    assert reply.started.adapter_version == reply.finished.adapter_version == 1
    assert reply.token_ids() != generate(stubs, "3 is").token_ids()


def test_a_finished_run_is_archived(stubs: Stubs) -> None:
    name = next(names)
    events = train(stubs, adapter=name, held_out=examples(2), request_id=f"key-{name}")
    run = get_run(stubs, events[0].run_id)
    assert run.state == training_pb2.RUN_STATE_FINISHED
    assert (run.step, run.total_steps, run.version) == (4, 4, 1)
    assert run.final_nll == events[-1].finished.final_nll
    assert run.config.params.learning_rate == 1e-2
    assert run.config.params.batch_size == 4
    assert run.config.lora.rank == 8  # resolved
    assert run.create_time.ToNanoseconds() <= run.start_time.ToNanoseconds() <= run.end_time.ToNanoseconds()
    assert watch(stubs, run.run_id) == events
    late = watch(stubs, run.run_id, from_step=4)
    assert late[0] == events[0]
    assert [event.step.step for event in late if event.WhichOneof("event") == "step"] == [4]
    again = train(stubs, adapter=name, held_out=examples(2), request_id=f"key-{name}")
    assert again == events  # the first one's run, not another
    with fails(grpc.StatusCode.ALREADY_EXISTS, reason="REQUEST_ID_REUSED"):
        train(stubs, adapter=next(names), request_id=f"key-{name}")


def test_the_run_id_comes_before_the_events(stubs: Stubs) -> None:
    call = stubs.training.Train(train_messages(adapter=next(names)), timeout=TIMEOUT)
    metadata = dict(call.initial_metadata())
    assert get_run(stubs, metadata["x-run-id"]).run_id == metadata["x-run-id"]
    events = [response.event for response in call]
    assert events[0].run_id == metadata["x-run-id"]


def test_a_run_goes_on_without_its_caller_and_can_be_watched(stubs: Stubs) -> None:
    call = stubs.training.Train(train_messages(adapter=next(names), params={"max_steps": 30}), timeout=TIMEOUT)
    seen = [next(iter(call)).event for _ in range(3)]
    call.cancel()
    run_id = seen[0].run_id
    everything = watch(stubs, run_id)
    assert everything[:3] == seen
    assert [event.sequence for event in everything] == list(range(len(everything)))
    assert everything[-1].finished.step == 30
    assert get_run(stubs, run_id).state == training_pb2.RUN_STATE_FINISHED


def test_a_run_may_end_with_its_caller(stubs: Stubs) -> None:
    messages = train_messages(
        adapter=next(names), params={"max_steps": 2000}, on_disconnect=training_pb2.ON_DISCONNECT_CANCEL
    )
    call = stubs.training.Train(messages, timeout=TIMEOUT)
    run_id = next(iter(call)).event.run_id
    next(iter(call))
    call.cancel()
    assert watch(stubs, run_id)[-1].finished.stop_reason == training_pb2.STOP_REASON_CANCELLED
    assert get_run(stubs, run_id).state == training_pb2.RUN_STATE_CANCELLED


def test_a_cancelled_run_can_go_on(stubs: Stubs) -> None:
    name = next(names)
    params = {"max_steps": 80, "checkpoint_every": 4}  # many after the first checkpoint, when the cancel is sent
    call = stubs.training.Train(train_messages(adapter=name, params=params), timeout=TIMEOUT)
    responses = iter(call)
    for response in responses:
        if response.event.WhichOneof("event") == "checkpoint":
            break
    run_id = response.event.run_id
    cancelled = stubs.training.CancelRun(training_pb2.CancelRunRequest(run_id=run_id), timeout=TIMEOUT).run
    assert cancelled.state == training_pb2.RUN_STATE_CANCELLED
    assert [response.event for response in responses][-1].finished.stop_reason == training_pb2.STOP_REASON_CANCELLED
    resumed = [
        response.event
        for response in stubs.training.ResumeRun(training_pb2.ResumeRunRequest(run_id=run_id), timeout=TIMEOUT)
    ]
    assert resumed[0].started.resumed_from_step >= 4
    assert resumed[-1].finished.step == 80
    whole = watch(stubs, run_id)
    assert kinds(whole).count("finished") == 1
    assert [event.sequence for event in whole] == list(range(len(whole)))
    straight = train(stubs, adapter=next(names), params=params)
    losses = {event.step.step: event.step.loss for event in straight if event.WhichOneof("event") == "step"}
    for event in resumed:
        if event.WhichOneof("event") == "step":
            assert event.step.loss == losses[event.step.step]  # exactly as without the interruption


def test_a_finished_run_neither_resumes_nor_cancels(stubs: Stubs) -> None:
    run_id = train(stubs, adapter=next(names))[0].run_id
    with fails(grpc.StatusCode.FAILED_PRECONDITION, reason="RUN_NOT_RESUMABLE"):
        list(stubs.training.ResumeRun(training_pb2.ResumeRunRequest(run_id=run_id), timeout=TIMEOUT))
    run = stubs.training.CancelRun(training_pb2.CancelRunRequest(run_id=run_id), timeout=TIMEOUT).run
    assert run.state == training_pb2.RUN_STATE_FINISHED


def test_generation_goes_on_while_a_run_does(stubs: Stubs) -> None:
    before = generate(stubs, max_tokens=16).token_ids()
    call = stubs.training.Train(train_messages(adapter=next(names), params={"max_steps": 60}), timeout=TIMEOUT)
    responses = iter(call)
    next(responses)
    assert generate(stubs, max_tokens=16).token_ids() == before
    assert list(responses)[-1].event.WhichOneof("event") == "finished"


def test_a_run_continues_from_an_adapter(stubs: Stubs) -> None:
    first, second = next(names), next(names)
    last = train(stubs, adapter=first, held_out=examples(2), params={"max_steps": 10})[-1].finished
    init = common_pb2.AdapterSelector(name=first, version=1)
    events = train(stubs, adapter=second, held_out=examples(2), init_adapter=init)
    assert events[-1].finished.base_nll == pytest.approx(last.final_nll, rel=1e-3)
    again = train(stubs, adapter=first)
    assert again[-1].finished.version == 2


def test_lists_page(stubs: Stubs) -> None:
    name = next(names)
    ids = [train(stubs, adapter=name, params={"max_steps": 1})[0].run_id for _ in range(3)]
    found: list[str] = []
    token = ""
    while True:
        message = training_pb2.ListRunsRequest(page_size=2, page_token=token, model=MODEL, adapter=name)
        page = stubs.training.ListRuns(message, timeout=TIMEOUT)
        found += [run.run_id for run in page.runs]
        token = page.next_page_token
        if not token:
            break
    assert found == ids[::-1]
    finished = training_pb2.ListRunsRequest(adapter=name, state=training_pb2.RUN_STATE_RUNNING)
    assert not stubs.training.ListRuns(finished, timeout=TIMEOUT).runs
    for field, bad in (("page_size", -1), ("page_size", 1001), ("page_token", "?"), ("state", 99)):
        with fails(INVALID, field=field):
            stubs.training.ListRuns(training_pb2.ListRunsRequest(**{field: bad}), timeout=TIMEOUT)  # type: ignore[arg-type]


def test_unknown_runs_are_not_found(stubs: Stubs) -> None:
    for call in (
        lambda: get_run(stubs, "nope"),
        lambda: watch(stubs, "nope"),
        lambda: stubs.training.CancelRun(training_pb2.CancelRunRequest(run_id="nope"), timeout=TIMEOUT),
        lambda: list(stubs.training.ResumeRun(training_pb2.ResumeRunRequest(run_id="nope"), timeout=TIMEOUT)),
    ):
        with fails(grpc.StatusCode.NOT_FOUND, reason="RUN_NOT_FOUND"):
            call()


BAD: list[tuple[str, dict[str, Any]]] = [
    ("adapter", {"adapter": "../tone"}),
    ("params.learning_rate", {"params": {"learning_rate": math.nan}}),
    ("params.max_steps", {"params": {"max_steps": -1}}),
    ("params.batch_size", {"params": {"batch_size": 1 << 30}}),
    ("config.params.max_seq_len", {"params": {"max_seq_len": CONTEXT + 1}}),
    ("lora.rank", {"lora": training_pb2.LoRAConfig(rank=0)}),
    ("lora.target_modules", {"lora": training_pb2.LoRAConfig(target_modules=["nope"])}),
    ("lora.target_parameters", {"lora": training_pb2.LoRAConfig(target_parameters=["mlp.experts.down_proj"])}),
    ("eval_fraction", {"eval_fraction": 1.0}),
    ("eval_fraction", {"eval_fraction": 0.5, "held_out": examples(1)}),
    ("on_disconnect", {"on_disconnect": 9}),
    ("examples", {"train": [examples(1)[0].__class__(text="")]}),
    ("examples[0]", {"train": [training_pb2.TrainExample()]}),
]


@pytest.mark.parametrize(("field", "values"), BAD, ids=[f"{field}-{i}" for i, (field, _) in enumerate(BAD)])
def test_a_bad_value_is_named(stubs: Stubs, field: str, values: dict[str, Any]) -> None:
    with fails(INVALID, field=field):
        train(stubs, **{"adapter": "bad", **values})


def test_messages_out_of_order_are_refused(stubs: Stubs) -> None:
    config, batch = list(train_messages())
    for messages, field in (([], "config"), ([batch], "config"), ([config, config], "examples")):
        with fails(INVALID, field=field):
            list(stubs.training.Train(iter(messages), timeout=TIMEOUT))


def test_only_generative_models_train(stubs: Stubs) -> None:
    with fails(grpc.StatusCode.FAILED_PRECONDITION, reason="WRONG_TASK"):
        train(stubs, model=EMBEDDER)
    with fails(grpc.StatusCode.NOT_FOUND, reason="MODEL_NOT_FOUND"):
        train(stubs, model="unknown")
    unknown = common_pb2.AdapterSelector(name="unknown")
    with fails(grpc.StatusCode.NOT_FOUND):
        train(stubs, adapter=next(names), init_adapter=unknown)


# ------------------------------------------------------------------------------------------------- drain and restart


def test_a_run_outlives_its_worker(start_server: Callable[..., ServerProcess]) -> None:
    """It goes on from its last checkpoint in the next worker, and says so; a watcher misses and repeats nothing."""
    server = start_server()
    stubs = Stubs(server.address)
    params = {"max_steps": 120, "checkpoint_every": 10}  # many after the second checkpoint, when the kill is sent
    call = stubs.training.Train(train_messages(params=params, held_out=examples(2)), timeout=TIMEOUT)
    events: list[training_pb2.TrainEvent] = []
    saved: list[int] = []
    for response in call:
        events.append(response.event)
        if response.event.WhichOneof("event") == "checkpoint":
            saved.append(response.event.checkpoint.step)
            if len(saved) == 2:
                os.kill(server.worker_pid(), signal.SIGKILL)
    assert [event.sequence for event in events] == list(range(len(events)))
    warnings = [event.warning.reason for event in events if event.WhichOneof("event") == "warning"]
    assert "WORKER_RESTARTED" in warnings
    starts = [event.started for event in events if event.WhichOneof("event") == "started"]
    assert len(starts) == 2
    assert starts[1].resumed_from_step >= saved[1]
    assert events[-1].finished.step == 120
    assert watch(stubs, events[0].run_id) == events
    stubs.close()


def test_a_drain_checkpoints_and_the_next_server_goes_on(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-seconds", "5")
    stubs = Stubs(server.address)
    call = stubs.training.Train(train_messages(params={"max_steps": 4000}), timeout=TIMEOUT)
    responses = iter(call)
    for _ in range(4):
        event = next(responses).event
    assert server.stop() == 0
    with fails(grpc.StatusCode.UNAVAILABLE, reason="RUN_INTERRUPTED"):
        list(responses)
    stubs.close()
    stubs = Stubs(start_server().address)
    run = get_run(stubs, event.run_id)
    assert run.state == training_pb2.RUN_STATE_INTERRUPTED
    assert kinds(watch(stubs, run.run_id))[-1] != "finished"  # ends at once
    resumed = stubs.training.ResumeRun(training_pb2.ResumeRunRequest(run_id=run.run_id), timeout=TIMEOUT)
    first = next(iter(resumed)).event
    assert first.started.resumed_from_step >= 1
    stubs.training.CancelRun(training_pb2.CancelRunRequest(run_id=run.run_id), timeout=TIMEOUT)
    stubs.close()
