"""Small conversions that every part of the client uses."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from whet.errors import FieldViolation, InternalError, InvalidArgumentError
from whet.v1 import common_pb2


def new_request_id(given: str | None) -> str:
    """The caller's id, or a new one. It is made here, so that retries share it."""
    return given or uuid.uuid4().hex


def reject(field: str, value: object, accepted: str) -> NoReturn:
    """Raises InvalidArgumentError in the form in which the server says it."""
    raise invalid(field, f"{field} is {value!r}; accepted: {accepted}")


def invalid(field: str, message: str) -> InvalidArgumentError:
    """The error of an argument that no server needs to see."""
    reason = "INVALID_ARGUMENT"
    return InvalidArgumentError(message, reason=reason, field_violations=(FieldViolation(field, message, reason),))


def check_options(call: str, given: Mapping[str, object], known: type) -> None:
    """Raises TypeError for an option that ``call`` does not have, as Python does for keyword arguments."""
    names = known.__annotations__.keys()
    for name in given:
        if name not in names:
            raise TypeError(f"{call}() has no option {name!r}; it has {', '.join(sorted(names))}")


def fill(message: Message, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Sets the fields ``names`` of ``message`` for which ``values`` has something other than None.

    Raises:
        InvalidArgumentError: a value does not fit its field's type.
    """
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        field: Any
        try:
            field = getattr(message, name)
            if hasattr(field, "extend"):
                field.extend([value] if isinstance(value, str) else value)
            elif hasattr(field, "update"):
                field.update(value)
            else:
                setattr(message, name, value)
        except (TypeError, ValueError) as error:
            raise invalid(name, f"{name} is {value!r}: {error}") from error


def enum_value(enum: Any, prefix: str, word: str | None, field: str) -> Any:
    """The number of ``prefix`` + WORD; the unspecified 0 for None."""
    if word is None:
        return 0
    numbers = {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number != 0}
    if not isinstance(word, str) or word.lower() not in numbers:
        reject(field, word, ", ".join(numbers))
    return numbers[word.lower()]


def enum_word(enum: Any, prefix: str, number: int) -> str:
    """The inverse of ``enum_value``; "" for unspecified. A number that a newer server knows is given as it is."""
    if number == 0:
        return ""
    if number not in enum.values():
        return str(number)
    return str(enum.Name(number)).removeprefix(prefix).lower()


def seconds(message: Message, field: str) -> float | None:
    """A duration field in seconds; None if it is unset."""
    if not message.HasField(field):
        return None
    duration: Duration = getattr(message, field)
    return duration.seconds + duration.nanos / 1e9


def known_seconds(message: Message, field: str) -> float:
    """A duration field in seconds; 0 if it is unset."""
    return seconds(message, field) or 0.0


def moment(message: Message, field: str) -> datetime.datetime | None:
    """A timestamp field, in UTC; None if it is unset."""
    if not message.HasField(field):
        return None
    timestamp: Timestamp = getattr(message, field)
    return timestamp.ToDatetime(tzinfo=datetime.UTC)


def optional(message: Message, field: str) -> Any:
    """An ``optional`` field, or None if it is unset."""
    return getattr(message, field) if message.HasField(field) else None


def adapter_selector(adapter: str | None, version: int | None) -> common_pb2.AdapterSelector | None:
    """None: the base model.

    Raises:
        InvalidArgumentError: a version without an adapter.
    """
    if adapter is None:
        if version is not None:
            reject("adapter_version", version, "None without an adapter")
        return None
    selector = common_pb2.AdapterSelector(name=adapter)
    fill(selector, {"version": version}, ("version",))
    return selector


def incomplete(call: str, request_id: str) -> InternalError:
    """The error of a stream that ended without its terminal event."""
    return InternalError(f"{call} ended without its terminal event", reason="STREAM_INCOMPLETE", request_id=request_id)


def run_id_of(metadata: Any) -> str:
    """The run's id that the server sends ahead of the first event; "" if there is none."""
    return next((str(value) for key, value in metadata or () if key == "x-run-id"), "")
