"""The one table from error codes to gRPC statuses, with google.rpc details.

Every error that leaves the server carries ErrorInfo (a stable reason, the domain "whet", the request id), BadRequest
where a field is at fault, and RetryInfo where a retry may help.
"""

from __future__ import annotations

import collections
from typing import ClassVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from engine.errors import (
    ERRORS_BY_CODE,
    EngineError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
)
from engine.errors import CancelledError as EngineCancelledError

DOMAIN = "whet"
DEFAULT_RETRY_SECONDS = 1.0
MAX_MESSAGE_BYTES = 1024  # status and details together must fit in 8 KiB of metadata, percent-encoded


class UnauthenticatedError(EngineError, PermissionError):
    """The call carries no valid bearer token."""

    code: ClassVar[str] = "unauthenticated"
    default_reason: ClassVar[str] = "UNAUTHENTICATED"


class DeadlineExceededError(EngineError, TimeoutError):
    """The deadline that the caller set has passed."""

    code: ClassVar[str] = "deadline_exceeded"
    default_reason: ClassVar[str] = "DEADLINE_EXCEEDED"


STATUS_BY_CODE: dict[str, grpc.StatusCode] = {
    "invalid_argument": grpc.StatusCode.INVALID_ARGUMENT,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "failed_precondition": grpc.StatusCode.FAILED_PRECONDITION,
    "resource_exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "cancelled": grpc.StatusCode.CANCELLED,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "internal": grpc.StatusCode.INTERNAL,
}
"""EngineError.code to gRPC status. A code that is not here is a fault of ours: INTERNAL."""


class _Status(collections.namedtuple("_Status", ("code", "details", "trailing_metadata")), grpc.Status):
    """What ``ServicerContext.abort_with_status`` takes."""


def status_code(error: EngineError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return STATUS_BY_CODE.get(error.code, grpc.StatusCode.INTERNAL)


def to_rpc_status(error: EngineError, request_id: str) -> Status:
    """The google.rpc.Status of an error."""
    code = status_code(error)
    message = _shortened(error.message)
    info = ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"request_id": request_id})
    details: list[Message] = [info]
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = BadRequest.FieldViolation(field=error.field, description=message, reason=error.reason)
        details.append(BadRequest(field_violations=[violation]))
    elif error.field:
        info.metadata["field"] = error.field
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        seconds = DEFAULT_RETRY_SECONDS if error.retry_after_seconds is None else error.retry_after_seconds
        delay = Duration()
        delay.FromNanoseconds(int(seconds * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=code.value[0], message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_grpc_status(error: EngineError, request_id: str) -> grpc.Status:
    """The status that a handler aborts with: code, message, details and the request id in the trailing metadata."""
    status = to_rpc_status(error, request_id)
    trailing = (("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", request_id))
    return _Status(status_code(error), status.message, trailing)


def error_from_code(code: str, message: str, reason: str = "", field: str = "") -> EngineError:
    """The error to raise for what a worker reported."""
    return ERRORS_BY_CODE.get(code, InternalError)(message, reason=reason, field=field)


def over_limit(field: str, value: object, limit: object, unit: str = "") -> InvalidArgumentError:
    """The error of a request that exceeds a configured limit."""
    unit = f" {unit}" if unit else ""
    return InvalidArgumentError(
        f"{field} is {value}{unit}; accepted: at most {limit}{unit}", field=field, reason="LIMIT_EXCEEDED"
    )


def _shortened(message: str) -> str:
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return encoded.decode()
    return encoded[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."


__all__ = [
    "DOMAIN",
    "STATUS_BY_CODE",
    "DeadlineExceededError",
    "EngineCancelledError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OverloadedError",
    "UnauthenticatedError",
    "error_from_code",
    "over_limit",
    "status_code",
    "to_grpc_status",
    "to_rpc_status",
]
