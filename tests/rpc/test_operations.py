"""What operators rely on: authentication, health, reflection, metrics, limits, drain."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory, symbol_database
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.app import SERVICE_NAMES
from tests.rpc.calls import LASTING, TIMEOUT, Reply, generate, request, train_messages
from tests.rpc.conftest import EMBEDDER, MODEL
from tests.rpc.harness import ServerProcess, Stubs, fails, running_server, wait_for
from whet.v1 import model_pb2, training_pb2

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


# ----------------------------------------------------------------------------------------------------- authentication


def every_method() -> list[tuple[str, Any]]:
    """Path of every RPC of the package, and its descriptor."""
    symbol_database.Default()
    pool = descriptor_pool.Default()
    methods = []
    for name in SERVICE_NAMES:
        service = pool.FindServiceByName(name)
        methods += [(f"/{name}/{method.name}", method) for method in service.methods]
    return methods


def call(stubs: Stubs, path: str, method: Any, message: bytes = b"", **options: Any) -> None:
    """Calls any RPC with raw bytes, and reads it to its end."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    rpc = getattr(stubs.channel, kind)(path, request_serializer=lambda data: data, response_deserializer=lambda d: d)
    reply = rpc(iter([message]) if method.client_streaming else message, timeout=TIMEOUT, **options)
    if method.server_streaming:
        list(reply)


def test_every_call_needs_the_token(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("right\n")
    server = start_server("--auth-token-file", str(file))
    stubs = Stubs(server.address)
    methods = every_method()
    assert len(methods) == 28
    for path, method in methods:
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "right"),)):
            with fails(UNAUTHENTICATED, reason="UNAUTHENTICATED"):
                call(stubs, path, method, metadata=metadata)
    with fails(UNAUTHENTICATED):
        reflect(stubs)
    assert stubs.is_serving()
    assert server.get("/metrics")[0] == server.get("/readyz")[0] == 200
    token = (("authorization", "Bearer right"),)
    assert Reply(stubs.generation.Generate(request(), timeout=TIMEOUT, metadata=token)).finished
    assert "right" not in server.log()
    stubs.close()


def test_a_token_in_the_environment_is_not_shown(start_server: Callable[..., ServerProcess]) -> None:
    os.environ["WHET_AUTH_TOKEN"] = "sesame-open"
    try:
        server = start_server("--log-level", "debug")
    finally:
        del os.environ["WHET_AUTH_TOKEN"]
    stubs = Stubs(server.address)
    with fails(UNAUTHENTICATED):
        generate(stubs)
    assert "sesame-open" not in server.log()
    assert "sesame-open" not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    stubs.close()


