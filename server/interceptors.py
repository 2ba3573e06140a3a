"""What every call goes through: identity, record, translation of errors, authentication.

One wrapper goes around each handler, with one function per concern, from the outermost to the innermost. Handlers raise
EngineError and know nothing of statuses.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from engine.errors import EngineError, InternalError, InvalidArgumentError, OutOfRangeError
from server.errors import DeadlineExceededError, UnauthenticatedError, status_code, to_grpc_status
from server.metrics import Metrics
from server.rpc import REQUEST_ID_KEY, Call, Context, enter_call, new_request_id, validate_request_id

logger = logging.getLogger("whet.rpc")

Layer = Callable[[Call, Context], AbstractAsyncContextManager[None]]
_OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})
_QUIET_SERVICES = frozenset({"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"})


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds every handler with the layers, the first being the outermost."""

    def __init__(self, *layers: Layer) -> None:
        self._layers = layers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler  # grpc answers UNIMPLEMENTED
        _, service, method = handler_call_details.method.split("/", 2)
        if handler.response_streaming:
            return self._wrap_stream(handler, service, method)
        return self._wrap_unary(handler, service, method)

    def _wrap_unary(
        self, handler: grpc.RpcMethodHandler[Any, Any], service: str, method: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        inner: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def serve(request: Any, context: Context) -> Any:
            call = Call(service, method, new_request_id())
            enter_call(call)
            async with AsyncExitStack() as stack:
                for layer in self._layers:
                    await stack.enter_async_context(layer(call, context))
                response = await inner(_received(call, context, request, handler.request_streaming), context)
                await call.send_initial_metadata(context)
                return response

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(serve, _lenient(handler.request_deserializer), handler.response_serializer)

    def _wrap_stream(
        self, handler: grpc.RpcMethodHandler[Any, Any], service: str, method: str
    ) -> grpc.RpcMethodHandler[Any, Any]:
        inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        # A coroutine that writes, not a generator: a cancel then surely ends ``responses`` before the call is over.
        async def serve(request: Any, context: Context) -> None:
            call = Call(service, method, new_request_id())
            enter_call(call)
            async with AsyncExitStack() as stack:
                for layer in self._layers:
                    await stack.enter_async_context(layer(call, context))
                responses = inner(_received(call, context, request, handler.request_streaming), context)
                if not hasattr(responses, "__aiter__"):  # a handler that writes to the context
                    await responses
                    return
                async with aclosing(responses):
                    async for response in responses:
                        await call.send_initial_metadata(context)
                        await context.write(response)

        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(serve, _lenient(handler.request_deserializer), handler.response_serializer)


class _Malformed:
    """In the place of a request whose bytes are no message: grpc itself would call that a fault of the server."""


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize is not None else data
        except DecodeError:
            return _Malformed()

    return read


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidArgumentError("the bytes of the request are no message of this RPC", reason="MALFORMED_MESSAGE")
    return request


def _received(call: Call, context: Context, request: Any, is_stream: bool) -> Any:
    """The request, or the stream of requests, checked to be messages; the call takes its id from it."""
    if not is_stream:
        _identify(call, context, _checked(request))
        return request
    _identify(call, context, None)

    async def messages() -> AsyncIterator[Any]:
        async for message in request:
            yield _checked(message)

    return messages()


def _identify(call: Call, context: Context, request: Any) -> None:
    """Takes the caller's request id: the message's, or else the metadata's."""
    given = getattr(request, "request_id", "") or metadata_value(context, REQUEST_ID_KEY)
    if given:
        call.request_id = validate_request_id(given)


def metadata_value(context: Context, key: str) -> str:
    """The first value of a metadata key, or ""."""
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""


def recorded(metrics: Metrics) -> Layer:
    """Counts and times the call, and logs one line with its outcome, before the caller has its status: who has seen a
    refusal finds it counted."""

    @asynccontextmanager
    async def layer(call: Call, context: Context) -> AsyncIterator[None]:
        code = "OK"
        try:
            yield
        except EngineError as error:
            code = status_code(error).name
            call.notes.setdefault("reason", error.reason)
            call.notes.setdefault("error", error.message)
            if error.reason == OutOfRangeError.default_reason:
                metrics.admission_rejections_total.labels("size").inc()
            raise
        except grpc.aio.AbortError:  # of a servicer that is not ours
            code = _code_name(context)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        finally:
            seconds = time.monotonic() - call.began
            metrics.rpc_total.labels(call.service, call.method, code).inc()
            metrics.rpc_duration_seconds.labels(call.service, call.method, code).observe(seconds)
            logger.log(
                logging.DEBUG if call.service in _QUIET_SERVICES else logging.INFO,
                "%s %s",
                call.method,
                code,
                extra={
                    "request_id": call.request_id,
                    "rpc_service": call.service,
                    "rpc_method": call.method,
                    "code": code,
                    "seconds": round(seconds, 6),
                    "peer": context.peer(),
                    **call.notes,
                },
            )

    return layer


def _code_name(context: Context) -> str:
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((status.name for status in grpc.StatusCode if status.value[0] == code), "UNKNOWN")


def answered() -> Layer:
    """Ends the call with the status, details included, of the EngineError that comes out of it."""

    @asynccontextmanager
    async def layer(call: Call, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except EngineError as error:
            await context.abort_with_status(to_grpc_status(error, call.request_id))

    return layer


def translated() -> Layer:
    """Turns whatever a handler raises into an EngineError; what nobody foresaw becomes INTERNAL, and is logged."""

    @asynccontextmanager
    async def layer(call: Call, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except EngineError as error:
            if error.code == "internal":
                logger.error("%s failed: %s", call.method, error, extra={"request_id": call.request_id})
            raise
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except TimeoutError as error:
            raise DeadlineExceededError("the deadline of the call has passed") from error
        except Exception as error:
            logger.exception("%s failed", call.method, extra={"request_id": call.request_id})
            raise InternalError("the server failed on this request; its log has more under the request id") from error

    return layer


def authenticated(token: str | None) -> Layer:
    """Refuses calls without the bearer token; health checks need none. None: all calls pass."""
    expected = f"Bearer {token}".encode() if token is not None else None

    @asynccontextmanager
    async def layer(call: Call, context: Context) -> AsyncIterator[None]:
        if expected is not None and call.service not in _OPEN_SERVICES:
            given = metadata_value(context, "authorization").encode()
            # Comparing in constant time tells an attacker nothing about a common prefix.
            if not hmac.compare_digest(given, expected):
                raise UnauthenticatedError(
                    "the metadata key 'authorization' carries no valid token; accepted: 'Bearer TOKEN'"
                    if given
                    else "the call carries no 'authorization' metadata; accepted: 'Bearer TOKEN'"
                )
        yield

    return layer
