"""How both clients make calls: metadata, deadlines, retries, typed errors, cancellation."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import whet
from tests.unit.wire_server import WireServer, failure, wire_server
from whet import AsyncClient, Client, RetryPolicy
from whet.v1 import common_pb2, embedding_pb2, generation_pb2, model_pb2, training_pb2

FAST = RetryPolicy(initial_backoff_seconds=0.01)


@pytest.fixture
def server() -> Iterator[WireServer]:
    with wire_server() as running:
        yield running


@pytest.fixture
def client(server: WireServer) -> Iterator[Client]:
    with Client(server.address, token="secret", retry=FAST) as connected:
        yield connected


def _async(server: WireServer, use: Callable[[AsyncClient], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(server.address, **{"token": "secret", "retry": FAST, **options}) as client:
            return await use(client)

    return asyncio.run(main())


def _generation(*texts: str) -> list[generation_pb2.GenerateResponse]:
    finished = generation_pb2.GenerationFinished(request_id="r")
    finished.completions.add(index=0, finish_reason=generation_pb2.FINISH_REASON_STOP, stop_string="END")
    return [
        generation_pb2.GenerateResponse(started=generation_pb2.GenerationStarted(request_id="r", num_prompt_tokens=3)),
        *(generation_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text=text)) for text in texts),
        generation_pb2.GenerateResponse(finished=finished),
    ]


# ------------------------------------------------------------------------------------------------ metadata, deadline


def test_every_call_carries_the_token_a_deadline_and_a_request_id(server: WireServer, client: Client) -> None:
    server.on("GetModel", lambda request, _: model_pb2.GetModelResponse(model=model_pb2.Model(name=request.name)))
    assert client.model("m").name == "m"
    assert client.model("m", timeout=5).name == "m"

    async def use(aio: AsyncClient) -> None:
        assert (await aio.model("m", timeout=7)).name == "m"

    _async(server, use)
    default, named, asynchronous = server.calls
    assert all(call.metadata["authorization"] == "Bearer secret" for call in server.calls)
    assert len({call.request.request_id for call in server.calls}) == 3
    assert all(len(call.request.request_id) == 32 for call in server.calls)
    assert default.seconds_left is not None
    # gRPC rounds up to what three digits hold, and a busy machine takes its time: the three only need to differ.
    assert 300 < default.seconds_left <= 610
    assert named.seconds_left is not None
    assert 0 < named.seconds_left <= 5.5
    assert asynchronous.seconds_left is not None
    assert 0 < asynchronous.seconds_left <= 7.5


def test_without_a_token_there_is_no_authorization(server: WireServer) -> None:
    server.on("GetModel", lambda *_: model_pb2.GetModelResponse())
    with Client(server.address) as client:
        client.model("m")
    assert "authorization" not in server.calls[0].metadata


def test_training_runs_and_infinite_timeouts_have_no_deadline(server: WireServer, client: Client) -> None:
    server.on("WatchRun", lambda *_: iter(()))
    server.on("GetModel", lambda *_: model_pb2.GetModelResponse())
    list(client.watch("run"))
    client.model("m", timeout=float("inf"))
    # gRPC gives a call without a deadline a "remaining time" of centuries.
    assert all(call.seconds_left is None or call.seconds_left > 1e8 for call in server.calls)


def test_a_deadline_that_passes_is_a_timeout_error(server: WireServer, client: Client) -> None:
    server.on("GetModel", lambda *_: time.sleep(0.5))
    with pytest.raises(whet.DeadlineExceededError) as raised:
        client.model("m", timeout=0.05)
    assert isinstance(raised.value, TimeoutError)
    assert len(server.calls) == 1


def _certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_mutual_tls_needs_both_certificates(tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path, "whet.test")
    mine, my_key = _certificate(tmp_path, "client.test")
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())], mine.read_bytes(), require_client_auth=True
    )
    with wire_server(credentials) as server:
        server.on("GetModel", lambda *_: model_pb2.GetModelResponse(model=model_pb2.Model(name="m")))
        tls = whet.TLS(
            root_certificates=certificate, client_certificate=mine, client_key=my_key, server_name="whet.test"
        )
        with Client(server.address, tls=tls) as client:
            assert client.model("m").name == "m"
        assert _async(server, lambda aio: aio.model("m"), tls=tls).name == "m"
        for wrong in (
            whet.TLS(root_certificates=certificate, server_name="whet.test"),
            whet.TLS(root_certificates=certificate, client_certificate=mine, client_key=my_key, server_name="x.test"),
            whet.TLS(client_certificate=mine, client_key=my_key, server_name="whet.test"),
            None,
        ):
            with Client(server.address, tls=wrong, retry=None) as client, pytest.raises(whet.UnavailableError):
                client.model("m", timeout=10)
    with pytest.raises(ValueError, match="both or neither"):
        whet.TLS(client_certificate=mine)


# ----------------------------------------------------------------------------------------------------------- retries


def _fail_first(times: int, fail: Callable[[grpc.ServicerContext], Any], answer: Callable[[], Any]) -> Any:
    count = iter(range(1000))

    def handler(_: Any, context: grpc.ServicerContext) -> Any:
        return fail(context) if next(count) < times else answer()

    return handler


def _unavailable(context: grpc.ServicerContext) -> Any:
    return failure(context, grpc.StatusCode.UNAVAILABLE)


def test_unavailable_is_retried_under_the_same_request_id(server: WireServer, client: Client) -> None:
    server.on("GetModel", _fail_first(2, _unavailable, model_pb2.GetModelResponse))
    client.model("m")
    assert len(server.calls) == 3
    assert len({call.request.request_id for call in server.calls}) == 1

    server.calls.clear()
    server.on("GetModel", _fail_first(2, _unavailable, model_pb2.GetModelResponse))
    _async(server, lambda aio: aio.model("m"))
    assert len(server.calls) == 3


def test_retries_end_after_max_attempts(server: WireServer) -> None:
    server.on("GetModel", lambda _, context: _unavailable(context))
    with (
        Client(server.address, retry=RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01)) as client,
        pytest.raises(whet.UnavailableError),
    ):
        client.model("m")
    assert len(server.calls) == 3
    server.calls.clear()
    with Client(server.address, retry=None) as client, pytest.raises(whet.UnavailableError):
        client.model("m")
    assert len(server.calls) == 1


def test_a_call_that_is_not_safe_to_repeat_is_not_repeated(server: WireServer, client: Client) -> None:
    server.on("DeleteAdapter", lambda _, context: _unavailable(context))
    server.on("ResumeRun", lambda _, context: _unavailable(context))
    with pytest.raises(whet.UnavailableError):
        client.delete_adapter("a", model="m")
    with pytest.raises(whet.UnavailableError):
        list(client.resume("run"))
    assert [call.method for call in server.calls] == ["DeleteAdapter", "ResumeRun"]


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "FAILED_PRECONDITION"])
def test_other_errors_are_not_retried(server: WireServer, client: Client, code: str) -> None:
    server.on("GetModel", lambda _, context: failure(context, grpc.StatusCode[code]))
    with pytest.raises(whet.WhetError) as raised:
        client.model("m")
    assert raised.value.code == code
    assert len(server.calls) == 1


def test_overload_is_retried_only_with_and_after_the_servers_delay(server: WireServer, client: Client) -> None:
    overloaded = grpc.StatusCode.RESOURCE_EXHAUSTED
    server.on(
        "GetModel",
        _fail_first(1, lambda context: failure(context, overloaded, retry_seconds=0.2), model_pb2.GetModelResponse),
    )
    began = time.monotonic()
    client.model("m")
    assert time.monotonic() - began >= 0.2
    assert len(server.calls) == 2

    server.calls.clear()
    server.on("GetModel", lambda _, context: failure(context, overloaded))
    with pytest.raises(whet.OverloadedError) as raised:
        client.model("m")
    assert raised.value.retry_after is None
    assert len(server.calls) == 1


def test_no_retry_is_begun_that_the_deadline_would_not_let_end(server: WireServer, client: Client) -> None:
    overloaded = grpc.StatusCode.RESOURCE_EXHAUSTED
    server.on("GetModel", lambda _, context: failure(context, overloaded, retry_seconds=30.0))
    with pytest.raises(whet.OverloadedError) as raised:  # and not, after the wait, of the deadline
        client.model("m", timeout=2.0)
    assert raised.value.retry_after == 30.0
    assert len(server.calls) == 1


def test_a_stream_is_retried_before_its_first_message_only(server: WireServer, client: Client) -> None:
    server.on("Generate", _fail_first(2, _unavailable, lambda: iter(_generation("a", "b"))))
    assert client.complete("x", model="m").text == "ab"
    assert len(server.calls) == 3

    server.calls.clear()
    server.on("Generate", _fail_first(2, _unavailable, lambda: iter(_generation("a", "b"))))
    assert _async(server, lambda aio: aio.complete("x", model="m")).text == "ab"
    assert len(server.calls) == 3

    def breaks(_: Any, context: grpc.ServicerContext) -> Any:
        yield from _generation("a")[:2]
        _unavailable(context)

    server.calls.clear()
    server.on("Generate", breaks)
    stream = client.generate("x", model="m")
    assert next(stream).text == "a"
    with pytest.raises(whet.UnavailableError):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert len(server.calls) == 1

    server.calls.clear()
    with pytest.raises(whet.UnavailableError):
        _async(server, lambda aio: aio.complete("x", model="m"))
    assert len(server.calls) == 1


def test_backoff_grows_to_its_cap_within_its_jitter() -> None:
    policy = RetryPolicy(max_attempts=100)
    error = whet.UnavailableError("gone")
    for attempt, expected in ((1, 0.1), (2, 0.15), (3, 0.225), (50, 5.0)):
        waits = [policy.delay(error, attempt) or 0.0 for _ in range(200)]
        assert 0.8 * expected <= min(waits) < max(waits) <= 1.2 * expected
    assert policy.delay(error, 100) is None


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_errors_carry_what_the_server_said(server: WireServer, client: Client, flavour: str) -> None:
    server.on(
        "GetModel",
        lambda _, context: failure(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            "name is ''; accepted: a name",
            reason="BAD_NAME",
            request_id="the-servers",
            field_name="name",
        ),
    )
    with pytest.raises(whet.InvalidArgumentError) as raised:
        client.model("") if flavour == "sync" else _async(server, lambda aio: aio.model(""))
    error = raised.value
    assert str(error) == error.message == "name is ''; accepted: a name"
    assert (error.code, error.reason, error.request_id) == ("INVALID_ARGUMENT", "BAD_NAME", "the-servers")
    assert error.field_violations == (whet.FieldViolation("name", "name is ''; accepted: a name", "BAD_NAME"),)
    assert error.metadata == {"hint": "x"}
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("code", "kind", "builtin"),
    [
        ("NOT_FOUND", whet.NotFoundError, LookupError),
        ("ALREADY_EXISTS", whet.AlreadyExistsError, ValueError),
        ("FAILED_PRECONDITION", whet.FailedPreconditionError, RuntimeError),
        ("UNAUTHENTICATED", whet.UnauthenticatedError, PermissionError),
        ("PERMISSION_DENIED", whet.PermissionDeniedError, PermissionError),
        ("UNIMPLEMENTED", whet.UnimplementedError, NotImplementedError),
        ("CANCELLED", whet.CancelledError, RuntimeError),
        ("INTERNAL", whet.InternalError, RuntimeError),
        ("DATA_LOSS", whet.WhetError, Exception),
    ],
)
def test_each_status_has_its_error(
    server: WireServer, client: Client, code: str, kind: type[whet.WhetError], builtin: type[Exception]
) -> None:
    server.on("GetModel", lambda _, context: context.abort(grpc.StatusCode[code], "plain"))
    with pytest.raises(kind) as raised:
        client.model("m")
    assert type(raised.value) is kind
    assert isinstance(raised.value, builtin)
    assert (raised.value.code, str(raised.value), raised.value.reason) == (code, "plain", "")
    assert raised.value.request_id == server.calls[0].request.request_id


def test_details_that_are_not_protobuf_do_not_hide_the_error(server: WireServer, client: Client) -> None:
    def handler(_: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    server.on("GetModel", handler)
    with pytest.raises(whet.NotFoundError, match="gone"):
        client.model("m")


def test_a_stream_without_its_terminal_event_is_an_error(server: WireServer, client: Client) -> None:
    server.on("Generate", lambda *_: iter(_generation("a")[:-1]))
    with pytest.raises(whet.InternalError, match="terminal event"):
        client.complete("x", model="m")
    with pytest.raises(whet.InternalError, match="terminal event"):
        _async(server, lambda aio: aio.complete("x", model="m"))


# ------------------------------------------------------------------------------------------------------ cancellation


def _endless(_: Any, context: grpc.ServicerContext) -> Any:
    yield _generation()[0]
    ended = threading.Event()
    context.add_callback(ended.set)
    while not ended.wait(0.005):
        yield generation_pb2.GenerateResponse(delta=generation_pb2.GenerationDelta(text="a"))


def test_close_with_and_garbage_collection_cancel_the_call(server: WireServer, client: Client) -> None:
    server.on("Generate", _endless)
    closed = client.generate("x", model="m")
    next(closed)
    closed.close()
    with client.generate("x", model="m") as left:
        next(left)
    dropped = client.generate("x", model="m")
    next(dropped)
    del dropped
    for call in server.calls:
        assert call.cancelled.wait(5)
    assert list(closed) == list(left) == []


def test_asyncio_close_with_break_and_task_cancellation_cancel_the_call(server: WireServer) -> None:
    server.on("Generate", _endless)

    async def use(aio: AsyncClient) -> None:
        closed = aio.generate("x", model="m")
        await closed.__anext__()
        await closed.close()
        async with aio.generate("x", model="m") as left:
            await left.__anext__()
        async for _ in aio.generate("x", model="m"):
            break
        task = asyncio.create_task(aio.complete("x", model="m"))
        while len(server.calls) < 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(server.calls) == 4
        for call in server.calls:
            assert await asyncio.to_thread(call.cancelled.wait, 60)

    _async(server, use)


# ---------------------------------------------------------------------------------------------------- runs and pages


def _event(run_id: str = "run-1", sequence: int = 0, **event: Any) -> training_pb2.TrainResponse:
    return training_pb2.TrainResponse(event=training_pb2.TrainEvent(run_id=run_id, sequence=sequence, **event))


def test_a_run_gives_its_id_before_its_first_event_and_cancels_by_it(server: WireServer, client: Client) -> None:
    may_go_on = threading.Event()

    def train(_: Any, context: grpc.ServicerContext) -> Any:
        context.send_initial_metadata((("x-run-id", "run-1"),))
        may_go_on.wait(10)
        yield _event(started=training_pb2.RunStarted(total_steps=1))
        yield _event(
            sequence=1,
            finished=training_pb2.RunFinished(step=1, stop_reason=training_pb2.STOP_REASON_CANCELLED),
        )

    def cancel(request: training_pb2.CancelRunRequest, _: Any) -> training_pb2.CancelRunResponse:
        may_go_on.set()
        state = training_pb2.RUN_STATE_CANCELLED
        return training_pb2.CancelRunResponse(run=training_pb2.Run(run_id=request.run_id, state=state))

    server.on("Train", train)
    server.on("CancelRun", cancel)
    run = client.train([{"text": "a"}], model="m", adapter="a", max_steps=1)
    assert run.id == "run-1"
    assert run.cancel().state == "cancelled"
    assert [event.kind for event in run] == ["run_started", "finished"]
    assert run.result().stop_reason == "cancelled"

    may_go_on.clear()

    async def use(aio: AsyncClient) -> None:
        run = aio.train([{"text": "a"}], model="m", adapter="a", max_steps=1)
        with pytest.raises(RuntimeError, match="await"):
            _ = run.id
        assert (await run).id == "run-1"
        await run.cancel()
        assert [event.kind async for event in run] == ["run_started", "finished"]

    _async(server, use)


def test_a_failed_run_raises_after_its_events(server: WireServer, client: Client) -> None:
    def train(_: Any, __: Any) -> Any:
        yield _event(started=training_pb2.RunStarted())
        error = training_pb2.RunError(code=9, reason="TRAINING_FAILED", message="loss is nan")
        yield _event(failed=training_pb2.RunFailed(step=3, error=error))

    server.on("Train", train)
    run = client.train([{"text": "a"}], model="m", adapter="a", max_steps=1)
    assert next(run).kind == "run_started"
    with pytest.raises(whet.RunFailedError, match="loss is nan") as raised:
        next(run)
    error = raised.value
    assert (error.code, error.reason, error.run_id, error.step) == (
        "FAILED_PRECONDITION",
        "TRAINING_FAILED",
        "run-1",
        3,
    )


def test_a_retried_train_call_sends_all_examples_again(server: WireServer, client: Client) -> None:
    finished = _event(finished=training_pb2.RunFinished())
    server.on("Train", _fail_first(1, _unavailable, lambda: iter([finished])))
    client.train(iter([{"text": "a"}, {"text": "b"}]), model="m", adapter="a", max_steps=1).result()
    first, second = server.calls
    assert [list(map(str, call.request)) for call in (first, second)] == [list(map(str, first.request))] * 2
    assert len(first.request[1].examples.examples) == 2


def test_watching_an_interrupted_run_ends_quietly_but_has_no_result(server: WireServer, client: Client) -> None:
    response = training_pb2.WatchRunResponse(
        event=training_pb2.TrainEvent(run_id="run-1", started=training_pb2.RunStarted())
    )
    server.on("WatchRun", lambda *_: iter([response]))
    run = client.watch("run-1", from_step=4)
    assert [event.kind for event in run] == ["run_started"]
    assert server.calls[0].request.from_step == 4
    with pytest.raises(whet.UnavailableError, match="interrupted"):
        run.result()


def test_lists_follow_all_pages(server: WireServer, client: Client) -> None:
    def pages(request: model_pb2.ListModelsRequest, _: Any) -> model_pb2.ListModelsResponse:
        number = int(request.page_token or "0")
        token = str(number + 1) if number < 2 else ""
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name=f"m{number}")], next_page_token=token)

    server.on("ListModels", pages)
    assert [model.name for model in client.models()] == ["m0", "m1", "m2"]
    assert [model.name for model in _async(server, lambda aio: aio.models())] == ["m0", "m1", "m2"]


def test_large_embedding_batches_travel_in_several_requests(server: WireServer, client: Client) -> None:
    def embed(request: embedding_pb2.EmbedRequest, _: Any) -> embedding_pb2.EmbedResponse:
        vectors = [embedding_pb2.Embedding(values=[float(item.text)]) for item in request.inputs]
        return embedding_pb2.EmbedResponse(embeddings=vectors, dimensions=1, num_tokens=len(vectors))

    server.on("Embed", embed)
    texts = [str(number) for number in range(600)]
    result = client.embed(texts, model="m", normalize=False)
    assert [vector[0] for vector in result.vectors] == [float(text) for text in texts]
    assert (result.num_tokens, len(server.calls)) == (600, 3)
    assert all(call.request.HasField("normalize") for call in server.calls)
    assert _async(server, lambda aio: aio.embed("7", model="m")).vectors == [[7.0]]


# ------------------------------------------------------------------------------------------------------------- files


def _exporting(server: WireServer, files: dict[str, bytes], announced: int | None = None) -> None:
    def export(_: Any, __: Any) -> Any:
        header = model_pb2.ExportAdapterHeader(adapter=model_pb2.Adapter(name="a", version=2))
        for name, data in files.items():
            header.files.add(name=name, size_bytes=len(data) if announced is None else announced)
        yield model_pb2.ExportAdapterResponse(header=header)
        for name, data in files.items():
            for begin in range(0, len(data), 100_000):
                chunk = common_pb2.FileChunk(name=name, data=data[begin : begin + 100_000])
                yield model_pb2.ExportAdapterResponse(chunk=chunk)
        yield model_pb2.ExportAdapterResponse(finished=model_pb2.ExportAdapterFinished())

    server.on("ExportAdapter", export)


def test_export_and_import_carry_the_files_byte_for_byte(server: WireServer, client: Client, tmp_path: Path) -> None:
    files = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 5000}
    _exporting(server, files)
    target = tmp_path / "deep" / "adapter"
    assert client.export_adapter("a", model="m", directory=target).version == 2
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    with pytest.raises(FileExistsError, match="not empty"):
        client.export_adapter("a", model="m", directory=target)
    _async(server, lambda aio: aio.export_adapter("a", model="m", directory=target, overwrite=True))
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]

    server.on("ImportAdapter", lambda *_: model_pb2.ImportAdapterResponse(adapter=model_pb2.Adapter(name="b")))
    assert client.import_adapter("b", model="m", directory=target).name == "b"
    _async(server, lambda aio: aio.import_adapter("b", model="m", directory=target))
    for call in server.calls[-2:]:
        header, *chunks = call.request
        assert {info.name: info.size_bytes for info in header.header.files} == {n: len(d) for n, d in files.items()}
        received = dict.fromkeys(files, b"")
        for message in chunks:
            assert len(message.chunk.data) <= 1 << 20
            received[message.chunk.name] += message.chunk.data
        assert received == files


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "..", "", "/abs", "nul\0"])
def test_names_that_are_paths_are_refused(server: WireServer, client: Client, tmp_path: Path, name: str) -> None:
    _exporting(server, {name: b"x"})
    with pytest.raises(whet.InternalError, match="bare file names"):
        client.export_adapter("a", model="m", directory=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_short_export_leaves_nothing_behind(server: WireServer, client: Client, tmp_path: Path) -> None:
    _exporting(server, {"adapter_config.json": b"{}"}, announced=3)
    with pytest.raises(whet.InternalError, match="announced 3 bytes"):
        client.export_adapter("a", model="m", directory=tmp_path / "out")

    def breaks(_: Any, context: grpc.ServicerContext) -> Any:
        yield model_pb2.ExportAdapterResponse(header=model_pb2.ExportAdapterHeader())
        _unavailable(context)

    server.on("ExportAdapter", breaks)
    with pytest.raises(whet.UnavailableError):
        client.export_adapter("a", model="m", directory=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_import_of_a_directory_without_an_adapter_sends_nothing(
    server: WireServer, client: Client, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        client.import_adapter("a", model="m", directory=tmp_path)
    assert server.calls == []


# ---------------------------------------------------------------------------------------------------------- the two


def test_both_clients_have_the_same_calls_with_the_same_parameters() -> None:
    def calls(cls: type) -> dict[str, list[str]]:
        return {
            name: [str(parameter).replace("Async", "") for parameter in inspect.signature(member).parameters.values()]
            for name, member in vars(cls).items()
            if not name.startswith("_") and callable(member)
        }

    assert calls(Client) == calls(AsyncClient)
