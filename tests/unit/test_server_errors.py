"""The table of statuses, and the details that errors carry."""

from __future__ import annotations

import inspect

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

import engine.errors
from engine.errors import EngineError, InternalError, InvalidArgumentError, NotFoundError, OverloadedError
from server.errors import MAX_MESSAGE_BYTES, STATUS_BY_CODE, error_from_code, to_grpc_status, to_rpc_status


def details(status: Status) -> dict[str, Message]:
    found: dict[str, Message] = {}
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        message = kind()
        assert packed.Unpack(message)
        found[kind.__name__] = message
    return found


def test_every_engine_error_has_a_status() -> None:
    classes = [kind for _, kind in inspect.getmembers(engine.errors, inspect.isclass) if issubclass(kind, EngineError)]
    assert len(classes) > 10
    for kind in classes:
        assert kind.code in STATUS_BY_CODE, kind
    internal = {kind for kind in classes if STATUS_BY_CODE[kind.code] is grpc.StatusCode.INTERNAL}
    assert internal == {EngineError, InternalError}


def test_an_invalid_argument_names_its_field() -> None:
    error = InvalidArgumentError("n is 0; accepted: 1 to 64", field="sampling.n")
    found = details(to_rpc_status(error, "id-1"))
    violation = found["BadRequest"].field_violations[0]  # type: ignore[attr-defined]
    assert violation.field == "sampling.n"
    assert "accepted" in violation.description
    info = found["ErrorInfo"]
    assert (info.domain, info.reason, info.metadata["request_id"]) == ("whet", "INVALID_ARGUMENT", "id-1")  # type: ignore[attr-defined]


def test_overload_says_when_to_retry() -> None:
    found = details(to_rpc_status(OverloadedError("full", retry_after_seconds=1.5), "x"))
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 1.5  # type: ignore[attr-defined]


def test_only_overload_carries_retry_info() -> None:
    assert "RetryInfo" not in details(to_rpc_status(NotFoundError("gone"), "x"))


def test_the_request_id_is_in_the_trailing_metadata() -> None:
    status = to_grpc_status(NotFoundError("gone"), "x")
    assert ("x-request-id", "x") in tuple(status.trailing_metadata)
    assert status.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("filler", ["a", "語", "\U0001f600", "\ud800"])
def test_a_long_message_is_cut_at_a_character(filler: str) -> None:
    status = to_rpc_status(InvalidArgumentError(filler * 100_000, field="f"), "x")
    assert len(status.message.encode()) <= MAX_MESSAGE_BYTES
    assert len(status.SerializeToString()) < 4096


@pytest.mark.parametrize("code", ["not_found", "invalid_argument", "resource_exhausted", "unavailable"])
def test_codes_from_a_worker_become_their_errors(code: str) -> None:
    error = error_from_code(code, "m", "SOME_REASON", "f")
    assert (error.code, error.reason, error.field, error.message) == (code, "SOME_REASON", "f", "m")


def test_an_unknown_code_is_a_fault_of_ours() -> None:
    assert isinstance(error_from_code("nonsense", "m"), InternalError)
