"""A real server in a process of its own, and stubs to call it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from whet.v1 import (
    embedding_pb2_grpc,
    evaluation_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
    quantization_pb2_grpc,
    training_pb2_grpc,
)

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for a condition that no reply orders: what workers report, they report at an interval.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)


class ServerProcess:
    """``python -m server`` on free ports.

    Args:
        flags: beside the ports and the state directory.
    """

    def __init__(self, state_dir: Path, flags: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.state_dir = state_dir
        self.log_path = state_dir.with_suffix(".log")
        path = os.pathsep.join([str(ROOT), str(ROOT / "client")])
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "--port", "0", "--metrics-port", "0", "--state-dir", str(state_dir),
                 "--threads", "2", *flags],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )  # fmt: skip
        self.address = ""
        self.http = ""

    def wait_ready(self) -> None:
        """Reads the ready line."""
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        try:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        found = re.match(r"whet-server ready: grpc=(\S+) http=(\S+) models=(\S+)", line)
        assert found, f"no ready line but {line!r}; the log:\n{self.log()[-4000:]}"
        self.address, self.http = found[1], found[2]

    def log(self) -> str:
        """Standard error so far, of server and workers."""
        return self.log_path.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on the plain HTTP port."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float | None:
        """Sum of a scrape's samples that have these labels, whatever their others are; None if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        values = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def calls(self, method: str, code: str) -> float:
        """Calls of an RPC that ended with this status so far."""
        return self.metric("whet_rpc_total", method=method, code=code) or 0.0

    def wait_computing(self, model: str) -> None:
        """Waits until a worker has reported that it computes requests: its earlier reports say nothing of them."""
        wait_for(lambda: self.metric("whet_requests_running", model=model))

    def wait_idle(self, model: str) -> None:
        """Waits until the workers report neither a running nor a waiting request."""
        names = ("whet_requests_running", "whet_requests_waiting")
        wait_for(lambda: [self.metric(name, model=model) for name in names] == [0.0, 0.0])

    def worker_pid(self) -> int:
        """The process id of the one worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()


@contextmanager
def running_server(state_dir: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server that is ready; it is ended with the context."""
    server = ServerProcess(state_dir, flags, environment)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


class Stubs:
    """All services over one channel."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials is not None
            else grpc.insecure_channel(address, options)
        )
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.quantization = quantization_pb2_grpc.QuantizationServiceStub(self.channel)
        self.evaluation = evaluation_pb2_grpc.EvaluationServiceStub(self.channel)
        self.embedding = embedding_pb2_grpc.EmbeddingServiceStub(self.channel)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def close(self) -> None:
        """Closes the channel."""
        self.channel.close()

    def is_serving(self, name: str = "") -> bool:
        """What the health service says of a name."""
        status = self.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status
        return bool(status == health_pb2.HealthCheckResponse.SERVING)


class Failure:
    """What a failed call carries."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.trailing = dict(error.trailing_metadata() or ())
        self.details: dict[str, Message] = {}
        status = rpc_status.from_call(error)
        for packed in status.details if status is not None else ():
            kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
            message = kind()
            packed.Unpack(message)
            self.details[kind.__name__] = message

    @property
    def reason(self) -> str:
        """ErrorInfo.reason."""
        return self.details["ErrorInfo"].reason  # type: ignore[attr-defined,no-any-return]

    @property
    def fields(self) -> list[str]:
        """The fields that BadRequest names."""
        return [violation.field for violation in self.details["BadRequest"].field_violations]  # type: ignore[attr-defined]


@contextmanager
def fails(code: grpc.StatusCode, *, reason: str = "", field: str | None = None) -> Iterator[list[Failure]]:
    """Expects the body to fail with this status, and with everything that a failure promises to carry."""
    caught: list[Failure] = []
    try:
        yield caught
    except grpc.RpcError as error:
        failure = Failure(error)
        caught.append(failure)
    else:
        raise AssertionError(f"the call went through; {code} was expected")
    assert failure.code is code, (failure.code, failure.message)
    info: Any = failure.details["ErrorInfo"]
    assert info.domain == "whet"
    assert info.metadata["request_id"] == failure.trailing["x-request-id"]
    if reason:
        assert failure.reason == reason, failure.message
    if field is not None:
        assert failure.fields == [field], failure.message
