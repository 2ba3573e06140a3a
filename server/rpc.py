"""The call that is being served: who it is in logs, metrics and metadata."""

from __future__ import annotations

import contextvars
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import grpc

from engine.errors import InvalidArgumentError

REQUEST_ID_KEY = "x-request-id"
RUN_ID_KEY = "x-run-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,126}[\x21-\x7e])?")

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Call:
    """One RPC in progress.

    Attributes:
        service, method: "whet.v1.GenerationService", "Generate".
        request_id: the caller's, or one that the server made. For people and logs; never a key into the engine.
        began: time.monotonic() of its arrival.
        notes: what the log line of the call says beside its outcome.
    """

    service: str
    method: str
    request_id: str
    began: float = field(default_factory=time.monotonic)
    notes: dict[str, Any] = field(default_factory=dict)
    initial_metadata_sent: bool = False

    async def send_initial_metadata(self, context: Context, **extra: str) -> None:
        """Sends the request id, and more, before the first response. Does nothing when called again."""
        if not self.initial_metadata_sent:
            self.initial_metadata_sent = True
            pairs = [
                (REQUEST_ID_KEY, self.request_id),
                *((key.replace("_", "-"), value) for key, value in extra.items()),
            ]
            await context.send_initial_metadata(tuple(pairs))

    def adopt_request_id(self, request_id: str) -> None:
        """Takes the id that the first message of a request stream carries.

        Raises:
            InvalidArgumentError: it is not 1 to 128 printable ASCII characters.
        """
        if request_id:
            self.request_id = validate_request_id(request_id)


_current: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


def current_call() -> Call:
    """The call that this task serves."""
    return _current.get()


def enter_call(call: Call) -> None:
    """Makes ``call`` the one that this task serves, to the end of the task."""
    _current.set(call)


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


def validate_request_id(value: str) -> str:
    """Returns the id.

    Raises:
        InvalidArgumentError: it is not 1 to 128 printable ASCII characters.
    """
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidArgumentError(
            f"request_id is {value[:40]!r}; accepted: 1 to 128 printable ASCII characters, no space at either end",
            field="request_id",
        )
    return value
