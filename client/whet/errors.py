"""The client's errors. All are WhetError; each is also the standard library's error of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A request field that the server did not accept.

    Attributes:
        field: dotted path in the request message, such as "sampling.temperature".
        description: the value and what would be accepted.
        reason: stable word in UPPER_SNAKE_CASE, or "".
    """

    field: str
    description: str
    reason: str = ""


class WhetError(Exception):
    """Root of the errors that this package raises.

    Attributes:
        code: name of the gRPC status ("NOT_FOUND").
        message: names the offending value and what would be accepted.
        reason: stable word in UPPER_SNAKE_CASE that a program may branch on; "" if the server gave none.
        request_id: of the failed request; find it in the server's log. "" if there was none.
        field_violations: the request fields at fault, if any.
        metadata: what else the server says about the reason.
        retry_after: seconds after which a retry may succeed; None if the server did not say.
    """

    code: str = "UNKNOWN"
    grpc_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        request_id: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.grpc_code
        self.reason = reason
        self.request_id = request_id
        self.field_violations = field_violations
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    def __str__(self) -> str:  # KeyError and OSError among the bases would change it
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))


def _rebuild(cls: type[WhetError], message: str, state: dict[str, object]) -> WhetError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class InvalidArgumentError(WhetError, ValueError):
    """A request value is not accepted, whatever the state of the server."""

    grpc_code = "INVALID_ARGUMENT"


class NotFoundError(WhetError, LookupError):
    """A model, adapter, version or run does not exist."""

    grpc_code = "NOT_FOUND"


class AlreadyExistsError(WhetError, ValueError):
    """The name is taken."""

    grpc_code = "ALREADY_EXISTS"


class FailedPreconditionError(WhetError, RuntimeError):
    """The request is fine in itself, but not in the server's present state."""

    grpc_code = "FAILED_PRECONDITION"


class OverloadedError(WhetError, RuntimeError):
    """A queue, the memory or a message limit is full; ``retry_after`` says when a retry may succeed."""

    grpc_code = "RESOURCE_EXHAUSTED"


class UnavailableError(WhetError, ConnectionError):
    """The server cannot be reached, is draining, or lost the worker that did the work."""

    grpc_code = "UNAVAILABLE"


class DeadlineExceededError(WhetError, TimeoutError):
    """The call took longer than its timeout."""

    grpc_code = "DEADLINE_EXCEEDED"


class CancelledError(WhetError, RuntimeError):
    """The call was cancelled."""

    grpc_code = "CANCELLED"


class UnauthenticatedError(WhetError, PermissionError):
    """The server asks for a token, and the call carried none or a wrong one."""

    grpc_code = "UNAUTHENTICATED"


class PermissionDeniedError(WhetError, PermissionError):
    """The token does not allow this."""

    grpc_code = "PERMISSION_DENIED"


class UnimplementedError(WhetError, NotImplementedError):
    """The server does not know this call."""

    grpc_code = "UNIMPLEMENTED"


class InternalError(WhetError, RuntimeError):
    """A fault of the server, or a stream that broke its own rules."""

    grpc_code = "INTERNAL"


class RunFailedError(WhetError, RuntimeError):
    """A training run could not go on. Its last good checkpoint stays on the server.

    Attributes:
        run_id: of the run.
        step: at which it failed; None if before the first.
    """

    run_id: str = ""
    step: int | None = None
    grpc_code = "FAILED_PRECONDITION"


ERRORS_BY_CODE: dict[str, type[WhetError]] = {
    cls.grpc_code: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        FailedPreconditionError,
        OverloadedError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
        UnauthenticatedError,
        PermissionDeniedError,
        UnimplementedError,
        InternalError,
    )
}
"""The class to raise for a gRPC status; others are raised as WhetError."""
