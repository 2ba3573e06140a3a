"""Every message survives its way between the processes, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError, InternalError, InvalidArgumentError, NotFoundError, OutOfMemoryError
from engine.info import ModelInfo
from engine.jobs import JobEvent, JobSpec, PerplexityFinished, PerplexitySpec
from server.workers.messages import (
    AnyCommand,
    AnyReport,
    Command,
    Failure,
    LoadModel,
    Reply,
    Report,
    Tagged,
    decode_command,
    decode_report,
    encode,
    reply,
)

INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TEXT = st.text(max_size=20)
JSON = st.recursive(st.none() | st.booleans() | INTEGERS | FLOATS | TEXT, lambda inner: st.lists(inner, max_size=3))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that occurs in a message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return JSON
    if hint is Tagged:
        return st.one_of([values(kind) for kind in get_args(JobSpec | JobEvent)]).map(Tagged.of)
    if hint is msgspec.Raw:
        return JSON.map(lambda value: msgspec.Raw(msgspec.msgpack.encode(value)))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if hint is bytes:
        return st.binary(max_size=20)
    if dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, msgspec.Struct)):
        return st.builds(hint, **{name: values(kind) for name, kind in get_type_hints(hint).items()})
    return {int: INTEGERS, float: FLOATS, bool: st.booleans(), str: TEXT, type(None): st.none()}[hint]


def same(left: Any, right: Any) -> bool:
    """Equality to which NaN equals NaN, and 1 does not equal 1.0."""
    if isinstance(left, msgspec.Raw):
        return bytes(left) == bytes(right)
    if isinstance(left, msgspec.Struct) or dataclasses.is_dataclass(left):
        names = get_type_hints(type(left))
        return type(left) is type(right) and all(same(getattr(left, n), getattr(right, n)) for n in names)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float) and math.isnan(left):
        return isinstance(right, float) and math.isnan(right)
    return type(left) is type(right) and bool(left == right)


thorough = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", get_args(AnyCommand), ids=lambda kind: kind.__name__)
@thorough
@given(data=st.data())
def test_every_command_round_trips(kind: type[Command], data: st.DataObject) -> None:
    command = data.draw(values(kind))
    assert same(decode_command(encode(command)), command)


@pytest.mark.parametrize("kind", get_args(AnyReport), ids=lambda kind: kind.__name__)
@thorough
@given(data=st.data())
def test_every_report_round_trips(kind: type[Report], data: st.DataObject) -> None:
    report = data.draw(values(kind))
    assert same(decode_report(encode(report)), report)


@pytest.mark.parametrize("kind", get_args(JobSpec), ids=lambda kind: kind.__name__)
@thorough
@given(data=st.data())
def test_every_spec_comes_out_as_its_own_type(kind: type, data: st.DataObject) -> None:
    spec = data.draw(values(kind))
    assert same(Tagged.of(spec).spec(), spec)


@pytest.mark.parametrize("kind", get_args(JobEvent), ids=lambda kind: kind.__name__)
@thorough
@given(data=st.data())
def test_every_event_comes_out_as_its_own_type(kind: type, data: st.DataObject) -> None:
    event = data.draw(values(kind))
    assert same(Tagged.of(event).event(), event)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_raise_a_decode_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_command, decode_report):
        try:
            message = decode(data)
        except msgspec.DecodeError:
            continue
        assert isinstance(message, (Command, Report))


def test_a_spec_is_no_event() -> None:
    spec = Tagged.of(PerplexitySpec(job_id="j", model="m", token_ids=[1, 2]))
    with pytest.raises(msgspec.ValidationError, match="PerplexitySpec"):
        spec.event()


def test_a_command_is_no_report() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_report(encode(LoadModel(call_id=1, name="m", path="/p")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_readings_that_are_not_finite_survive(value: float) -> None:
    event = PerplexityFinished(
        job_id="j", nll=value, perplexity=value, standard_error=value, num_tokens=1, num_windows=1, seconds=0.0
    )
    assert same(Tagged.of(event).event(), event)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidArgumentError("top_k is -1", field="sampling.top_k", reason="BAD"), InvalidArgumentError),
        (NotFoundError("no model x", field="model", reason="MODEL_NOT_FOUND"), NotFoundError),
        (OutOfMemoryError("full", retry_after_seconds=1.5), EngineError),
        (InternalError("ours"), InternalError),
    ],
)
def test_an_error_arrives_with_code_field_reason_and_retry(error: EngineError, kind: type[EngineError]) -> None:
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(Failure.of(error)), type=Failure).to_error()
    assert isinstance(arrived, kind)
    for name in ("code", "message", "field", "reason", "retry_after_seconds"):
        assert getattr(arrived, name) == getattr(error, name)


def test_an_unknown_code_is_a_fault_of_ours() -> None:
    assert isinstance(Failure(code="quantum", message="?").to_error(), InternalError)


def test_a_reply_is_read_as_the_promised_type_alone() -> None:
    answer = decode_report(encode(reply(7, "a path")))
    assert isinstance(answer, Reply)
    assert answer.value(str) == "a path"
    with pytest.raises(msgspec.ValidationError):
        answer.value(ModelInfo)


def test_a_failed_reply_raises_the_workers_error() -> None:
    answer = Reply(call_id=1, failure=Failure.of(NotFoundError("no adapter", field="adapter")))
    with pytest.raises(NotFoundError, match="no adapter"):
        answer.value(str)
