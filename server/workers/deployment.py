"""What is loaded: models and adapters, the same on every worker, and again on one that was restarted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import AlreadyExistsError, EngineError, FailedPreconditionError, NotFoundError
from engine.info import AdapterInfo, ModelInfo
from engine.jobs import WeightedAdapter
from engine.names import validate_name
from server.workers.messages import (
    AdaptersInUse,
    CombineAdapters,
    DeleteAdapter,
    ImportAdapter,
    ListAdapters,
    LoadAdapter,
    LoadAdapterVersion,
    LoadModel,
    PruneAdapters,
    RenameAdapter,
    UnloadAdapter,
    UnloadModel,
)
from server.workers.replica import Replica, WorkerLostError
from server.workers.routing import Router

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Deployment:
    """Loads and unloads on all workers alike.

    Every change runs to its end even if its caller goes away, so that the workers cannot come to differ.

    Args:
        models: name to path, loaded by every worker at its start.
        adapters: adapter name to (model, PEFT directory), loaded with the model.
        force_adapters: also those of them that were trained on other base weights.
    """

    def __init__(
        self,
        router: Router,
        models: Mapping[str, Path],
        adapters: Mapping[str, tuple[str, Path]],
        *,
        force_adapters: bool = False,
    ) -> None:
        self._router = router
        self._force_adapters = force_adapters
        self._paths = {name: str(path) for name, path in models.items()}
        self._adapters: dict[tuple[str, str], str | int] = {
            (model, name): str(path) for name, (model, path) in adapters.items()
        }
        self._changes = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        router.configured.update(self._paths)

    async def restore(self, replica: Replica) -> None:
        """Loads everything into a fresh worker. What fails is noted and left out; a death ends this at once."""
        tried: set[str] = set()
        while missing := [name for name in self._paths if name not in replica.models and name not in tried]:
            name = missing[0]
            tried.add(name)
            try:
                info = await self._load_with_adapters(replica, name, self._paths[name])
            except WorkerLostError:
                return
            except EngineError as error:
                logger.error("worker %d could not load model %s: %s", replica.index, name, error.message)
                replica.failures[name] = error
                self._router.notify()
                continue
            if name in self._paths:  # it may have been unloaded meanwhile
                self._serve(replica, info)

    async def _load_with_adapters(self, replica: Replica, name: str, path: str) -> ModelInfo:
        replica.loading.add(name)
        try:
            info = await replica.call(ModelInfo, lambda call: LoadModel(call_id=call, name=name, path=path))
            for (model, adapter), source in list(self._adapters.items()):
                if model == name:
                    await self._restore_adapter(replica, model, adapter, source)
            return info
        finally:
            replica.loading.discard(name)

    async def _restore_adapter(self, replica: Replica, model: str, name: str, source: str | int) -> None:
        try:
            await self._load_adapter(replica, model, name, source)
        except EngineError as error:
            # A fresh server refuses to start without an adapter it was told to load; one that is merely restarting a
            # worker goes on with what is there.
            if isinstance(error, WorkerLostError) or model not in self._router.infos:
                raise
            logger.error("worker %d could not load adapter %s: %s", replica.index, name, error.message)

    async def wait_loaded(self) -> None:
        """Waits until every worker holds what it was configured with.

        Raises:
            EngineError: the first that a worker met on the way.
        """
        while True:
            for replica in self._router.replicas:
                if replica.failures:
                    raise next(iter(replica.failures.values()))
            if all(replica.state in ("up", "failed", "stopped") for replica in self._router.replicas):
                await self._router.acquire_any()
                return
            await self._router.changed()

    # ------------------------------------------------------------------------------------------------------- models

    async def load_model(self, name: str, path: str | Path) -> ModelInfo:
        """Loads a model on every worker, or on none. One that no worker could load again after a restart is tried once
        more.

        Raises:
            AlreadyExistsError: the name is taken by another path.
            EngineError: a worker's own.
        """
        return await self._to_the_end(self._load(validate_name(name, "model"), str(path)))

    async def _load(self, name: str, path: str) -> ModelInfo:
        async with self._changes:
            self._router.refuse_if_draining()
            if self._paths.get(name, path) != path:
                raise AlreadyExistsError(f"model {name!r} is loaded, from {self._paths[name]}", field="model")
            known = self._router.infos.get(name)
            if known is not None and self._router.holding(name):
                return known
            await self._router.acquire_any()
            if known is not None and self._router.holding(name):
                return known
            replicas = [replica for replica in self._router.replicas if replica.answers]
            # From here on a worker that restarts loads it as well.
            self._paths[name] = path
            loads = (self._load_with_adapters(replica, name, path) for replica in replicas)
            results = await asyncio.gather(*loads, return_exceptions=True)
            loaded = [(r, info) for r, info in zip(replicas, results, strict=True) if isinstance(info, ModelInfo)]
            errors = [error for error in results if isinstance(error, BaseException)]
            refusals = [error for error in errors if not isinstance(error, WorkerLostError)]
            if known is not None:
                # It is to be served again, by as many workers as can; nothing is taken back.
                for replica, error in zip(replicas, results, strict=True):
                    if isinstance(error, EngineError) and not isinstance(error, WorkerLostError):
                        replica.failures[name] = error
                if not loaded:
                    self._router.notify()
                    raise (refusals or errors)[0]
            elif refusals or not loaded:
                del self._paths[name]
                for replica, _ in loaded:
                    replica.models.discard(name)
                    with contextlib.suppress(WorkerLostError):
                        await replica.call(type(None), lambda call: UnloadModel(call_id=call, name=name))
                raise (refusals or errors)[0]
            for replica, info in loaded:
                self._serve(replica, info)
            return self._router.infos[name]

    async def unload_model(self, name: str) -> None:
        """Unloads a model from every worker.

        Raises:
            NotFoundError: it is not loaded.
            FailedPreconditionError: requests or jobs are using it.
        """
        await self._to_the_end(self._unload(name))

    async def _unload(self, name: str) -> None:
        async with self._changes:
            info = self._router.info(name)
            for replica in self._router.replicas:
                requests = sum(stream.request.model == name for stream in replica.streams.values())
                jobs = sum(job.spec.model == name for job in replica.jobs.values())
                if requests or jobs:
                    raise FailedPreconditionError(
                        f"model {name!r} has {requests} running requests and {jobs} jobs; wait for them or cancel them",
                        field="model",
                        reason="MODEL_BUSY",
                    )
            path = self._paths.pop(name)
            del self._router.infos[name]  # no new request is accepted from here on
            configured = name in self._router.configured
            self._router.configured.discard(name)
            for replica in self._router.holding(name):
                try:
                    await replica.call(type(None), lambda call: UnloadModel(call_id=call, name=name))
                except WorkerLostError:
                    continue
                except EngineError:
                    self._paths[name], self._router.infos[name] = path, info
                    if configured:
                        self._router.configured.add(name)
                    self._router.notify()
                    raise
                replica.models.discard(name)
            for replica in self._router.replicas:
                replica.failures.pop(name, None)
            self._adapters = {key: source for key, source in self._adapters.items() if key[0] != name}
            self._router.notify()

    def _serve(self, replica: Replica, info: ModelInfo) -> None:
        replica.models.add(info.name)
        replica.failures.pop(info.name, None)
        self._router.infos[info.name] = info
        self._router.notify()

    # ----------------------------------------------------------------------------------------------------- adapters

    async def load_adapter(
        self, model: str, name: str, source: str | int | None, *, force: bool = False
    ) -> AdapterInfo:
        """Loads an adapter on every worker.

        Args:
            source: a PEFT directory that the operator names, a stored version, or None for the newest stored one.
            force: also a stored version that was trained on other base weights. The store remembers it, for the other
                workers as well.
        """

        async def change() -> AdapterInfo:
            replica = await self._router.acquire(model)
            info = await self._load_adapter(replica, model, name, source, force=force)
            await self.published(model, name, source if isinstance(source, str) else info.version, by=replica)
            return info

        return await self._changing(change)

    async def import_adapter(
        self, model: str, name: str, staged_dir: str | Path, *, force: bool = False
    ) -> AdapterInfo:
        """Publishes an uploaded adapter as a new version on every worker; the staged directory is used up."""

        async def change() -> AdapterInfo:
            replica = await self._router.acquire(model)
            info = await replica.call(
                AdapterInfo,
                lambda call: ImportAdapter(
                    call_id=call, model=model, name=name, staged_dir=str(staged_dir), force=force
                ),
            )
            await self.published(model, name, info.version, by=replica)
            return info

        return await self._changing(change)

    async def unload_adapter(self, model: str, name: str) -> None:
        """Drops an adapter from the memory of every worker."""

        async def change() -> None:
            first = await self._router.acquire(model)
            await first.call(type(None), lambda call: UnloadAdapter(call_id=call, model=model, name=name))
            await self._unload_adapter(model, name, but=first)

        await self._changing(change)

    async def delete_adapter(self, model: str, name: str, version: int | None) -> None:
        """Deletes a version of an adapter, or all of it, everywhere."""

        async def change() -> None:
            first = await self._router.acquire(model)
            await first.call(
                type(None), lambda call: DeleteAdapter(call_id=call, model=model, name=name, version=version)
            )
            # The workers share one directory: the others have nothing to delete, only to follow.
            infos = await first.call(list[AdapterInfo], lambda call: ListAdapters(call_id=call, model=model))
            live = next((info.version for info in infos if info.name == name and info.live and info.loaded), None)
            if live is None:
                await self._unload_adapter(model, name, but=first)
            elif not isinstance(self._adapters.get((model, name)), str):
                await self.published(model, name, live, by=first)

        await self._changing(change)

    async def rename_adapter(self, model: str, name: str, new_name: str) -> None:
        """Gives an adapter another name, everywhere."""

        async def change() -> None:
            first = await self._router.acquire(model)

            def command(on_disk: bool) -> Callable[[int], RenameAdapter]:
                return lambda call: RenameAdapter(
                    call_id=call, model=model, name=name, new_name=new_name, on_disk=on_disk
                )

            await first.call(type(None), command(True))
            source = self._adapters.pop((model, name), None)
            if source is not None:
                self._adapters[(model, new_name)] = source
            for replica in self._router.holding(model):
                if replica is not first:
                    with contextlib.suppress(WorkerLostError):  # its next life reads the new name
                        await replica.call(type(None), command(False))

        await self._changing(change)

    async def prune_adapters(
        self, model: str, name: str | None, keep_last: int, keep: Collection[tuple[str, int]], *, dry_run: bool
    ) -> list[AdapterInfo]:
        """Deletes the versions that nothing needs on any worker; see AdapterStore.prune."""

        async def change() -> list[AdapterInfo]:
            first = await self._router.acquire(model)
            needed = set(keep)
            for replica in self._router.holding(model):
                if replica is not first:
                    with contextlib.suppress(WorkerLostError):  # what it was at is lost as well, or starts over
                        needed |= set(
                            await replica.call(
                                list[tuple[str, int]], lambda call: AdaptersInUse(call_id=call, model=model)
                            )
                        )
            # What is live stays, so the others have nothing to follow.
            return await first.call(
                list[AdapterInfo],
                lambda call: PruneAdapters(
                    call_id=call, model=model, name=name, keep_last=keep_last, keep=sorted(needed), dry_run=dry_run
                ),
            )

        return await self._changing(change)

    async def combine_adapters(
        self, model: str, name: str, sources: list[WeightedAdapter], method: str, *, force: bool, max_rank: int
    ) -> AdapterInfo:
        """Publishes a combination of adapters as a new version on every worker."""

        async def change() -> AdapterInfo:
            replica = await self._router.acquire(model)
            info = await replica.call(
                AdapterInfo,
                lambda call: CombineAdapters(
                    call_id=call,
                    model=model,
                    name=name,
                    sources=sources,
                    method=method,
                    force=force,
                    max_rank=max_rank,
                ),
            )
            await self.published(model, name, info.version, by=replica)
            return info

        return await self._changing(change)

    async def published(self, model: str, name: str, source: str | int, by: Replica | None = None) -> None:
        """Makes an adapter that is live on one worker live on all others, and on those to come."""
        self._adapters[(model, name)] = source
        for replica in self._router.holding(model):
            if replica is by:
                continue
            with contextlib.suppress(WorkerLostError):  # its next life loads it
                await self._load_adapter(replica, model, name, source)

    async def _unload_adapter(self, model: str, name: str, but: Replica) -> None:
        self._adapters.pop((model, name), None)
        for replica in self._router.holding(model):
            if replica is not but:
                with contextlib.suppress(NotFoundError, WorkerLostError):
                    await replica.call(type(None), lambda call: UnloadAdapter(call_id=call, model=model, name=name))

    async def _changing(self, change: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def locked() -> T:
            async with self._changes:
                self._router.refuse_if_draining()
                return await change()

        return await self._to_the_end(locked())

    async def _to_the_end(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _load_adapter(
        self, replica: Replica, model: str, name: str, source: str | int | None, *, force: bool = False
    ) -> AdapterInfo:
        if isinstance(source, str):
            forced = force or self._force_adapters
            return await replica.call(
                AdapterInfo, lambda call: LoadAdapter(call_id=call, model=model, name=name, path=source, force=forced)
            )
        return await replica.call(
            AdapterInfo,
            lambda call: LoadAdapterVersion(call_id=call, model=model, name=name, version=source, force=force),
        )
