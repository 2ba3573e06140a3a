"""What clients change about stored adapters: their names, which versions stay, and new ones made of several."""

from __future__ import annotations

from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.info import AdapterInfo
from engine.names import validate_name
from server import convert
from server.adapter_retention import AdapterRetention
from server.run_manager import RunManager
from server.services.base import Services
from whet.v1 import model_pb2


class AdapterChanges:
    """Serves RenameAdapter, PruneAdapterVersions and CombineAdapters."""

    def __init__(self, services: Services, runs: RunManager, retention: AdapterRetention) -> None:
        self._services = services
        self._runs = runs
        self._retention = retention

    async def rename(self, request: model_pb2.RenameAdapterRequest) -> list[AdapterInfo]:
        """Renames; returns the versions under their new name."""
        with self._services.working_on(request.model) as model:
            name = validate_name(request.name, "name")
            new_name = validate_name(request.new_name, "new_name")
            for field, each in (("name", name), ("new_name", new_name)):
                run_id = self._runs.run_with(model.name, each)
                if run_id is not None:
                    raise FailedPreconditionError(
                        f"{field} is {each!r}, with which run {run_id} works; wait for it or cancel it",
                        field=field,
                        reason="ADAPTER_BUSY",
                    )
            await self._services.pool.rename_adapter(model.name, name, new_name)
            return [info for info in await self._services.pool.adapters(model.name) if info.name == new_name]

    async def prune(self, request: model_pb2.PruneAdapterVersionsRequest) -> list[AdapterInfo]:
        """Deletes versions that nothing needs; returns them."""
        with self._services.working_on(request.model) as model:
            name = validate_name(request.name, "name") if request.name else None
            if not request.HasField("keep_last"):
                raise InvalidArgumentError("keep_last is not set; accepted: 0 or more", field="keep_last")
            keep_last = convert.integer(request.keep_last, "keep_last", 0)
            return await self._retention.prune(model.name, name, keep_last, dry_run=request.dry_run)

    async def combine(self, request: model_pb2.CombineAdaptersRequest) -> AdapterInfo:
        """Makes a new version of several adapters."""
        with self._services.working_on(request.model) as model:
            name = validate_name(request.name, "name")
            sources = convert.from_weighted_adapters(request.sources, "sources")
            method = convert.from_enum(request.method, convert.COMBINATION_METHODS, "cat", "method")
            info = await self._services.pool.combine_adapters(
                model.name,
                name,
                sources,
                method,
                force=request.force,
                max_rank=self._services.config.max_lora_rank,
            )
            await self._retention.published(model.name, name)
            return info
