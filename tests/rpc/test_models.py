"""ModelService over the wire: models by name, adapters by version, uploads and downloads."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.calls import LASTING, TIMEOUT, generate, request, train
from tests.rpc.conftest import CONTEXT, EMBEDDER, MODEL
from tests.rpc.harness import ServerProcess, Stubs, fails, wait_for
from tests.rpc.tiny_tokenizer import save_tiny_tokenizer
from tests.tiny import save_tiny_hybrid
from whet import Client
from whet.v1 import common_pb2, model_pb2, training_pb2

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(stubs: Stubs) -> str:
    """An adapter of two versions."""
    name = "models-trained"
    for _ in range(2):
        train(stubs, adapter=name, params={"max_steps": 2})
    return name


def adapters(stubs: Stubs, **fields: Any) -> list[model_pb2.Adapter]:
    return list(stubs.model.ListAdapters(model_pb2.ListAdaptersRequest(**fields), timeout=TIMEOUT).adapters)


def export(stubs: Stubs, name: str, **fields: Any) -> tuple[model_pb2.Adapter, dict[str, bytes]]:
    message = model_pb2.ExportAdapterRequest(model=MODEL, name=name, **fields)
    responses = list(stubs.model.ExportAdapter(message, timeout=TIMEOUT))
    header, *chunks, finished = responses
    files = {info.name: b"" for info in header.header.files}
    for response in chunks:
        assert len(response.chunk.data) <= 1 << 20
        files[response.chunk.name] += response.chunk.data
    assert {info.name: info.size_bytes for info in header.header.files} == {n: len(d) for n, d in files.items()}
    assert finished.finished.num_bytes == sum(map(len, files.values()))
    return header.header.adapter, files


def upload(
    name: str, files: dict[str, bytes], chunk_bytes: int = 1 << 16, **header: Any
) -> Iterator[model_pb2.ImportAdapterRequest]:
    infos = [common_pb2.FileInfo(name=file, size_bytes=len(data)) for file, data in files.items()]
    values = {"model": MODEL, "name": name, "files": infos} | header
    yield model_pb2.ImportAdapterRequest(header=model_pb2.ImportAdapterHeader(**values))
    for file, data in files.items():
        for start in range(0, len(data), chunk_bytes):
            chunk = common_pb2.FileChunk(name=file, data=data[start : start + chunk_bytes])
            yield model_pb2.ImportAdapterRequest(chunk=chunk)


def import_adapter(stubs: Stubs, name: str, files: dict[str, bytes], **header: Any) -> model_pb2.Adapter:
    return stubs.model.ImportAdapter(upload(name, files, **header), timeout=TIMEOUT).adapter


# ------------------------------------------------------------------------------------------------------------- models


def test_models_are_listed_by_name_in_pages(stubs: Stubs) -> None:
    names: list[str] = []
    token = ""
    while True:
        page = stubs.model.ListModels(model_pb2.ListModelsRequest(page_size=1, page_token=token), timeout=TIMEOUT)
        names += [model.name for model in page.models]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(names)
    assert {MODEL, EMBEDDER} <= set(names)
    for field, bad in (("page_size", -1), ("page_size", 1001), ("page_token", "!")):
        with fails(INVALID, field=field):
            stubs.model.ListModels(model_pb2.ListModelsRequest(**{field: bad}), timeout=TIMEOUT)  # type: ignore[arg-type]


def test_a_model_tells_what_it_is(stubs: Stubs) -> None:
    model = stubs.model.GetModel(model_pb2.GetModelRequest(name=MODEL), timeout=TIMEOUT).model
    assert (model.state, model.task) == (model_pb2.MODEL_STATE_READY, model_pb2.TASK_GENERATE)
    assert (model.model_type, model.vocab_size, model.max_model_len, model.num_layers) == ("llama", 300, CONTEXT, 2)
    assert model.has_chat_template
    assert "q_proj" in model.linear_modules
    assert model.num_blocks > 0
    encoder = stubs.model.GetModel(model_pb2.GetModelRequest(name=EMBEDDER), timeout=TIMEOUT).model
    assert (encoder.task, encoder.embedding_dimensions) == (model_pb2.TASK_EMBED, 32)


@pytest.mark.parametrize("name", ["", "..", "../tiny", "/etc/passwd", "a/b", "a\x00b", "tınу", "C:\\x"])
def test_no_name_is_a_path(stubs: Stubs, name: str) -> None:
    for call in (
        lambda: stubs.model.GetModel(model_pb2.GetModelRequest(name=name), timeout=TIMEOUT),
        lambda: stubs.model.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=TIMEOUT),
        lambda: stubs.model.UnloadModel(model_pb2.UnloadModelRequest(name=name), timeout=TIMEOUT),
    ):
        with fails(INVALID, field="name", reason="BAD_NAME"):
            call()
    for make in (
        lambda: stubs.model.GetAdapter(model_pb2.GetAdapterRequest(model=MODEL, name=name), timeout=TIMEOUT),
        lambda: stubs.model.LoadAdapter(model_pb2.LoadAdapterRequest(model=MODEL, name=name), timeout=TIMEOUT),
        lambda: stubs.model.UnloadAdapter(model_pb2.UnloadAdapterRequest(model=MODEL, name=name), timeout=TIMEOUT),
        lambda: stubs.model.DeleteAdapter(model_pb2.DeleteAdapterRequest(model=MODEL, name=name), timeout=TIMEOUT),
        lambda: export(stubs, name),
    ):
        with fails(INVALID, field="name", reason="BAD_NAME"):
            make()


def test_an_unknown_model_is_not_found(stubs: Stubs, tiny_llama: Path) -> None:
    for name in ("unknown", tiny_llama.name):
        with fails(NOT_FOUND, reason="MODEL_NOT_FOUND"):
            stubs.model.LoadModel(model_pb2.LoadModelRequest(name=name), timeout=TIMEOUT)


def test_a_model_is_unloaded_and_loaded_again(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    stubs = Stubs(server.address)
    before = generate(stubs).token_ids()
    unloaded = stubs.model.UnloadModel(model_pb2.UnloadModelRequest(name=MODEL), timeout=TIMEOUT).model
    assert unloaded.state == model_pb2.MODEL_STATE_UNLOADED
    assert unloaded.num_parameters == 0
    with fails(grpc.StatusCode.FAILED_PRECONDITION, reason="MODEL_NOT_READY"):
        generate(stubs)
    assert server.get("/readyz")[0] == 503
    loaded = stubs.model.LoadModel(model_pb2.LoadModelRequest(name=MODEL), timeout=TIMEOUT).model
    assert loaded.state == model_pb2.MODEL_STATE_READY
    assert generate(stubs).token_ids() == before
    again = stubs.model.LoadModel(model_pb2.LoadModelRequest(name=MODEL), timeout=TIMEOUT).model
    assert again == loaded  # nothing to do
    assert server.get("/readyz")[0] == 200

    call = stubs.generation.Generate(request(**LASTING), timeout=TIMEOUT)
    responses = iter(call)
    next(responses)
    with fails(grpc.StatusCode.FAILED_PRECONDITION, reason="MODEL_BUSY"):
        stubs.model.UnloadModel(model_pb2.UnloadModelRequest(name=MODEL), timeout=TIMEOUT)
    stubs.model.UnloadModel(model_pb2.UnloadModelRequest(name=MODEL, force=True), timeout=TIMEOUT)
    with fails(grpc.StatusCode.CANCELLED, reason="MODEL_UNLOADED"):
        list(responses)
    stubs.close()


def test_an_unload_that_lost_its_caller_does_no_harm(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    stubs = Stubs(server.address)
    os.kill(server.worker_pid(), signal.SIGSTOP)
    try:
        call = stubs.model.UnloadModel.future(model_pb2.UnloadModelRequest(name=MODEL), timeout=TIMEOUT)
        message = model_pb2.GetModelRequest(name=MODEL)
        unloaded = model_pb2.MODEL_STATE_UNLOADED  # from the begin of the work on it
        wait_for(lambda: stubs.model.GetModel(message, timeout=TIMEOUT).model.state == unloaded)
        call.cancel()
        wait_for(lambda: server.calls("UnloadModel", "CANCELLED"))
    finally:
        os.kill(server.worker_pid(), signal.SIGCONT)
    unloaded = stubs.model.UnloadModel(model_pb2.UnloadModelRequest(name=MODEL), timeout=TIMEOUT).model
    assert unloaded.state == model_pb2.MODEL_STATE_UNLOADED
    stubs.model.LoadModel(model_pb2.LoadModelRequest(name=MODEL), timeout=TIMEOUT)
    assert len(generate(stubs).token_ids()) == 8
    stubs.close()


@pytest.mark.parametrize("cursor", ["a/b/²", "a/b/" + "9" * 5000, "²"])
def test_a_page_token_of_another_list_is_refused(stubs: Stubs, cursor: str) -> None:
    token = base64.urlsafe_b64encode(cursor.encode()).decode()
    with fails(INVALID, field="page_token"):
        stubs.model.ListAdapters(model_pb2.ListAdaptersRequest(page_token=token), timeout=TIMEOUT)
    with fails(INVALID, field="page_token"):
        stubs.training.ListRuns(training_pb2.ListRunsRequest(page_token=token), timeout=TIMEOUT)


# ----------------------------------------------------------------------------------------------------------- adapters


def test_versions_are_listed_and_one_is_live(stubs: Stubs, trained: str) -> None:
    found = adapters(stubs, model=MODEL, name=trained)
    assert [(adapter.version, adapter.live) for adapter in found] == [(1, False), (2, True)]
    assert all(adapter.run_id and adapter.base_digest and adapter.rank == 8 for adapter in found)
    assert [adapter.version for adapter in adapters(stubs, name=trained, live_only=True)] == [2]
    live = stubs.model.GetAdapter(model_pb2.GetAdapterRequest(model=MODEL, name=trained), timeout=TIMEOUT).adapter
    assert live == found[1]
    message = model_pb2.GetAdapterRequest(model=MODEL, name=trained, version=1)
    assert stubs.model.GetAdapter(message, timeout=TIMEOUT).adapter == found[0]
    first = stubs.model.ListAdapters(model_pb2.ListAdaptersRequest(name=trained, page_size=1), timeout=TIMEOUT)
    rest = model_pb2.ListAdaptersRequest(name=trained, page_token=first.next_page_token)
    assert [*first.adapters, *stubs.model.ListAdapters(rest, timeout=TIMEOUT).adapters] == found


def test_unknown_adapters_and_versions_are_not_found(stubs: Stubs, trained: str) -> None:
    for name, version, reason in ((trained, 9, "ADAPTER_VERSION_NOT_FOUND"), ("unknown", 1, "ADAPTER_NOT_FOUND")):
        with fails(NOT_FOUND, reason=reason):
            message = model_pb2.GetAdapterRequest(model=MODEL, name=name, version=version)
            stubs.model.GetAdapter(message, timeout=TIMEOUT)
        with fails(NOT_FOUND):
            generate(stubs, adapter=common_pb2.AdapterSelector(name=name, version=version))
        with fails(NOT_FOUND):
            stubs.model.LoadAdapter(
                model_pb2.LoadAdapterRequest(model=MODEL, name=name, version=version), timeout=TIMEOUT
            )


def test_a_request_names_its_version(stubs: Stubs, trained: str) -> None:
    one = generate(stubs, adapter=common_pb2.AdapterSelector(name=trained, version=1))
    two = generate(stubs, adapter=common_pb2.AdapterSelector(name=trained))
    assert (one.finished.adapter_version, two.finished.adapter_version) == (1, 2)


def test_what_is_exported_can_be_imported(stubs: Stubs, trained: str) -> None:
    adapter, files = export(stubs, trained)
    assert adapter.version == 2
    assert set(files) == set(FILES)
    assert json.loads(files[FILES[0]])["peft_type"] == "LORA"
    copy = import_adapter(stubs, "models-copy", files)
    assert (copy.name, copy.live, copy.rank, copy.alpha) == ("models-copy", True, adapter.rank, adapter.alpha)
    selector = common_pb2.AdapterSelector(name="models-copy")
    original = generate(stubs, adapter=common_pb2.AdapterSelector(name=trained), max_tokens=24)
    assert generate(stubs, adapter=selector, max_tokens=24).token_ids() == original.token_ids()
    again = import_adapter(stubs, "models-copy", files)
    assert again.version == copy.version + 1


def test_an_import_is_done_once_for_one_request_id(stubs: Stubs, trained: str) -> None:
    files = export(stubs, trained)[1]
    first = import_adapter(stubs, "models-once", files, request_id="import-once")
    assert import_adapter(stubs, "models-once", files, request_id="import-once") == first
    assert len(adapters(stubs, name="models-once")) == 1


def test_two_imports_at_once_with_one_request_id_make_one_version(stubs: Stubs, trained: str) -> None:
    messages = list(upload("models-twice", export(stubs, trained)[1], request_id="import-twice"))
    begun = threading.Barrier(2)

    def slowly() -> Iterator[model_pb2.ImportAdapterRequest]:
        yield messages[0]
        begun.wait(TIMEOUT)
        yield from messages[1:]

    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(stubs.model.ImportAdapter, slowly(), timeout=TIMEOUT) for _ in range(2)]
        replies = [call.result() for call in calls]
    assert replies[0] == replies[1]
    assert [adapter.version for adapter in adapters(stubs, name="models-twice")] == [1]


def test_an_import_that_lost_its_caller_leaves_the_id_to_the_next(stubs: Stubs, trained: str) -> None:
    messages = list(upload("models-left", export(stubs, trained)[1], request_id="import-left"))
    arrived = threading.Event()

    def stuck() -> Iterator[model_pb2.ImportAdapterRequest]:
        yield messages[0]
        arrived.set()
        threading.Event().wait(TIMEOUT)

    first = stubs.model.ImportAdapter.future(stuck(), timeout=TIMEOUT)
    assert arrived.wait(TIMEOUT)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(stubs.model.ImportAdapter, iter(messages), timeout=TIMEOUT)
        first.cancel()
        assert second.result().adapter.version == 1


def test_live_is_a_choice(stubs: Stubs, trained: str) -> None:
    files = export(stubs, trained)[1]
    for _ in range(2):
        import_adapter(stubs, "models-choice", files)
    message = model_pb2.LoadAdapterRequest(model=MODEL, name="models-choice", version=1)
    assert stubs.model.LoadAdapter(message, timeout=TIMEOUT).adapter.live
    selector = common_pb2.AdapterSelector(name="models-choice")
    assert generate(stubs, adapter=selector).finished.adapter_version == 1
    newest = model_pb2.LoadAdapterRequest(model=MODEL, name="models-choice")
    assert stubs.model.LoadAdapter(newest, timeout=TIMEOUT).adapter.version == 2
    unloaded = stubs.model.UnloadAdapter(
        model_pb2.UnloadAdapterRequest(model=MODEL, name="models-choice"), timeout=TIMEOUT
    )
    assert {adapter.loaded for adapter in unloaded.adapters} == {False}
    deleted = stubs.model.DeleteAdapter(
        model_pb2.DeleteAdapterRequest(model=MODEL, name="models-choice", version=1), timeout=TIMEOUT
    )
    assert [adapter.version for adapter in deleted.adapters] == [1]
    assert [adapter.version for adapter in adapters(stubs, name="models-choice")] == [2]
    stubs.model.DeleteAdapter(model_pb2.DeleteAdapterRequest(model=MODEL, name="models-choice"), timeout=TIMEOUT)
    assert adapters(stubs, name="models-choice") == []
    with fails(NOT_FOUND):
        generate(stubs, adapter=selector)


def test_a_deleted_adapter_is_gone_from_disk(stubs: Stubs, trained: str, rpc_server: ServerProcess) -> None:
    import_adapter(stubs, "models-gone", export(stubs, trained)[1])
    stored = [path for path in (rpc_server.state_dir / "adapters").rglob("models-gone") if path.is_dir()]
    assert stored
    stubs.model.DeleteAdapter(model_pb2.DeleteAdapterRequest(model=MODEL, name="models-gone"), timeout=TIMEOUT)
    assert not [path for directory in stored for path in directory.rglob("*.safetensors")]


@pytest.mark.parametrize("damage", ["truncated", "not json", "wrong rank", "unknown module", "nan", "pickle"])
def test_a_malformed_adapter_is_refused_and_leaves_nothing(
    stubs: Stubs, trained: str, rpc_server: ServerProcess, damage: str
) -> None:
    _, files = export(stubs, trained)
    config = json.loads(files[FILES[0]])
    match damage:
        case "truncated":
            files[FILES[1]] = files[FILES[1]][:-7]
        case "not json":
            files[FILES[0]] = b"{"
        case "wrong rank":
            files[FILES[0]] = json.dumps(config | {"r": 3}).encode()
        case "unknown module":
            files[FILES[1]] = files[FILES[1]].replace(b"q_proj", b"z_proj")
        case "nan":
            files[FILES[1]] = files[FILES[1]][:-4] + b"\x00\x00\xc0\x7f"
        case "pickle":
            files[FILES[1]] = b"\x80\x04\x95" + b"." * 64
    with fails(INVALID):
        import_adapter(stubs, f"models-bad-{damage.replace(' ', '-')}", files)
    assert list((rpc_server.state_dir / "staging").iterdir()) == []
    assert adapters(stubs, name=f"models-bad-{damage.replace(' ', '-')}") == []
    generate(stubs)  # the server goes on


def test_an_upload_out_of_order_is_refused(stubs: Stubs, trained: str, rpc_server: ServerProcess) -> None:
    files = export(stubs, trained)[1]
    header, *chunks = upload("models-bad", files)
    stranger = model_pb2.ImportAdapterRequest(chunk=common_pb2.FileChunk(name="../x", data=b"x"))
    large = model_pb2.ImportAdapterRequest(chunk=common_pb2.FileChunk(name=FILES[0], data=b"x" * ((1 << 20) + 1)))
    for messages, field in (
        ([], "header"),
        (chunks, "header"),
        ([header, header], "chunk"),
        ([header, stranger], "chunk.name"),
        ([header, large], "chunk.data"),
        ([header, *chunks[:-1]], "chunk.data"),
        ([header, *chunks, chunks[-1]], "chunk.data"),
    ):
        with fails(INVALID, field=field):
            stubs.model.ImportAdapter(iter(messages), timeout=TIMEOUT)
    assert list((rpc_server.state_dir / "staging").iterdir()) == []


def test_an_adapter_given_at_start_up_is_served(
    start_server: Callable[..., ServerProcess], stubs: Stubs, trained: str, tmp_path: Path
) -> None:
    directory = tmp_path / "given"
    directory.mkdir()
    for name, data in export(stubs, trained)[1].items():
        (directory / name).write_bytes(data)
    server = start_server("--adapter", f"given={MODEL}:{directory}")
    own = Stubs(server.address)
    expected = generate(stubs, adapter=common_pb2.AdapterSelector(name=trained), max_tokens=24).token_ids()
    reply = generate(own, adapter=common_pb2.AdapterSelector(name="given"), max_tokens=24)
    assert reply.token_ids() == expected
    wait_for(lambda: server.metric("whet_adapter_info", model=MODEL, adapter="given") == 1.0)
    os.kill(server.worker_pid(), signal.SIGSTOP)  # busy for longer than a scrape waits
    try:
        assert server.metric("whet_adapter_info", model=MODEL, adapter="given") == 1.0
    finally:
        os.kill(server.worker_pid(), signal.SIGCONT)
    own.close()


def test_recurrent_states_are_planned_with_the_blocks_and_told(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """GetModel and the metrics tell a hybrid's slots and bytes; both kinds fit into what was given, and every slot is
    back once its request has ended."""
    path = save_tiny_tokenizer(save_tiny_hybrid(tmp_path / "hybrid"))
    server = start_server("--kv-cache-bytes", "1MiB", models=["--model", f"hybrid={path}"])
    with Client(server.address) as client:
        info = client.model("hybrid")
        assert info.num_slots is not None
        assert info.num_slots > 2
        assert info.state_bytes is not None
        assert info.kv_cache_bytes is not None
        assert info.state_bytes % info.num_slots == 0
        assert 0 < info.state_bytes <= 1 << 19
        assert info.state_bytes + info.kv_cache_bytes <= 1 << 20
        reply = client.complete("Once upon a time", model="hybrid", max_tokens=4, ignore_eos=True)
        assert reply.usage.completion_tokens == 4
    labels = {"model": "hybrid", "num_slots": str(info.num_slots), "num_blocks": str(info.num_blocks)}
    assert server.metric("whet_cache_config_info", **labels) == 1.0
    wait_for(lambda: server.metric("whet_state_slots_used", model="hybrid") == 0.0)
