"""The engine's error tree: stable codes, each error also a stdlib error, all picklable.

``code`` is what the server maps to a wire status; ``reason`` is the stable, machine-readable word that a client may
branch on; ``field`` names the offending request field, where there is one. The message states the offending value and
what would have been accepted.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Root of all errors that the engine raises on purpose.

    Args:
        message: what was wrong, with the value, and what would be accepted.
        field: dotted path of the offending field (``"sampling.temperature"``), or "" if no single field is at fault.
        reason: UPPER_SNAKE_CASE word; defaults to the class's own.
        retry_after_seconds: for overload: when a retry may succeed; None if unknown.
    """

    code: ClassVar[str] = "internal"
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.reason = reason or self.default_reason
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:  # KeyError would show the repr of its argument
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field, self.reason, self.retry_after_seconds))


def _rebuild(
    cls: type[EngineError], message: str, field: str, reason: str, retry_after_seconds: float | None
) -> EngineError:
    return cls(message, field=field, reason=reason, retry_after_seconds=retry_after_seconds)


class InvalidArgumentError(EngineError, ValueError):
    """A request value is outside what is accepted, whatever the state of the server."""

    code = "invalid_argument"
    default_reason = "INVALID_ARGUMENT"


class OutOfRangeError(InvalidArgumentError):
    """A size or count exceeds a configured limit or the model's context."""

    default_reason = "LIMIT_EXCEEDED"


class ShapeError(InvalidArgumentError):
    """A tensor has another shape than its place requires."""

    default_reason = "BAD_SHAPE"


class FormatError(InvalidArgumentError):
    """A model, adapter or data file is malformed or of an unsupported kind."""

    default_reason = "BAD_FORMAT"


class NotFoundError(EngineError, LookupError):
    """A model, adapter, version or run does not exist."""

    code = "not_found"
    default_reason = "NOT_FOUND"


class AlreadyExistsError(EngineError, ValueError):
    """The name is taken."""

    code = "already_exists"
    default_reason = "ALREADY_EXISTS"


class FailedPreconditionError(EngineError, RuntimeError):
    """The request is fine in itself, but not in the present state (model not loaded, adapter of another base …)."""

    code = "failed_precondition"
    default_reason = "FAILED_PRECONDITION"


class OverloadedError(EngineError, RuntimeError):
    """A queue or the memory is full; the same request may succeed later."""

    code = "resource_exhausted"
    default_reason = "OVERLOADED"


class OutOfMemoryError(OverloadedError, MemoryError):
    """The device has no memory left for this request; the engine goes on."""

    default_reason = "OUT_OF_MEMORY"


class UnavailableError(EngineError, ConnectionError):
    """The worker that held the work is gone, or the server is draining."""

    code = "unavailable"
    default_reason = "UNAVAILABLE"


class CancelledError(EngineError, RuntimeError):
    """The caller cancelled the work, or its deadline passed."""

    code = "cancelled"
    default_reason = "CANCELLED"


class TrainingError(EngineError, ArithmeticError):
    """A run cannot go on: non-finite losses, or training and serving forwards that differ."""

    code = "failed_precondition"
    default_reason = "TRAINING_FAILED"


class InternalError(EngineError, RuntimeError):
    """A fault of ours."""


ERRORS_BY_CODE: dict[str, type[EngineError]] = {
    "invalid_argument": InvalidArgumentError,
    "not_found": NotFoundError,
    "already_exists": AlreadyExistsError,
    "failed_precondition": FailedPreconditionError,
    "resource_exhausted": OverloadedError,
    "unavailable": UnavailableError,
    "cancelled": CancelledError,
    "internal": InternalError,
}
"""The class to raise for a code that arrived from another process."""
