"""ModelService: models and adapters by name."""

from __future__ import annotations

import asyncio
import re
import shutil
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

from engine.errors import FormatError, InvalidArgumentError, NotFoundError
from engine.info import AdapterInfo
from engine.names import validate_name
from server import convert
from server.adapter_changes import AdapterChanges
from server.adapter_retention import AdapterRetention
from server.errors import over_limit
from server.merging import Merging
from server.models import ModelEntry, ReadyModel
from server.rpc import Context, current_call, new_request_id
from server.run_manager import RunManager
from server.services.base import Services, decode_page_token, encode_page_token
from server.threads import in_thread
from server.uploads import ADAPTER_FILES, Upload
from whet.v1 import common_pb2, model_pb2, model_pb2_grpc

CHUNK_BYTES = 1 << 19
MAX_CHUNK_BYTES = 1 << 20
KEPT_IMPORTS = 256
_VERSION = re.compile(r"[0-9]{1,10}")


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """The models and adapters that the server knows."""

    def __init__(self, services: Services, runs: RunManager, retention: AdapterRetention, staging_dir: Path) -> None:
        self._services = services
        self._runs = runs
        self._retention = retention
        self._changes = AdapterChanges(services, runs, retention)
        self._merging = Merging(services)
        self._staging_dir = staging_dir
        self._imports: OrderedDict[str, tuple[bytes, asyncio.Task[model_pb2.Adapter]]] = OrderedDict()
        self._publishing: set[asyncio.Task[model_pb2.Adapter]] = set()
        self._import_locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    # ------------------------------------------------------------------------------------------------------- models

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """All known models, by name; see the proto file."""
        size = self._services.page_size(request.page_size)
        after = decode_page_token(request.page_token) or ""
        await self._services.models.refresh()
        entries = [entry for entry in self._services.models.entries() if entry.name > after]
        page = entries[:size]
        token = encode_page_token(page[-1].name) if len(entries) > size else ""
        return model_pb2.ListModelsResponse(models=[self._to_model(entry) for entry in page], next_page_token=token)

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """One known model; see the proto file."""
        await self._services.models.refresh()
        return model_pb2.GetModelResponse(model=self._to_model(self._services.models.get(request.name, "name")))

    async def LoadModel(self, request: model_pb2.LoadModelRequest, context: Context) -> model_pb2.LoadModelResponse:
        """Loads a known model; see the proto file."""
        with self._services.admission.reserve():
            await self._services.models.refresh()
            entry = self._services.models.get(request.name, "name")
            await self._services.models.load(entry.name)
            return model_pb2.LoadModelResponse(model=self._to_model(entry))

    async def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: Context
    ) -> model_pb2.UnloadModelResponse:
        """Frees a model's memory; see the proto file."""
        with self._services.admission.reserve():
            entry = self._services.models.get(request.name, "name")
            if request.force:
                for run_id in self._runs.live_of(entry.name):
                    await self._runs.cancel(run_id)
            await self._services.models.unload(entry.name, force=request.force)
            return model_pb2.UnloadModelResponse(model=self._to_model(entry))

    # ----------------------------------------------------------------------------------------------------- adapters

    async def ListAdapters(
        self, request: model_pb2.ListAdaptersRequest, context: Context
    ) -> model_pb2.ListAdaptersResponse:
        """Every version of every adapter; see the proto file."""
        size = self._services.page_size(request.page_size)
        cursor = decode_page_token(request.page_token)
        after = _cursor_key(cursor) if cursor is not None else None
        if request.name:
            validate_name(request.name, "name")
        adapters = sorted(await self._adapters(request.model), key=_sort_key)
        chosen = [
            info
            for info in adapters
            if (not request.name or info.name == request.name)
            and (info.live or not request.live_only)
            and (after is None or _sort_key(info) > after)
        ]
        page = chosen[:size]
        token = ""
        if len(chosen) > size:
            last = page[-1]
            token = encode_page_token(f"{last.model}/{last.name}/{last.version}")
        return model_pb2.ListAdaptersResponse(
            adapters=[convert.to_adapter(info) for info in page], next_page_token=token
        )

    async def GetAdapter(self, request: model_pb2.GetAdapterRequest, context: Context) -> model_pb2.GetAdapterResponse:
        """One version of an adapter; see the proto file."""
        version = request.version if request.HasField("version") else None
        info = await self._adapter(request.model, request.name, version)
        return model_pb2.GetAdapterResponse(adapter=convert.to_adapter(info))

    async def LoadAdapter(
        self, request: model_pb2.LoadAdapterRequest, context: Context
    ) -> model_pb2.LoadAdapterResponse:
        """Makes a stored version the live one; see the proto file."""
        with self._services.working_on(request.model) as model:
            version = _version(request)
            name = validate_name(request.name, "name")
            info = await self._services.pool.load_adapter_version(model.name, name, version, force=request.force)
            return model_pb2.LoadAdapterResponse(adapter=convert.to_adapter(info))

    async def UnloadAdapter(
        self, request: model_pb2.UnloadAdapterRequest, context: Context
    ) -> model_pb2.UnloadAdapterResponse:
        """Frees an adapter's memory; see the proto file."""
        with self._services.working_on(request.model) as model:
            version = _version(request)
            name = validate_name(request.name, "name")
            before = await self._versions(model.name, name, version)
            loaded = [info for info in before if info.loaded]
            if version is not None:
                others = [info.version for info in await self._versions(model.name, name, None) if info.loaded]
                if set(others) - {version}:
                    raise InvalidArgumentError(
                        f"version is {version}, but versions {sorted(others)} of {name!r} are in memory and are "
                        "unloaded together; accepted: no version",
                        field="version",
                    )
            if loaded:
                await self._services.pool.unload_adapter(model.name, name)
            after = {info.version: info for info in await self._adapters(model.name) if info.name == name}
            return model_pb2.UnloadAdapterResponse(
                adapters=[convert.to_adapter(after.get(info.version, info)) for info in loaded]
            )

    async def DeleteAdapter(
        self, request: model_pb2.DeleteAdapterRequest, context: Context
    ) -> model_pb2.DeleteAdapterResponse:
        """Removes an adapter or one version; see the proto file."""
        with self._services.working_on(request.model) as model:
            version = _version(request)
            name = validate_name(request.name, "name")
            deleted = await self._versions(model.name, name, version)
            await self._services.pool.delete_adapter(model.name, name, version)
            return model_pb2.DeleteAdapterResponse(adapters=[convert.to_adapter(info) for info in deleted])

    async def RenameAdapter(
        self, request: model_pb2.RenameAdapterRequest, context: Context
    ) -> model_pb2.RenameAdapterResponse:
        """Gives an adapter another name; see the proto file."""
        renamed = await self._changes.rename(request)
        return model_pb2.RenameAdapterResponse(adapters=[convert.to_adapter(info) for info in renamed])

    async def PruneAdapterVersions(
        self, request: model_pb2.PruneAdapterVersionsRequest, context: Context
    ) -> model_pb2.PruneAdapterVersionsResponse:
        """Deletes versions that nothing needs; see the proto file."""
        pruned = await self._changes.prune(request)
        return model_pb2.PruneAdapterVersionsResponse(adapters=[convert.to_adapter(info) for info in pruned])

    async def CombineAdapters(
        self, request: model_pb2.CombineAdaptersRequest, context: Context
    ) -> model_pb2.CombineAdaptersResponse:
        """Makes a new version of several adapters; see the proto file."""
        return model_pb2.CombineAdaptersResponse(adapter=convert.to_adapter(await self._changes.combine(request)))

    async def MergeAdapter(
        self, request: model_pb2.MergeAdapterRequest, context: Context
    ) -> AsyncIterator[model_pb2.MergeAdapterResponse]:
        """Writes a model with adapters merged in; see the proto file."""
        async with aclosing(self._merging.merge(request)) as responses:
            async for response in responses:
                yield response

    async def ImportAdapter(
        self, request_iterator: AsyncIterator[model_pb2.ImportAdapterRequest], context: Context
    ) -> model_pb2.ImportAdapterResponse:
        """Takes an upload as a new version; see the proto file."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("payload") != "header":
            raise InvalidArgumentError("the first message is no header; accepted: header, then chunks", field="header")
        header = first.header
        call = current_call()
        call.adopt_request_id(header.request_id)
        # Of two calls with one id the second waits for the first one's upload; if that fails, its own is taken.
        lock = self._import_locks.setdefault(call.request_id, asyncio.Lock())
        async with lock:
            publishing = self._earlier_import(header)
            if publishing is not None:
                adapter = await asyncio.shield(publishing)
            else:
                adapter = await self._import(header, request_iterator)
        return model_pb2.ImportAdapterResponse(adapter=adapter)

    def _earlier_import(self, header: model_pb2.ImportAdapterHeader) -> asyncio.Task[model_pb2.Adapter] | None:
        """The import of the same request id, done or being done."""
        if header.request_id not in self._imports:
            return None
        earlier, publishing = self._imports[header.request_id]
        if earlier != header.SerializeToString(deterministic=True):
            raise InvalidArgumentError(
                f"request_id {header.request_id!r} was used for another upload; accepted: one id per upload",
                field="header.request_id",
                reason="REQUEST_ID_REUSED",
            )
        return publishing

    async def _import(
        self, header: model_pb2.ImportAdapterHeader, messages: AsyncIterator[model_pb2.ImportAdapterRequest]
    ) -> model_pb2.Adapter:
        """Takes the files and publishes them; once that has begun it goes on when the caller leaves."""
        with self._services.working_on(header.model) as model:
            name = validate_name(header.name, "header.name")
            upload = Upload(
                self._staging_dir / new_request_id(),
                {info.name: info.size_bytes for info in header.files},
                len(header.files),
                self._services.config.max_upload_bytes,
            )
            try:
                await in_thread(upload.open)
                async for message in messages:
                    if message.WhichOneof("payload") != "chunk":
                        raise InvalidArgumentError(
                            "a message is no chunk; accepted: one header, then chunks", field="chunk"
                        )
                    if len(message.chunk.data) > MAX_CHUNK_BYTES:
                        raise over_limit("chunk.data", len(message.chunk.data), MAX_CHUNK_BYTES, "bytes")
                    await in_thread(upload.write, message.chunk.name, message.chunk.data)
                await in_thread(upload.finish)
            except BaseException:
                await asyncio.to_thread(shutil.rmtree, upload.directory, ignore_errors=True)
                raise
            finally:
                upload.close()
            publishing = asyncio.create_task(self._publish(model, name, upload.directory, header.force))
            self._publishing.add(publishing)
            publishing.add_done_callback(self._publishing.discard)
            if header.request_id:
                self._remember_import(header, publishing)
            return await asyncio.shield(publishing)

    async def _publish(self, model: ReadyModel, name: str, directory: Path, force: bool) -> model_pb2.Adapter:
        try:
            with model.entry.use():
                info = await self._services.pool.import_adapter(model.name, name, directory, force=force)
                await self._retention.published(model.name, name)
                return convert.to_adapter(info)
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    def _remember_import(
        self, header: model_pb2.ImportAdapterHeader, publishing: asyncio.Task[model_pb2.Adapter]
    ) -> None:
        key = header.request_id
        self._imports[key] = (header.SerializeToString(deterministic=True), publishing)
        if len(self._imports) > KEPT_IMPORTS:
            self._imports.popitem(last=False)

        def ended(task: asyncio.Task[model_pb2.Adapter]) -> None:
            if (task.cancelled() or task.exception() is not None) and self._imports.get(key, (b"", None))[1] is task:
                del self._imports[key]  # it can be tried again

        publishing.add_done_callback(ended)

    async def ExportAdapter(
        self, request: model_pb2.ExportAdapterRequest, context: Context
    ) -> AsyncIterator[model_pb2.ExportAdapterResponse]:
        """Sends an adapter's files; see the proto file."""
        with self._services.working_on(request.model) as model:
            info = await self._adapter(model.name, request.name, _version(request))
            directory = Path(await self._services.pool.adapter_path(model.name, info.name, info.version))
            files = await asyncio.to_thread(_open_files, directory)
            try:
                sizes = {name: _size(file) for name, file in files.items()}
                yield model_pb2.ExportAdapterResponse(
                    header=model_pb2.ExportAdapterHeader(
                        request_id=current_call().request_id,
                        adapter=convert.to_adapter(info),
                        files=[common_pb2.FileInfo(name=name, size_bytes=size) for name, size in sizes.items()],
                    )
                )
                for name, file in files.items():
                    while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                        yield model_pb2.ExportAdapterResponse(chunk=common_pb2.FileChunk(name=name, data=data))
                yield model_pb2.ExportAdapterResponse(
                    finished=model_pb2.ExportAdapterFinished(num_bytes=sum(sizes.values()))
                )
            finally:
                for file in files.values():
                    file.close()

    # ------------------------------------------------------------------------------------------------------ helpers

    def _to_model(self, entry: ModelEntry) -> model_pb2.Model:
        """A model as it stands; one that is loaded but has no worker that is well is not ready."""
        state, error = entry.state, entry.error
        if state == "ready" and self._services.admission.state == "open" and not self._services.pool.serves(entry.name):
            state, error = "failed", "no worker serves it at present"
        template = entry.tokenizer.has_chat_template if entry.tokenizer is not None else None
        return convert.to_model(entry.name, state, error, entry.info, template)

    async def _adapters(self, model: str) -> list[AdapterInfo]:
        """Of one model, or of all for ""."""
        self._services.admission.check_serving()
        if model:
            self._services.models.ready(model)
        elif not self._services.pool.models():
            return []
        return await self._services.pool.adapters(model or None)

    async def _versions(self, model: str, name: str, version: int | None) -> list[AdapterInfo]:
        """The versions of an adapter; NotFoundError if there is none."""
        validate_name(name, "name")
        found = [info for info in await self._adapters(model) if info.name == name]
        chosen = [info for info in found if version is None or info.version == version]
        if chosen:
            return chosen
        if found:
            known = ", ".join(str(info.version) for info in found)
            raise NotFoundError(
                f"adapter {name!r} of model {model!r} has no version {version}; it has {known}",
                field="version",
                reason="ADAPTER_VERSION_NOT_FOUND",
            )
        raise NotFoundError(f"model {model!r} has no adapter {name!r}", field="name", reason="ADAPTER_NOT_FOUND")

    async def _adapter(self, model: str, name: str, version: int | None) -> AdapterInfo:
        """One version; None: the live one."""
        self._services.models.get(model)
        versions = await self._versions(model, name, version)
        if version is not None:
            return versions[0]
        live = next((info for info in versions if info.live), None)
        if live is None:
            raise NotFoundError(
                f"adapter {name!r} of model {model!r} has no live version; LoadAdapter makes one live",
                field="name",
                reason="ADAPTER_NOT_LIVE",
            )
        return live


