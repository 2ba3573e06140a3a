"""A real gRPC server in this process, whose servicers are written by the test: what the client sends is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from whet.v1 import (
    embedding_pb2_grpc,
    evaluation_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
    quantization_pb2_grpc,
    training_pb2_grpc,
)

SERVICES = {
    generation_pb2_grpc.add_GenerationServiceServicer_to_server: generation_pb2_grpc.GenerationServiceServicer,
    training_pb2_grpc.add_TrainingServiceServicer_to_server: training_pb2_grpc.TrainingServiceServicer,
    quantization_pb2_grpc.add_QuantizationServiceServicer_to_server: quantization_pb2_grpc.QuantizationServiceServicer,
    evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server: evaluation_pb2_grpc.EvaluationServiceServicer,
    embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server: embedding_pb2_grpc.EmbeddingServiceServicer,
    model_pb2_grpc.add_ModelServiceServicer_to_server: model_pb2_grpc.ModelServiceServicer,
}

Handler = Callable[[Any, grpc.ServicerContext], Any]


@dataclass
class Received:
    """One call as the server saw it. Attributes: cancelled: set when the call ended before its handler did."""

    method: str
    metadata: dict[str, str]
    seconds_left: float | None
    request: Any
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class WireServer:
    """Attributes: handlers: by RPC name; calls: in the order of their arrival."""

    address: str = ""
    handlers: dict[str, Handler] = field(default_factory=dict)
    calls: list[Received] = field(default_factory=list)

    def on(self, method: str, handler: Handler) -> None:
        """Answers an RPC. Streaming ones take a generator function; a request stream comes as a list."""
        self.handlers[method] = handler

    def serve(self, method: str, request: Any, context: grpc.ServicerContext) -> tuple[Received, Any]:
        """Records a call and finds its answer."""
        received = Received(
            method=method,
            metadata={key: str(value) for key, value in context.invocation_metadata()},
            seconds_left=context.time_remaining(),
            request=list(request) if hasattr(request, "__next__") else request,
        )
        context.add_callback(received.cancelled.set)
        self.calls.append(received)
        return received, self.handlers[method](received.request, context)


@contextmanager
def wire_server(credentials: grpc.ServerCredentials | None = None) -> Iterator[WireServer]:
    """Starts the server on a free port; with TLS, where credentials are given."""
    state = WireServer()
    server = grpc.server(ThreadPoolExecutor(8))
    for add, base in SERVICES.items():
        add(_servicer(base, state), server)  # type: ignore[operator]
    if credentials is None:
        port = server.add_insecure_port("localhost:0")
    else:
        port = server.add_secure_port("localhost:0", credentials)
    state.address = f"localhost:{port}"
    server.start()
    try:
        yield state
    finally:
        server.stop(0).wait()


def _servicer(base: type, state: WireServer) -> Any:
    methods = {name: _method(name, state) for name in vars(base) if name[0].isupper()}
    return type(base.__name__, (base,), methods)()


def _method(name: str, state: WireServer) -> Callable[..., Any]:
    def answer(_: object, request: Any, context: grpc.ServicerContext) -> Any:
        return state.serve(name, request, context)[1]

    return answer


def failure(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str = "no",
    *,
    reason: str = "",
    request_id: str = "",
    field_name: str = "",
    retry_seconds: float | None = None,
) -> Any:
    """Ends a call with a google.rpc status, made with Google's own types."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=reason, domain="whet", metadata={"request_id": request_id, "hint": "x"})
    ]
    if field_name:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field_name, description=message, reason=reason)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_seconds is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(retry_seconds * 1e9))
        details.append(info)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return context.abort_with_status(rpc_status.to_status(status))