def certificates(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is needed to make a certificate")
def test_tls_and_client_certificates(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    cert, key = certificates(tmp_path)
    flags = ["--host", "localhost", "--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(cert)]
    server = start_server(*flags)
    with_pair = grpc.ssl_channel_credentials(cert.read_bytes(), key.read_bytes(), cert.read_bytes())
    stubs = Stubs(server.address, with_pair)
    assert len(generate(stubs).token_ids()) == 8
    stubs.close()
    for credentials in (None, grpc.ssl_channel_credentials(cert.read_bytes())):
        stranger = Stubs(server.address, credentials)
        with pytest.raises(grpc.RpcError) as caught:
            generate(stranger)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        stranger.close()
    assert server.get("/livez")[0] == 200  # probes need no certificate


# --------------------------------------------------------------------------------------------- health and reflection


def test_health_of_server_services_and_models(stubs: Stubs, rpc_server: ServerProcess) -> None:
    for name in ("", *SERVICE_NAMES, f"model/{MODEL}", f"model/{EMBEDDER}"):
        assert stubs.is_serving(name), name
    with pytest.raises(grpc.RpcError) as caught:
        stubs.is_serving("model/unknown")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert rpc_server.get("/livez") == (200, "ok\n")
    assert rpc_server.get("/readyz") == (200, "ok\n")


def test_a_killed_worker_shows_in_health_and_comes_back(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    stubs = Stubs(server.address)
    before = generate(stubs).token_ids()
    stream = stubs.generation.Generate(request(**LASTING), timeout=TIMEOUT)
    next(iter(stream))
    os.kill(server.worker_pid(), signal.SIGKILL)
    with fails(grpc.StatusCode.UNAVAILABLE, reason="WORKER_LOST"):
        list(stream)
    wait_for(lambda: not stubs.is_serving(f"model/{MODEL}"))
    assert server.get("/readyz")[0] == 503
    model = stubs.model.GetModel(model_pb2.GetModelRequest(name=MODEL), timeout=TIMEOUT).model
    assert model.state == model_pb2.MODEL_STATE_FAILED
    assert generate(stubs).token_ids() == before  # waits for the restart
    wait_for(lambda: stubs.is_serving(f"model/{MODEL}") and server.get("/readyz")[0] == 200)
    assert server.metric("whet_worker_restarts_total", worker="0") == 1.0
    stubs.close()
    if hasattr(os, "SCHED_BATCH"):
        # The front end takes no core from the engine, and a worker that it started does not have its policy.
        assert os.sched_getscheduler(server.process.pid) == os.SCHED_BATCH
        assert os.sched_getscheduler(server.worker_pid()) == os.SCHED_OTHER


def reflect(stubs: Stubs) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(stubs.channel)
    message = reflection_pb2.ServerReflectionRequest(list_services="")
    [response] = stub.ServerReflectionInfo(iter([message]), timeout=TIMEOUT)
    return {service.name for service in response.list_services_response.service}


def test_reflection_lists_all_services(stubs: Stubs) -> None:
    assert set(SERVICE_NAMES) | {"grpc.health.v1.Health"} <= reflect(stubs)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_requests_are_counted_where_dashboards_look(stubs: Stubs, rpc_server: ServerProcess) -> None:
    def reading(name: str, **labels: str) -> float:
        return rpc_server.metric(f"whet_{name}", **labels) or 0.0

    names = {"prompt_tokens_total": 16.0, "generation_tokens_total": 8.0}
    before = {name: reading(name, model=MODEL, adapter="") for name in names}
    finished = reading("requests_total", model=MODEL, adapter="", finish_reason="length")
    calls = reading("rpc_total", method="Generate", code="OK")
    generate(stubs)
    for name, increase in names.items():
        assert reading(name, model=MODEL, adapter="") == before[name] + increase
    assert reading("requests_total", model=MODEL, adapter="", finish_reason="length") == finished + 1
    assert reading("rpc_total", method="Generate", code="OK") == calls + 1
    wait_for(lambda: reading("time_to_first_token_seconds_count", model=MODEL) > 0)
    assert reading("worker_up", worker="0") == 1.0
    assert reading("worker_heartbeat_age_seconds", worker="0") < 30
    assert reading("model_weights_bytes", model=MODEL) > 0


def test_callers_name_no_labels(stubs: Stubs, rpc_server: ServerProcess) -> None:
    from whet.v1 import common_pb2

    with fails(grpc.StatusCode.NOT_FOUND):
        generate(stubs, model="no-such-model-label")
    with fails(grpc.StatusCode.NOT_FOUND):
        generate(stubs, adapter=common_pb2.AdapterSelector(name="no-such-adapter-label"))
    scrape = rpc_server.get("/metrics")[1]
    assert "no-such-model-label" not in scrape
    assert "no-such-adapter-label" not in scrape


@pytest.fixture(scope="module")
def configured(
    tmp_path_factory: pytest.TempPathFactory, model_flags: list[str]
) -> Iterator[tuple[ServerProcess, Stubs]]:
    """One server for the tests of options that do not get into each other's way."""
    flags = ["--metrics-compat", "vllm", "--log-format", "json", "--max-message-bytes", "1MiB"]
    flags += ["--max-prompt-tokens", "20", "--max-n", "2", "--max-active-runs", "1"]
    with running_server(tmp_path_factory.mktemp("configured") / "state", *model_flags, *flags) as server:
        stubs = Stubs(server.address)
        yield server, stubs
        stubs.close()


def test_compatibility_metrics(configured: tuple[ServerProcess, Stubs]) -> None:
    server, stubs = configured

    def counted() -> tuple[float, float]:
        tokens = server.metric("vllm:generation_tokens_total", model_name=MODEL)
        requests = server.metric("vllm:request_success_total", model_name=MODEL, finished_reason="length")
        return tokens or 0.0, requests or 0.0

    tokens, requests = counted()
    generate(stubs)
    assert counted() == (tokens + 8.0, requests + 1.0)
    wait_for(lambda: server.metric("vllm:num_requests_running", model_name=MODEL) == 0.0)


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_full_server_says_when_to_come_back_and_stays_healthy(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-active-requests", "2")
    stubs = Stubs(server.address)
    stream = stubs.generation.Generate(request(**LASTING | {"n": 2}), timeout=TIMEOUT)
    next(iter(stream))
    with fails(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL") as caught:
        generate(stubs)
    assert "RetryInfo" in caught[0].details
    assert stubs.is_serving()
    assert server.metric("whet_admission_rejections_total", reason="queue_full") == 1.0
    stream.cancel()
    wait_for(lambda: server.calls("Generate", "CANCELLED"))  # counted once its places are free
    generate(stubs)
    stubs.close()


def test_limits_are_configurable_and_named(configured: tuple[ServerProcess, Stubs]) -> None:
    server, stubs = configured
    rejected = server.metric("whet_admission_rejections_total", reason="size") or 0.0
    for field, values in (("prompt.text", {"prompt": "x" * 21}), ("n", {"n": 3})):
        with fails(grpc.StatusCode.INVALID_ARGUMENT, reason="LIMIT_EXCEEDED", field=field):
            generate(stubs, **{"prompt": "x", **values})
    assert server.metric("whet_admission_rejections_total", reason="size") == rejected + 2.0
    run = stubs.training.Train(train_messages(params={"max_steps": 3000}), timeout=TIMEOUT)
    run_id = next(iter(run)).event.run_id
    with fails(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="RUNS_FULL") as caught:
        list(stubs.training.Train(train_messages(adapter="other"), timeout=TIMEOUT))
    assert "RetryInfo" in caught[0].details
    stubs.training.CancelRun(training_pb2.CancelRunRequest(run_id=run_id), timeout=TIMEOUT)


def test_a_message_over_the_limit_is_refused(configured: tuple[ServerProcess, Stubs]) -> None:
    _, stubs = configured
    with pytest.raises(grpc.RpcError) as caught:
        generate(stubs, "x" * (2 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    generate(stubs)


# -------------------------------------------------------------------------------------------------------------- drain


def test_a_drain_lets_streams_finish_and_takes_no_new_work(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-seconds", "60")
    stubs = Stubs(server.address)
    stream = stubs.generation.Generate(request(max_tokens=480, n=16, temperature=1.0), timeout=TIMEOUT)
    events = [next(iter(stream))]
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not stubs.is_serving(f"model/{MODEL}"))
    assert server.get("/readyz") == (503, "draining\n")
    assert not stubs.is_serving("whet.v1.GenerationService")
    with fails(grpc.StatusCode.UNAVAILABLE, reason="DRAINING"):
        generate(stubs)
    stubs.model.ListModels(model_pb2.ListModelsRequest(), timeout=TIMEOUT)  # reading is no work
    reply = Reply([*events, *stream])
    assert reply.finished.usage.completion_tokens == 16 * 480
    assert server.process.wait(60) == 0
    stubs.close()


def test_a_drain_has_an_end(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-seconds", "0.1", "--max-batch-tokens", "16")
    stubs = Stubs(server.address)
    stream = stubs.generation.Generate(request(**LASTING), timeout=TIMEOUT)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    with fails(grpc.StatusCode.UNAVAILABLE):
        list(stream)
    assert server.process.wait(30) == 0
    stubs.close()


def test_a_second_signal_ends_it_at_once(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-seconds", "60")
    stubs = Stubs(server.address)
    worker = server.worker_pid()
    stream = stubs.generation.Generate(request(**LASTING), timeout=TIMEOUT)
    next(iter(stream))
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: not stubs.is_serving(f"model/{MODEL}"))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 128 + signal.SIGINT  # half of the time that the first one leaves
    wait_for(lambda: not Path(f"/proc/{worker}/cmdline").exists())
    stream.cancel()
    stubs.close()


def test_two_servers_do_not_share_a_state_directory(rpc_server: ServerProcess, model_flags: list[str]) -> None:
    second = ServerProcess(rpc_server.state_dir, model_flags)
    try:
        assert second.process.wait(90) == 1
        assert "is in use by another server" in second.log()
    finally:
        second.stop()


def test_health_answers_while_models_load(tmp_path: Path, model_flags: list[str]) -> None:
    """Ports answer before the models are there: NOT_SERVING and UNAVAILABLE, not connection refused."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ServerProcess(tmp_path / "state", [*model_flags, "--port", str(port)])
    stubs = Stubs(f"127.0.0.1:{port}")
    try:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        wait_for(children.read_text)
        os.kill(server.worker_pid(), signal.SIGSTOP)  # so that loading takes as long as this test likes
        message = health_pb2.HealthCheckRequest(service=f"model/{MODEL}")
        status = stubs.health.Check(message, timeout=30, wait_for_ready=True).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        with fails(grpc.StatusCode.UNAVAILABLE, reason="LOADING"):
            generate(stubs)
        os.kill(server.worker_pid(), signal.SIGCONT)
        server.wait_ready()
        assert stubs.is_serving(f"model/{MODEL}")
    finally:
        stubs.close()
        assert server.stop() == 0


# --------------------------------------------------------------------------------------------------------------- fuzz

INTERESTING: dict[str, list[Any]] = {
    "int32": [-(2**31), -1, 0, 1, 2**31 - 1],
    "int64": [-(2**63), -1, 0, 1, 2**63 - 1],
    "double": [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308, 5e-324],
    "float": [float("nan"), float("inf"), -1.0],
    "bool": [True, False],
    "string": ["", "\x00", "../../etc/passwd", "x" * 5000, "\U0001f600\u202e", "{{ cycler.__init__ }}"],
    "bytes": [b"", b"\x80\x04", b"x" * 5000],
    "enum": [-1, 0, 1, 99, 2**31 - 1],
}
_KINDS = {1: "double", 2: "float", 3: "int64", 5: "int32", 8: "bool", 9: "string", 12: "bytes", 14: "enum"}


def valid(method: Any) -> Any:
    """A request that works, to change one field of."""
    message = message_factory.GetMessageClass(method.input_type)()
    names = {field.name for field in method.input_type.fields}
    for name, value in (("model", MODEL), ("name", "fuzz"), ("adapter", "fuzz"), ("output", "fuzz")):
        if name in names and method.input_type.fields_by_name[name].type == 9:
            setattr(message, name, value)
    if "model" in names and method.full_name.endswith(".Embed"):
        message.inputs.add(text="x")
    if "prompt" in names:
        message.prompt.text = "fuzz"
    if "sampling" in names:
        message.sampling.max_tokens = 2
    if "steps" in names:
        message.steps = 1
    if "payload" in method.input_type.oneofs_by_name:
        first = method.input_type.oneofs_by_name["payload"].fields[0]
        getattr(message, first.name).model = MODEL
    if "scheme" in names:
        message.scheme, message.dry_run = 1, True
    if "text" in names:
        message.text = "It was the best of times."
    return message


def mutations(message: Any, depth: int = 0) -> Any:
    """Yields the message with one field changed at a time, through all levels."""
    for field in message.DESCRIPTOR.fields:
        kind = _KINDS.get(field.type)
        if kind is None and field.message_type is not None and depth < 4:
            if field.message_type.GetOptions().map_entry:
                for key in (-1, 0, 2**31 - 1):
                    changed = type(message).FromString(message.SerializeToString())
                    getattr(changed, field.name)[key] = float("nan")
                    yield changed
                continue
            inner = message_factory.GetMessageClass(field.message_type)()
            if not field.is_repeated:
                inner.CopyFrom(getattr(message, field.name))
            for changed_inner in [inner, *mutations(inner, depth + 1)]:
                changed = type(message).FromString(message.SerializeToString())
                target = getattr(changed, field.name)
                (target.add() if field.is_repeated else target).CopyFrom(changed_inner)
                if not field.is_repeated:
                    target.SetInParent()
                yield changed
            continue
        for value in INTERESTING.get(kind or "", []):
            changed = type(message).FromString(message.SerializeToString())
            if field.is_repeated:
                getattr(changed, field.name).extend([value] * 3)
            else:
                setattr(changed, field.name, value)
            yield changed


ACCEPTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def test_no_value_of_any_field_of_any_rpc_harms_the_server(start_server: Callable[..., ServerProcess]) -> None:
    """Boundary values on every field: a result or a typed error, never INTERNAL, and the worker stays the same."""
    server = start_server("--log-level", "error")
    stubs = Stubs(server.address)
    worker = server.worker_pid()
    cases = [
        (path, method, changed.SerializeToString())
        for path, method in every_method()
        if not method.full_name.endswith(("UnloadModel", "LoadModel"))
        for changed in mutations(valid(method))
    ]
    assert len(cases) > 1000
    bad: list[str] = []

    def run(case: tuple[str, Any, bytes]) -> None:
        path, method, data = case
        try:
            call(stubs, path, method, data)
        except grpc.RpcError as error:
            if error.code() not in ACCEPTED:
                message = message_factory.GetMessageClass(method.input_type).FromString(data)
                bad.append(f"{path}: {error.code()} {error.details()} for {str(message)[:300]}")

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(run, cases))
    assert not bad, "\n".join(bad[:10])
    assert server.worker_pid() == worker
    assert len(generate(stubs).token_ids()) == 8
    stubs.close()


@pytest.mark.parametrize("data", [b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f"])
def test_bytes_that_are_no_message_are_refused(stubs: Stubs, data: bytes) -> None:
    for path, method in every_method():
        with fails(grpc.StatusCode.INVALID_ARGUMENT, reason="MALFORMED_MESSAGE"):
            call(stubs, path, method, data)
    generate(stubs)


def test_deeply_nested_messages_are_refused(stubs: Stubs) -> None:
    data = b""
    for _ in range(5000):
        length = len(data)
        prefix = bytearray([0x1A])
        while True:
            prefix.append((length & 0x7F) | (0x80 if length > 0x7F else 0))
            length >>= 7
            if not length:
                break
        data = bytes(prefix) + data
    path, method = next(item for item in every_method() if item[0].endswith("/Generate"))
    with fails(grpc.StatusCode.INVALID_ARGUMENT):
        call(stubs, path, method, data)
    generate(stubs)


def test_a_caller_that_vanishes_leaves_nothing_behind(stubs: Stubs, rpc_server: ServerProcess) -> None:
    own = Stubs(rpc_server.address)
    stream = own.generation.Generate(request(**LASTING), timeout=TIMEOUT)
    next(iter(stream))
    rpc_server.wait_computing(MODEL)
    before = rpc_server.calls("Generate", "CANCELLED")
    threading.Thread(target=own.close).start()
    wait_for(lambda: rpc_server.calls("Generate", "CANCELLED") == before + 1)
    rpc_server.wait_idle(MODEL)
