"""From a gRPC error to a WhetError, with the google.rpc details that the server attached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from whet.errors import ERRORS_BY_CODE, FieldViolation, WhetError
from whet.v1 import errors_pb2

_DETAILS_KEY = "grpc-status-details-bin"


def error_from_rpc(error: grpc.RpcError, request_id: str = "") -> WhetError:
    """The typed error of a failed call.

    Args:
        request_id: the one that was sent; the server's own word replaces it.
    """
    call: Any = error  # every RpcError that a call raises is also a grpc.Call
    status: grpc.StatusCode = call.code()
    message = call.details() or status.name
    return _build(status.name, message, _details(call.trailing_metadata()), request_id)


def _details(trailing: Iterable[tuple[str, str | bytes]] | None) -> errors_pb2.ErrorStatus:
    for key, value in trailing or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return errors_pb2.ErrorStatus.FromString(value)
            except DecodeError:  # a proxy's own; the status itself still tells what happened
                break
    return errors_pb2.ErrorStatus()


def _build(code: str, message: str, status: errors_pb2.ErrorStatus, request_id: str) -> WhetError:
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in status.details:
        try:
            match detail.type_url.rpartition("/")[2]:
                case "google.rpc.ErrorInfo":
                    info = errors_pb2.ErrorInfo.FromString(detail.value)
                    reason, metadata = info.reason, dict(info.metadata)
                case "google.rpc.BadRequest":
                    violations += [
                        FieldViolation(violation.field, violation.description, violation.reason)
                        for violation in errors_pb2.BadRequest.FromString(detail.value).field_violations
                    ]
                case "google.rpc.RetryInfo":
                    delay = errors_pb2.RetryInfo.FromString(detail.value).retry_delay
                    retry_after = delay.seconds + delay.nanos / 1e9
                case _:
                    pass
        except DecodeError:
            continue
    return ERRORS_BY_CODE.get(code, WhetError)(
        status.message or message,
        code=code,
        reason=reason,
        request_id=metadata.pop("request_id", request_id),
        field_violations=tuple(violations),
        metadata=metadata,
        retry_after=retry_after,
    )
