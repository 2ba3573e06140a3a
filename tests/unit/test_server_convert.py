"""Between wire messages and engine types: defaults, bounds on every number, and what is not known stays unset."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgumentError
from engine.info import AdapterInfo, AdapterSource, ModelInfo
from engine.jobs import EmbedFinished, JobFailed, LoRAParams, TrainParams, WeightedAdapter
from engine.request import SamplingParams, Timings, TokenLogprob
from server import convert, convert_training
from server.config import ServerConfig
from server.runs import EventRecord, RunRecord
from whet.v1 import common_pb2, generation_pb2, model_pb2, training_pb2

INFO = ModelInfo(
    name="m", path="/m", model_type="llama", task="generate", dtype="float32", quantization="none", num_parameters=1,
    weights_bytes=4, vocab_size=300, hidden_size=2, num_layers=2, max_model_len=2048, num_blocks=3, block_size=16,
    kv_cache_bytes=9, linear_modules=["k_proj", "q_proj"], weights_digest="d", tokenizer_path="",
    embedding_dimensions=2, device="cpu",
)  # fmt: skip
CONFIG = ServerConfig()


def train_config(**params: object) -> training_pb2.TrainConfig:
    values = {"max_steps": 3, **params}
    return training_pb2.TrainConfig(model="m", adapter="a", params=training_pb2.TrainParams(**values))  # type: ignore[arg-type]


def test_no_sampling_field_means_the_engines_defaults() -> None:
    assert convert.from_sampling(generation_pb2.SamplingParams(), 300) == SamplingParams()


def test_zero_is_not_unset() -> None:
    message = generation_pb2.SamplingParams(temperature=0.0, logprobs=0, seed=0, prompt_logprobs=0)
    params = convert.from_sampling(message, 300)
    assert (params.temperature, params.logprobs, params.seed, params.prompt_logprobs) == (0.0, 0, 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", -1), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1),
        ("min_p", 1.1), ("repetition_penalty", 0.0), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("seed", -1), ("logprobs", -1), ("logprobs", 65), ("prompt_logprobs", 1 << 30), ("stop_token_ids", [300]),
        ("stop_token_ids", [-1]), ("logit_bias", {300: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
    ],
)  # fmt: skip
def test_sampling_values_out_of_range_are_refused_by_path(field: str, value: object) -> None:
    message = generation_pb2.SamplingParams(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError) as caught:
        convert.from_sampling(message, 300)
    assert caught.value.field == f"sampling.{field}"


def test_a_huge_logit_bias_is_refused_before_it_is_copied() -> None:
    class Many(dict[int, float]):
        def __len__(self) -> int:
            return 1 << 20

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("copied")

    class Message:
        logit_bias = Many()
        stop_token_ids = ()
        ignore_eos = False

        def HasField(self, name: str) -> bool:
            return False

    with pytest.raises(InvalidArgumentError, match="1048576 entries; accepted: at most 1024") as caught:
        convert.from_sampling(Message(), 300)  # type: ignore[arg-type]
    assert caught.value.field == "sampling.logit_bias"


def test_log_probabilities_of_a_prompt_are_a_message_of_their_own() -> None:
    entry = TokenLogprob(token_id=7, logprob=-0.5, rank=2, top=[(9, -0.25), (7, -0.5)])
    response = convert.to_prompt_logprobs([None, entry], [3, 7])
    assert response.started.prompt_logprobs == convert.to_token_logprobs([None, entry], [3, 7])
    first, second = response.started.prompt_logprobs
    assert (first.token_id, first.HasField("logprob"), len(first.top)) == (3, False, 0)
    assert (second.token_id, second.logprob, second.rank) == (7, -0.5, 2)
    assert [(top.token_id, top.logprob) for top in second.top] == [(9, -0.25), (7, -0.5)]


def test_no_training_field_means_the_engines_defaults() -> None:
    request = convert_training.from_train_config(train_config(), INFO, CONFIG)
    assert request.params == TrainParams(max_steps=3)
    assert request.lora == LoRAParams()
    assert (request.loss_on, request.eval_fraction, request.cancel_on_disconnect) == ("completion", 0.0, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0), ("learning_rate", math.nan), ("learning_rate", -1.0), ("learning_rate", math.inf),
        ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("eps", 0.0), ("momentum", 1.0), ("weight_decay", -1.0),
        ("warmup_steps", -1), ("max_grad_norm", -1.0), ("max_grad_norm", math.nan), ("batch_size", 0),
        ("batch_size", 1 << 30), ("gradient_accumulation_steps", 0), ("gradient_accumulation_steps", 5),
        ("max_steps", 0), ("max_steps", -1), ("epochs", 0.0), ("epochs", math.nan),
        ("max_seq_len", 1), ("max_seq_len", 1 << 30),
        ("seed", -1), ("eval_every", -1), ("early_stopping_patience", -1), ("checkpoint_every", -1),
        ("publish_every", -1), ("forward_tolerance", 0.0), ("optimizer", 99), ("schedule", 99), ("compute_dtype", 99),
        ("loss_on", 99), ("publish", 99),
    ],
)  # fmt: skip
def test_training_values_out_of_range_are_refused_by_path(field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        convert_training.from_train_config(train_config(**{field: value}), INFO, CONFIG)
    assert caught.value.field == f"params.{field}"


def test_activation_checkpointing_is_taken_and_archived() -> None:
    message = train_config(activation_checkpointing=True)
    request = convert_training.from_train_config(message, INFO, CONFIG)
    assert request.params == TrainParams(max_steps=3, activation_checkpointing=True)
    assert json.loads(convert_training.to_resolved_config(request, message))["params"]["activation_checkpointing"]


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 0}, {"rank": 513}, {"alpha": 0.0}, {"alpha": math.nan}, {"dropout": 1.0}, {"dropout": -0.1},
        {"target_modules": ["../q_proj"]}, {"target_modules": ["q_proj", "q_proj"]}, {"layers": [2]}, {"layers": [-1]},
        {"layers": [1, 1]},
    ],
)  # fmt: skip
def test_adapter_shapes_out_of_range_are_refused(lora: dict[str, object]) -> None:
    message = train_config()
    message.lora.CopyFrom(training_pb2.LoRAConfig(**lora))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError) as caught:
        convert_training.from_train_config(message, INFO, CONFIG)
    assert caught.value.field == f"lora.{next(iter(lora))}"


def test_a_run_needs_an_end() -> None:
    message = training_pb2.TrainConfig(model="m", adapter="a")
    with pytest.raises(InvalidArgumentError, match="neither max_steps nor epochs"):
        convert_training.from_train_config(message, INFO, CONFIG)


def test_a_continued_adapter_keeps_its_shape() -> None:
    message = train_config()
    message.init_adapter.name = "b"
    message.lora.rank = 4
    with pytest.raises(InvalidArgumentError, match="init_adapter"):
        convert_training.from_train_config(message, INFO, CONFIG)


def test_the_archived_configuration_has_every_default_written_out() -> None:
    message = train_config(epochs=1.5)
    request = convert_training.from_train_config(message, INFO, CONFIG)
    text = convert_training.to_resolved_config(request, message)
    params = json.loads(text)["params"]
    missing = {field.name for field in training_pb2.TrainParams.DESCRIPTOR.fields} - set(params)
    assert missing == set()
    assert params["optimizer"] == "OPTIMIZER_ADAMW"
    assert json.loads(text)["lora"]["rank"] == 8


@pytest.mark.parametrize("name", ["", "../a", "/a", "a/b", "a\x00", "а", "a..b", "x" * 129])
def test_names_carry_no_paths(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        convert.from_adapter(common_pb2.AdapterSelector(name=name, version=1))


def test_the_base_model_is_an_unset_selector() -> None:
    assert convert.from_adapter(common_pb2.AdapterSelector()) == (None, None)
    assert convert.from_adapter(common_pb2.AdapterSelector(name="a")) == ("a", None)
    assert convert.from_adapter(common_pb2.AdapterSelector(name="a", version=0)) == ("a", 0)


def test_unknown_readings_stay_unset() -> None:
    timings = convert.to_timings(Timings(), 1)
    assert not timings.HasField("time_to_first_token")
    assert not timings.HasField("tokens_per_second")
    assert convert.to_duration(math.nan) is None
    model = convert.to_model("m", "unloaded", "", None, None)
    assert [field.name for field, _ in model.ListFields()] == ["name", "state"]
    assert model.state == model_pb2.MODEL_STATE_UNLOADED


def test_rates_count_the_gaps_between_tokens() -> None:
    assert convert.to_timings(Timings(decode_seconds=2.0), 5).tokens_per_second == 2.0


def test_the_first_prompt_token_has_no_logprob() -> None:
    entries = [None, TokenLogprob(token_id=7, logprob=-0.5, rank=2, top=[(6, -0.1)])]
    first, second = convert.to_token_logprobs(entries, [5, 7])
    assert (first.token_id, first.HasField("logprob"), first.HasField("rank")) == (5, False, False)
    assert (second.token_id, second.logprob, second.rank, second.top[0].token_id) == (7, -0.5, 2, 6)


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3), min_size=1, max_size=4))
def test_vectors_keep_every_bit(rows: list[list[float]]) -> None:
    import struct

    vectors = b"".join(struct.pack("<3f", *row) for row in rows)
    event = EmbedFinished(job_id="j", vectors=vectors, dimensions=3, num_tokens=1)
    response = convert.to_embeddings(event, request_id="r", seconds=0.0)
    assert [list(embedding.values) for embedding in response.embeddings] == rows


@given(st.floats(0, 1e9))
def test_durations_round_to_nanoseconds(seconds: float) -> None:
    duration = convert.to_duration(seconds)
    assert duration is not None
    assert duration.ToNanoseconds() == round(seconds * 1e9)


def run_record(**changes: object) -> RunRecord:
    values = {
        "number": 1, "run_id": "r", "request_id": None, "kind": "train", "model": "m", "adapter": "a",
        "state": "failed", "config": "{}", "dataset": "{}", "spec": "{}", "created": 1.5, "started": None,
        "ended": None, "step": 4, "total_steps": None, "loss": None,
        "base_nll": 2.0, "final_nll": None, "best_nll": None, "best_step": None,
        "version": None, "error_code": "not_found", "error_reason": "WHY", "error_message": "m",
    }  # fmt: skip
    return RunRecord(**(values | changes))  # type: ignore[arg-type]


def test_a_record_of_a_run() -> None:
    run = convert_training.to_run(run_record())
    assert (run.state, run.step, run.base_nll) == (training_pb2.RUN_STATE_FAILED, 4, 2.0)
    assert (run.error.code, run.error.reason) == (5, "WHY")
    assert not run.HasField("loss")
    assert not run.HasField("start_time")


def test_a_cancelled_run_is_finished_not_failed() -> None:
    failed = JobFailed(job_id="r", error_code="cancelled", error_message="m", error_reason="CANCELLED")
    event = convert_training.to_event(EventRecord(run_id="r", sequence=3, created=1.0, event=failed), run_record())
    assert event.finished.stop_reason == training_pb2.STOP_REASON_CANCELLED
    assert (event.finished.step, event.finished.base_nll, event.sequence) == (4, 2.0, 3)


def test_an_empty_example_is_refused_by_its_index() -> None:
    with pytest.raises(InvalidArgumentError, match=r"examples\[3\]"):
        convert_training.from_example(training_pb2.TrainExample(), "examples[3]")


def test_the_origin_of_an_adapter_is_told_whole() -> None:
    """A version 0 is told; what is not known stays unset."""
    info = AdapterInfo(
        model="m", name="a", version=2, live=True, loaded=True, rank=8, alpha=16.0, use_rslora=False,
        target_modules=["q_proj"], num_parameters=1, path="/p", parent=("b", 0), data_digest="d", combination="cat",
        sources=[AdapterSource(name="c", version=3, weight=-0.5)], forced=True,
    )  # fmt: skip
    message = convert.to_adapter(info)
    assert (message.parent.name, message.parent.HasField("version"), message.parent.version) == ("b", True, 0)
    assert [(s.adapter.name, s.adapter.version, s.weight) for s in message.sources] == [("c", 3, -0.5)]
    assert (message.data_digest, message.combination_method, message.forced) == ("d", 1, True)
    plain = convert.to_adapter(dataclasses.replace(info, parent=None, sources=[], combination="", data_digest=""))
    assert not plain.HasField("parent")
    assert (len(plain.sources), plain.combination_method, plain.data_digest) == (0, 0, "")


def test_adapters_with_weights() -> None:
    """A weight that is not given is 1, 0 is a weight; versions and numbers are checked where they stand."""
    message = model_pb2.MergeAdapterRequest()
    message.adapters.add(adapter=model_pb2.AdapterVersion(name="a"))
    message.adapters.add(adapter=model_pb2.AdapterVersion(name="b", version=0), weight=0.0)
    assert convert.from_weighted_adapters(message.adapters, "adapters") == [
        WeightedAdapter(name="a"), WeightedAdapter(name="b", version=0, weight=0.0),
    ]  # fmt: skip
    for field, adapter in (
        ("adapters[2].weight", model_pb2.WeightedAdapter(adapter=message.adapters[0].adapter, weight=math.inf)),
        ("adapters[2].weight", model_pb2.WeightedAdapter(adapter=message.adapters[0].adapter, weight=math.nan)),
        ("adapters[2].adapter.name", model_pb2.WeightedAdapter(weight=1.0)),
        ("adapters[2].adapter.version", model_pb2.WeightedAdapter(adapter={"name": "a", "version": -1})),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            convert.from_weighted_adapters([*message.adapters, adapter], "adapters")
        assert caught.value.field == field
    for count in (0, 65):
        with pytest.raises(InvalidArgumentError, match="1 to 64"):
            convert.from_weighted_adapters([message.adapters[0]] * count, "adapters")