def _version(
    request: model_pb2.LoadAdapterRequest
    | model_pb2.UnloadAdapterRequest
    | model_pb2.DeleteAdapterRequest
    | model_pb2.ExportAdapterRequest,
) -> int | None:
    return convert.integer(request.version, "version", 0) if request.HasField("version") else None


def _sort_key(info: AdapterInfo) -> tuple[str, str, int]:
    return info.model, info.name, info.version


def _cursor_key(cursor: str) -> tuple[str, str, int]:
    parts = cursor.split("/")
    if len(parts) != 3 or not _VERSION.fullmatch(parts[2]):
        raise InvalidArgumentError(
            "page_token is of another list; accepted: the next_page_token of an earlier reply", field="page_token"
        )
    return parts[0], parts[1], int(parts[2])


def _open_files(directory: Path) -> dict[str, BinaryIO]:
    """The files of a PEFT directory, all open before any is sent: a delete meanwhile does no harm."""
    files: dict[str, BinaryIO] = {}
    try:
        for name in ADAPTER_FILES:
            files[name] = (directory / name).open("rb")
    except OSError as error:
        for file in files.values():
            file.close()
        raise FormatError(f"the stored adapter is incomplete: {error.strerror}") from None
    return files


def _size(file: BinaryIO) -> int:
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    return size
