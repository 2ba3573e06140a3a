"""What the client makes of its arguments and of responses."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import whet
from whet import _embedding, _evaluation, _examples, _generation, _merging, _models, _quantization, _training
from whet.options import AdaptOptions, GenerateOptions, QuantizeOptions, TrainOptions
from whet.v1 import generation_pb2, model_pb2, quantization_pb2, training_pb2

INT32 = st.integers(-(2**31), 2**31 - 1)
NUMBER = st.floats(allow_nan=False)

# ---------------------------------------------------------------------------------------------------------- requests


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("max_tokens", "min_tokens", "top_k"), INT32),
            **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"), NUMBER),
            "frequency_penalty": NUMBER,
            "seed": st.integers(-(2**63), 2**63 - 1),
        },
    )
)
def test_sampling_options_arrive_exactly_and_unset_ones_stay_unset(options: dict[str, Any]) -> None:
    request = _generation.generate_request("x", "m", GenerateOptions(**options))  # type: ignore[typeddict-item]
    sent = generation_pb2.GenerateRequest.FromString(request.SerializeToString()).sampling
    present = {field.name: value for field, value in sent.ListFields()}
    assert present == options


def test_zero_is_sent_and_none_is_not() -> None:
    request = _generation.generate_request("x", "m", {"temperature": 0.0, "top_k": 0, "max_tokens": None, "n": None})
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("top_k")
    assert not request.sampling.HasField("max_tokens")
    assert not request.HasField("n")


def test_nan_is_the_servers_to_refuse() -> None:
    request = _generation.generate_request("x", "m", {"temperature": math.nan})
    assert math.isnan(request.sampling.temperature)


def test_prompts_of_every_kind() -> None:
    assert _generation.to_prompt("text").text == "text"
    assert _generation.to_prompt("").WhichOneof("input") == "text"
    assert list(_generation.to_prompt([1, -2]).token_ids.ids) == [1, -2]
    assert _generation.to_prompt([]).WhichOneof("input") == "token_ids"
    chat = _generation.to_prompt([{"role": "user", "content": "hi"}]).chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [("user", "hi")]
    assert not _generation.to_prompt("x").HasField("add_special_tokens")
    assert _generation.to_prompt("x", False).HasField("add_special_tokens")


@pytest.mark.parametrize("prompt", [[{"role": "user"}], [{"role": "user", "content": 3}], ["a"], [1.5], 7, [2**40]])
def test_prompts_of_no_kind_are_named(prompt: Any) -> None:
    with pytest.raises(whet.InvalidArgumentError, match="prompt"):
        _generation.to_prompt(prompt)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"adapter_version": 3}, "adapter_version"),
        ({"stop": [3]}, "stop"),
    ],
)
def test_values_that_do_not_fit_are_named(options: Any, field: str) -> None:
    with pytest.raises(whet.InvalidArgumentError, match=field) as raised:
        _generation.generate_request("x", "m", options)
    assert [violation.field for violation in raised.value.field_violations] == [field]


def test_unknown_options_are_type_errors_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"max_token.*temperature"):
        _generation.generate_request("x", "m", {"max_token": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError, match="learning_rates"):
        _training.train_requests([], None, "m", "a", {"learning_rates": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError):
        _training.adapt_request([], "m", "a", {"batch_size": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError):
        _quantization.quantize_request("m", "q4", "o", {"bits": 3})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(("asked", "sent"), [(True, 0), (0, 0), (5, 5), (False, None), (None, None)])
def test_logprobs_may_be_asked_for_with_or_without_alternatives(asked: Any, sent: int | None) -> None:
    sampling = _generation.generate_request("x", "m", {"logprobs": asked, "prompt_logprobs": asked}).sampling
    for name in ("logprobs", "prompt_logprobs"):
        assert (getattr(sampling, name) if sampling.HasField(name) else None) == sent


def test_a_stop_string_is_one_not_its_characters() -> None:
    assert list(_generation.generate_request("x", "m", {"stop": "END"}).stop) == ["END"]
    assert list(_generation.generate_request("x", "m", {"stop": ["a", "b"]}).stop) == ["a", "b"]


def test_quantize_and_perplexity_take_text_or_ids() -> None:
    options: QuantizeOptions = {"eval_text": [1, 2], "group_size": 64, "load": False, "dry_run": True}
    request = _quantization.quantize_request("m", "q4", "o", options)
    assert list(request.eval_token_ids.ids) == [1, 2]
    assert (request.scheme, request.group_size) == (quantization_pb2.QUANTIZE_SCHEME_Q4, 64)
    assert request.HasField("load")
    assert not request.HasField("symmetric")
    with pytest.raises(whet.InvalidArgumentError, match=r"scheme is 'q5'; accepted: q8, q4"):
        _quantization.quantize_request("m", "q5", "o", {})
    measured = _evaluation.perplexity_request(
        [1, 2], model="m", adapter="a", adapter_version=0, window=None, stride=0, max_tokens=None, request_id="r"
    )
    assert list(measured.token_ids.ids) == [1, 2]
    assert measured.adapter.HasField("version")
    assert measured.HasField("stride")
    assert not measured.HasField("window")


def test_embed_inputs_keep_their_order_and_an_empty_batch_reaches_the_server() -> None:
    def requests(inputs: Any) -> list[Any]:
        return _embedding.embed_requests(
            inputs,
            model="m",
            normalize=None,
            dimensions=None,
            pooling="last",
            input_type=None,
            instruction="find",
            adapter=None,
            adapter_version=None,
            request_id=None,
        )

    assert [item.text for item in requests(["a", "b"])[0].inputs] == ["a", "b"]
    assert [list(item.token_ids.ids) for item in requests([[1], [2, 3]])[0].inputs] == [[1], [2, 3]]
    assert len(requests("abc")[0].inputs) == 1
    assert requests("abc")[0].instruction == "find"
    assert [len(request.inputs) for request in requests([])] == [0]


# ---------------------------------------------------------------------------------------------------------- training

TRAIN: TrainOptions = {
    "rank": 4,
    "alpha": 0.5,
    "dropout": 0.0,
    "use_rslora": True,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.down_proj"],
    "layers": [0, 3],
    "learning_rate": 3e-4,
    "optimizer": "sgd",
    "betas": (0.8, 0.99),
    "eps": 1e-6,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_steps": 2,
    "max_grad_norm": 0.0,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "epochs": 1.5,
    "max_seq_len": 64,
    "packing": False,
    "shuffle": False,
    "seed": 0,
    "compute_dtype": "bfloat16",
    "loss_on": "all",
    "eval_fraction": 0.25,
    "eval_every": 3,
    "early_stopping_patience": 2,
    "checkpoint_every": 4,
    "publish_every": 5,
    "publish": "last",
    "forward_tolerance": 1e-2,
    "activation_checkpointing": True,
    "on_disconnect": "cancel",
    "request_id": "mine",
}


def test_every_train_option_arrives_and_comes_back_in_the_runs_record() -> None:
    config = _training.train_requests([], None, "m", "a", TRAIN)[0].config
    record = _training.from_run(training_pb2.Run(run_id="r", config=config))
    assert record.config == {**TRAIN, "model": "m", "adapter": "a"}
    # Nothing that can be asked for is missing above.
    assert set(TRAIN) == set(TrainOptions.__annotations__) - {"timeout", "init_adapter", "init_adapter_version"}


def test_without_options_everything_is_left_to_the_server() -> None:
    config = _training.train_requests([], None, "m", "a", {"init_adapter": "b", "init_adapter_version": 2})[0].config
    assert not config.HasField("lora")
    assert config.params == training_pb2.TrainParams()
    assert (config.init_adapter.name, config.init_adapter.version) == ("b", 2)
    assert config.request_id


def test_wrong_words_name_the_right_ones() -> None:
    with pytest.raises(whet.InvalidArgumentError, match=r"optimizer is 'adam'; accepted: adamw, sgd"):
        _training.train_requests([], None, "m", "a", {"optimizer": "adam"})
    with pytest.raises(whet.InvalidArgumentError, match="betas"):
        _training.train_requests([], None, "m", "a", {"betas": (0.9,)})  # type: ignore[typeddict-item]


EXAMPLE = st.one_of(
    st.fixed_dictionaries({"prompt": st.text(), "completion": st.text()}),
    st.fixed_dictionaries({"text": st.text()}),
    st.fixed_dictionaries({"instruction": st.text(), "input": st.text(), "output": st.text()}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=3)}
    ),
)


def _back(example: training_pb2.TrainExample) -> dict[str, Any]:
    match example.WhichOneof("example"):
        case "prompt_completion":
            pair = example.prompt_completion
            return {"prompt": pair.prompt, "completion": pair.completion}
        case "text":
            return {"text": example.text}
        case "instruction":
            record = example.instruction
            return {"instruction": record.instruction, "input": record.input, "output": record.output}
        case _:
            return {"messages": [{"role": turn.role, "content": turn.content} for turn in example.chat.messages]}


@given(st.lists(EXAMPLE, max_size=5))
def test_examples_arrive_as_they_are(examples: list[dict[str, Any]]) -> None:
    requests = _training.train_requests(examples, examples, "m", "a", {})
    for split in (training_pb2.SPLIT_TRAIN, training_pb2.SPLIT_EVAL):
        batches = [request.examples for request in requests[1:] if request.examples.split == split]
        assert [_back(example) for batch in batches for example in batch.examples] == examples


def test_examples_travel_in_messages_of_bounded_size() -> None:
    requests = _training.train_requests([{"text": "x" * 50_000}] * 40, None, "m", "a", {})
    assert sum(len(request.examples.examples) for request in requests) == 40
    assert max(request.ByteSize() for request in requests) < 512 << 10


def test_examples_come_from_files(tmp_path: Path) -> None:
    records = [{"text": "a\u2028b"}, {"prompt": "p", "completion": "c"}]
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", encoding="utf-8")
    whole = tmp_path / "data.json"
    whole.write_text(json.dumps(records))
    for path in (lines, whole, str(lines)):
        assert [_back(example) for example in _examples.to_examples(path)] == records
    lines.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(whet.InvalidArgumentError, match=r"data\.jsonl:2 is not JSON"):
        _examples.to_examples(lines)
    whole.write_text('{"text": "a"}')
    with pytest.raises(whet.InvalidArgumentError, match="list"):
        _examples.to_examples(whole)
    with pytest.raises(whet.InvalidArgumentError, match=r"\.jsonl"):
        _examples.to_examples(tmp_path / "data.csv")
    with pytest.raises(FileNotFoundError):
        _examples.to_examples(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "record", [{"prompt": "a"}, {"text": None}, "a", {}, {"messages": "a"}, {"messages": [{"role": "user"}]}]
)
def test_records_of_no_kind_are_named_by_their_index(record: Any) -> None:
    with pytest.raises(whet.InvalidArgumentError, match=r"examples\[1\]"):
        _examples.to_examples([{"text": "fine"}, record])


def test_an_alpaca_record_with_its_rendered_text_is_an_instruction() -> None:
    record = {"instruction": "i", "input": "", "output": "o", "text": "rendered"}
    assert _examples.to_example(record, "x").WhichOneof("example") == "instruction"
    assert _examples.to_example({"instruction": "i", "output": "o"}, "x").instruction.input == ""


def test_adapt_sends_a_shape_only_if_one_is_given() -> None:
    bare: AdaptOptions = {"steps": 2}
    request = _training.adapt_request([{"text": "a"}], "m", "a", bare)
    assert not request.HasField("lora")
    assert request.steps == 2
    assert _training.adapt_request([], "m", "a", {"rank": 2}).lora.rank == 2


ADAPT: AdaptOptions = {
    "rank": 4,
    "alpha": 0.5,
    "dropout": 0.0,
    "use_rslora": True,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.down_proj"],
    "layers": [0, 3],
    "steps": 2,
    "learning_rate": 3e-4,
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "max_seq_len": 64,
    "loss_on": "all",
    "seed": 0,
    "probe_prompts": ["text", [1, 2], [{"role": "user", "content": "hi"}]],
    "max_kl": 0.1,
    "request_id": "mine",
}


def test_every_adapt_option_arrives() -> None:
    request = _training.adapt_request([{"text": "a"}], "m", "a", ADAPT)
    # Nothing that can be asked for is missing above, and nothing of the message is left unset.
    assert set(ADAPT) == set(AdaptOptions.__annotations__) - {"timeout"}
    assert {field.name for field, _ in request.ListFields()} == {field.name for field in request.DESCRIPTOR.fields}
    assert (request.optimizer, request.momentum, request.max_kl) == (training_pb2.OPTIMIZER_SGD, 0.9, 0.1)
    kinds = [prompt.WhichOneof("input") for prompt in request.probe_prompts]
    assert kinds == ["text", "token_ids", "chat"]


@pytest.mark.parametrize("probes", ["one text", [1, 2, 3]])
def test_a_single_prompt_is_no_list_of_probes(probes: Any) -> None:
    with pytest.raises(whet.InvalidArgumentError, match="probe_prompts"):
        _training.adapt_request([], "m", "a", {"probe_prompts": probes})


def test_an_adaptation_says_what_was_published() -> None:
    response = training_pb2.AdaptResponse(
        version=3, steps=2, kl=0.0, stop_reason=training_pb2.STOP_REASON_MAX_KL, loss_before=2.0, loss_after=1.0
    )
    done = _training.from_adaptation(response)
    assert (done.version, done.steps, done.kl, done.stop_reason) == (3, 2, 0.0, "max_kl")
    nothing = _training.from_adaptation(training_pb2.AdaptResponse())
    assert (nothing.version, nothing.kl) == (None, None)


# --------------------------------------------------------------------------------------------------------- responses


def _started(**fields: Any) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(started=generation_pb2.GenerationStarted(request_id="r", **fields))


def _delta(index: int, text: str, *ids: int, logprob: float | None = None) -> generation_pb2.GenerateResponse:
    logprobs = [generation_pb2.TokenLogprob(token_id=i, logprob=logprob, rank=1) for i in ids] if logprob else []
    delta = generation_pb2.GenerationDelta(index=index, text=text, token_ids=ids, logprobs=logprobs)
    return generation_pb2.GenerateResponse(delta=delta)


def test_interleaved_completions_are_collected_by_their_index() -> None:
    request = _generation.generate_request("x", "m", {"n": 2, "logprobs": 0, "echo": True, "prompt_logprobs": True})
    reader = _generation.GenerationReader(request)
    prompt = [generation_pb2.TokenLogprob(token_id=5), generation_pb2.TokenLogprob(token_id=6, logprob=-1.5, rank=2)]
    chunks = reader.feed(_started(prompt_text="P", prompt_token_ids=[5, 6], prompt_logprobs=prompt, model="m"))
    assert [(chunk.index, chunk.text) for chunk in chunks] == [(0, "P"), (1, "P")]
    for response in (_delta(1, "b", 1, logprob=-1.0), _delta(0, "a", 2, logprob=-2.0), _delta(1, "c", 3, logprob=-3.0)):
        chunks += reader.feed(response)
    finished = generation_pb2.GenerationFinished(request_id="r", adapter_version=0)
    finished.completions.add(index=0, finish_reason=generation_pb2.FINISH_REASON_STOP, stop_token_id=2)
    finished.completions.add(index=1, finish_reason=generation_pb2.FINISH_REASON_LENGTH)
    finished.timings.total.FromMilliseconds(1500)
    finished.usage.prompt_tokens = 2
    assert reader.feed(generation_pb2.GenerateResponse(finished=finished)) == []
    reader.end()
    reply = reader.reply
    assert reply is not None
    assert [completion.text for completion in reply.completions] == ["Pa", "Pbc"]
    assert reply.text == "Pa"
    assert [completion.token_ids for completion in reply.completions] == [[2], [1, 3]]
    assert [completion.logprobs for completion in reply.completions] == [[-2.0], [-1.0, -3.0]]
    assert [completion.finish_reason for completion in reply.completions] == ["stop", "length"]
    assert [completion.stop_reason for completion in reply.completions] == [2, None]
    assert reply.prompt_logprobs == [None, -1.5]
    assert reply.prompt_token_ids == [5, 6]
    assert reply.adapter_version == 0
    assert reply.timings.total_seconds == 1.5
    assert reply.timings.queue_seconds is None
    for index in (0, 1):
        assert "".join(chunk.text for chunk in chunks if chunk.index == index) == reply.completions[index].text


@given(st.lists(st.tuples(st.integers(0, 2), st.text(), st.lists(st.integers(0, 99), max_size=3)), max_size=20))
def test_a_reply_is_the_concatenation_of_its_chunks(deltas: list[tuple[int, str, list[int]]]) -> None:
    reader = _generation.GenerationReader(_generation.generate_request("x", "m", {"n": 3}))
    reader.feed(_started())
    for index, text, ids in deltas:
        reader.feed(_delta(index, text, *ids))
    finished = generation_pb2.GenerationFinished()
    for index in range(3):
        finished.completions.add(index=index)
    reader.feed(generation_pb2.GenerateResponse(finished=finished))
    assert reader.reply is not None
    for completion in reader.reply.completions:
        mine = [delta for delta in deltas if delta[0] == completion.index]
        assert completion.text == "".join(text for _, text, _ in mine)
        assert completion.token_ids == [token for _, _, ids in mine for token in ids]
        assert completion.logprobs is None


def test_events_of_every_kind_have_their_type_and_their_unknowns_are_none() -> None:
    messages = [
        training_pb2.TrainEvent(started=training_pb2.RunStarted(target_modules=["q_proj"])),
        training_pb2.TrainEvent(step=training_pb2.RunStep(step=0, loss=2.5)),
        training_pb2.TrainEvent(evaluation=training_pb2.RunEvaluation(nll=1.5, is_best=True)),
        training_pb2.TrainEvent(checkpoint=training_pb2.RunCheckpoint(path="/x")),
        training_pb2.TrainEvent(published=training_pb2.RunPublished(version=3)),
        training_pb2.TrainEvent(warning=training_pb2.RunWarning(reason="R")),
        training_pb2.TrainEvent(finished=training_pb2.RunFinished(stop_reason=training_pb2.STOP_REASON_EPOCHS)),
    ]
    kinds = {
        field.name: field
        for field in training_pb2.TrainEvent.DESCRIPTOR.oneofs_by_name["event"].fields
        if field.name != "failed"
    }
    assert {message.WhichOneof("event") for message in messages} == set(kinds)
    events = [_training.from_event(message) for message in messages]
    assert [event.kind for event in events if event] == [
        "run_started", "step", "evaluation", "checkpoint", "published", "warning", "finished",
    ]  # fmt: skip
    step, finished = events[1], events[-1]
    assert isinstance(step, whet.Step)
    assert (step.loss, step.grad_norm, step.eta_seconds, step.peak_memory_bytes) == (2.5, None, None, None)
    assert isinstance(finished, whet.Finished)
    assert (finished.stop_reason, finished.base_nll, finished.version) == ("epochs", None, None)
    assert _training.from_event(training_pb2.TrainEvent()) is None


@given(st.integers(0, 4_000_000_000), st.integers(0, 999_999))
def test_times_come_in_utc(seconds: int, microseconds: int) -> None:
    message = training_pb2.TrainEvent(step=training_pb2.RunStep())
    message.create_time.seconds, message.create_time.nanos = seconds, microseconds * 1000
    event = _training.from_event(message)
    assert event is not None
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    assert event.created_at == epoch + datetime.timedelta(seconds=seconds, microseconds=microseconds)


def test_words_of_a_newer_server_are_passed_on_as_numbers() -> None:
    run = training_pb2.Run()
    run.state = 99  # type: ignore[assignment]
    assert _training.from_run(run).state == "99"
    error = training_pb2.RunError(code=99)
    assert _training.from_run(training_pb2.Run(error=error)).error == whet.RunError(code="99", reason="", message="")


def test_a_model_that_is_not_loaded_has_no_readings() -> None:
    unloaded = model_pb2.Model(name="m", state=model_pb2.MODEL_STATE_UNLOADED)
    info = _models.from_model(unloaded)
    assert (info.name, info.state, info.error) == ("m", "unloaded", "")
    assert {getattr(info, field) for field in info.__slots__ if field not in ("name", "state", "error")} == {None}
    loaded = _models.from_model(model_pb2.Model(name="m", num_parameters=1, task=model_pb2.TASK_EMBED))
    assert (loaded.task, loaded.num_blocks, loaded.has_chat_template) == ("embed", 0, None)


def test_every_field_of_a_resource_is_read() -> None:
    renamed = {"create_time": "created_at", "load_duration": "load_seconds"}
    for message, kind in ((model_pb2.Model, whet.ModelInfo), (model_pb2.Adapter, whet.AdapterInfo)):
        fields = {renamed.get(field.name, field.name) for field in message.DESCRIPTOR.fields}
        assert fields == set(kind.__dataclass_fields__)
    durations = {"duration": "seconds"}
    report = {durations.get(field.name, field.name) for field in quantization_pb2.QuantizeReport.DESCRIPTOR.fields}
    assert report == set(whet.QuantizeReport.__dataclass_fields__)
    merged = {durations.get(field.name, field.name) for field in model_pb2.MergeReport.DESCRIPTOR.fields}
    assert merged == set(whet.MergeReport.__dataclass_fields__)


def _adapter(name: str, version: int, *, live: bool = False, parent: str = "", sources: tuple[str, ...] = ()) -> Any:
    message = model_pb2.Adapter(name=name, version=version, live=live)
    if parent:
        message.parent.name, message.parent.version = parent.split(":")[0], int(parent.split(":")[1])
    for source in sources:
        added = message.sources.add(weight=0.5)
        added.adapter.name, added.adapter.version = source.split(":")[0], int(source.split(":")[1])
    return _models.from_adapter(message)


def test_the_origin_of_an_adapter() -> None:
    plain = _adapter("a", 1)
    assert (plain.parent, plain.sources, plain.combination_method, plain.forced) == (None, [], "", False)
    message = model_pb2.Adapter(name="c", combination_method=model_pb2.COMBINATION_METHOD_LINEAR, forced=True)
    message.parent.name, message.parent.version = "b", 0
    message.sources.add(adapter=model_pb2.AdapterVersion(name="a", version=3), weight=-0.25)
    info = _models.from_adapter(message)
    assert info.parent == whet.AdapterVersion(name="b", version=0)
    assert info.sources == [whet.WeightedAdapter(name="a", version=3, weight=-0.25)]
    assert (info.combination_method, info.forced) == ("linear", True)
    assert [str(info.parent), str(info.sources[0])] == ["b:0", "-0.25*a:3"]


def test_ancestors_come_before_what_came_from_them() -> None:
    """Parents and sources, each once; versions that are gone are passed over; a lineage that bites its tail ends."""
    adapters = [
        _adapter("a", 1),
        _adapter("a", 2, parent="a:1"),
        _adapter("a", 3, live=True, parent="a:2"),
        _adapter("b", 1, parent="gone:4"),
        _adapter("mix", 1, sources=("a:2", "b:1", "gone:1")),
        _adapter("mix", 2, live=True, parent="mix:1", sources=("a:1",)),
        _adapter("loop", 1, live=True, parent="loop:2"),
        _adapter("loop", 2, parent="loop:1"),
    ]

    def chain(name: str, version: int | None = None) -> list[str]:
        return [f"{a.name}:{a.version}" for a in _models.ancestors(name, version, adapters)]

    assert chain("a") == ["a:1", "a:2", "a:3"]
    assert chain("b", 1) == ["b:1"]
    assert chain("mix") == ["a:1", "a:2", "b:1", "mix:1", "mix:2"]
    assert chain("loop") == ["loop:2", "loop:1"]
    for name, version in (("b", None), ("a", 9), ("unknown", None)):
        with pytest.raises(whet.NotFoundError, match=name):
            chain(name, version)


def test_adapters_with_weights_are_given_in_three_ways() -> None:
    """Names to weights, versions with weights, or, to merge, a single name; anything else is refused by its place."""

    def sent(adapters: Any) -> list[tuple[str, int | None, float]]:
        request = _merging.merge_request(
            adapters, model="m", output="o", dtype=None, force=False, load=None, request_id="r"
        )
        assert (request.request_id, request.dtype, request.HasField("load")) == ("r", 0, False)
        given = [_models.from_weighted(adapter) for adapter in request.adapters]
        return [(adapter.name, adapter.version, adapter.weight) for adapter in given]

    assert sent("tone") == [("tone", None, 1.0)]
    assert sent({"tone": 0.5, "voice": -2}) == [("tone", None, 0.5), ("voice", None, -2.0)]
    weighted = [whet.WeightedAdapter(name="tone", version=0), whet.WeightedAdapter(name="tone", version=3, weight=0.0)]
    assert sent(weighted) == [("tone", 0, 1.0), ("tone", 3, 0.0)]
    for bad, field in ((["tone"], "adapters[0]"), ([*weighted, ("tone", 1.0)], "adapters[2]")):
        with pytest.raises(whet.InvalidArgumentError) as caught:
            sent(bad)
        assert caught.value.field_violations[0].field == field
    combined = _models.combine_adapters_request("new", {"a": 1.0}, "m", "linear", True)
    assert (combined.method, combined.force) == (model_pb2.COMBINATION_METHOD_LINEAR, True)
    with pytest.raises(whet.InvalidArgumentError, match="cat, linear"):
        _models.combine_adapters_request("new", {"a": 1.0}, "m", "ties", False)
    pruned = _models.prune_adapters_request(None, "m", 0, True)
    assert (pruned.name, pruned.HasField("keep_last"), pruned.keep_last, pruned.dry_run) == ("", True, 0, True)
