"""The worker pool: everything the front end asks of the engine, over one worker per device.

    pool = WorkerPool(EngineConfig(), devices=["cpu"], models={"smollm2": Path("SmolLM2-135M-Instruct.Q4_1.gguf")})
    await pool.start()
    await pool.wait_loaded()
    async with contextlib.aclosing(pool.generate(request)) as outputs:
        async for batch in outputs: ...
    await pool.stop()

A worker that dies takes only its own work with it. It is restarted and gets its models and adapters back; streams that
had begun end with UnavailableError; requests that had brought nothing yet start over, unseen; training runs resume from
their last checkpoint. Free of torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import EngineConfig
from engine.errors import AlreadyExistsError, EngineError
from engine.info import AdapterInfo, EngineStats, ModelInfo
from engine.jobs import JobEvent, JobSpec, WeightedAdapter
from engine.request import Request, RequestOutput
from server.workers.deployment import Deployment
from server.workers.heartbeat import HEARTBEAT_SUFFIX
from server.workers.jobs import Jobs
from server.workers.link import Link
from server.workers.messages import (
    Abort,
    AdapterPath,
    AddRequest,
    AnyReport,
    CheckpointJobs,
    ListAdapters,
)
from server.workers.replica import Replica, State, Stream, SupervisionConfig, WorkerLostError
from server.workers.routing import Router

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Workers that one request may see die before its first output; after that it may well be what kills them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker at one moment.

    Attributes:
        worker: its index, as a label.
        up: it answers, beats, and its loop goes round or is at long work that it announced.
        heartbeat_age_seconds: since its loop last went round, whatever its process tells; None before the first time.
        restarts: since the pool was made.
        busy: what keeps it from its loop ("loading model x"); "" for nothing.
        models: names that it serves.
        stats: gauges as last heard, counters over all its lives, observations since the last snapshot.
    """

    worker: str
    device: str
    state: State
    up: bool
    heartbeat_age_seconds: float | None
    restarts: int
    busy: str
    pid: int | None
    models: list[str]
    num_streams: int
    num_jobs: int
    stats: EngineStats


class WorkerPool:
    """Worker processes and the work they are doing.

    Args:
        engine_config: of every worker, but for the device.
        devices: one worker each, such as ["cuda:0", "cuda:1"]; the same device may come twice.
        models: name to path of the models to load at start-up.
        adapters: adapter name to (model, PEFT directory), to load with the models.
        force_adapters: also those of them that were trained on other base weights.
        supervision: timeouts and restarts.
        stream_interval_seconds: least time between two messages of the workers' outputs; see OutputSender.
        log_level, log_format: of the workers' logs, which go to the same standard error.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        *,
        devices: Sequence[str],
        models: Mapping[str, Path],
        adapters: Mapping[str, tuple[str, Path]] | None = None,
        force_adapters: bool = False,
        supervision: SupervisionConfig | None = None,
        stream_interval_seconds: float = 0.0,
        log_level: str = "info",
        log_format: Literal["json", "text"] = "text",
    ) -> None:
        if not devices:
            raise ValueError("devices is empty; accepted: at least one")
        self._engine_config = engine_config
        self._devices = list(devices)
        self._supervision = supervision or SupervisionConfig()
        self._stream_interval_seconds = stream_interval_seconds
        self._log_level = log_level
        self._log_format = log_format
        self._router = Router()
        self._deployment = Deployment(self._router, models, adapters or {}, force_adapters=force_adapters)
        self._jobs = Jobs(self._router, self._deployment)
        self._link: Link | None = None

    # ----------------------------------------------------------------------------------------------------- lifetime

    async def start(self) -> None:
        """Starts the workers; returns when their engines stand. Models load afterwards: see wait_loaded.

        Raises:
            EngineError: a worker cannot start; the pool is stopped again.
        """
        self._link = link = Link(self._receive)
        for index, device in enumerate(self._devices):
            self._router.replicas.append(
                Replica(
                    index,
                    dataclasses.replace(self._engine_config, device=device),
                    self._supervision,
                    link,
                    restore=self._deployment.restore,
                    changed=self._router.notify,
                    stream_interval_seconds=self._stream_interval_seconds,
                    log_level=self._log_level,
                    log_format=self._log_format,
                )
            )
        starts = await asyncio.gather(*(replica.start() for replica in self._router.replicas), return_exceptions=True)
        if failures := [outcome for outcome in starts if isinstance(outcome, BaseException)]:
            await self.stop()
            raise failures[0]

    async def wait_loaded(self) -> None:
        """Waits until every worker holds the models and adapters that the pool was configured with.

        Raises:
            EngineError: why one cannot be loaded.
        """
        await self._deployment.wait_loaded()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuses new work, has training runs checkpoint and end, lets all else finish, then ends the workers.

        Args:
            drain_seconds: for all of that; what is left then ends with UnavailableError, and a worker that does not
                end within another second is killed.
        """
        deadline = time.monotonic() + drain_seconds
        self._router.draining = True
        self._router.notify()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + drain_seconds):
                await self.checkpoint_jobs()
        except TimeoutError:
            logger.error("jobs did not checkpoint within %g s; they end as they are", drain_seconds)
        except EngineError as error:
            logger.error("jobs could not be ended in order: %s", error.message)
        while (self.num_streams or self.num_jobs) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        patience = min(self._supervision.stop_timeout_seconds, max(1.0, deadline - time.monotonic()))
        await asyncio.gather(*(replica.stop(patience) for replica in self._router.replicas))
        await self._jobs.finish()
        if self._link is not None:
            await self._link.close()
            self._link = None

    def abandon(self) -> None:
        """Leaves no file behind, for a process that ends at once. Workers end with the pipe to it."""
        if self._link is not None:
            self._link.remove_directory()

    def _receive(self, identity: str, report: AnyReport) -> bool:
        sender = identity.removesuffix(HEARTBEAT_SUFFIX)
        for replica in self._router.replicas:
            if replica.identity == sender:
                replica.handle(report)
                return True
        return False

    # --------------------------------------------------------------------------------------------------- generation

    async def generate(self, request: Request) -> AsyncGenerator[list[RequestOutput], None]:
        """Yields what each step brought, until every completion has its finish reason.

        Close the generator (contextlib.aclosing) or cancel its task to abort the request in the worker. Several steps
        come as one list where the consumer is slower than the engine. No output with finish_reason "error" is
        yielded; it is raised.

        Raises:
            EngineError: the engine refused the request, or could not go on with it.
            UnavailableError: its worker died after the first output, or the pool is draining.
        """
        if any(request.request_id in replica.streams for replica in self._router.replicas):
            raise AlreadyExistsError(f"request {request.request_id!r} is running", field="request_id")
        for attempt in range(1, MAX_ATTEMPTS + 1):
            replica = await self._router.acquire(request.model)
            stream = replica.streams[request.request_id] = Stream(request)
            begun = False
            try:
                replica.send(AddRequest(request=request))
                while True:
                    outputs = await stream.take()
                    begun = True
                    # Read before the consumer gets its turn: it may come back much later.
                    ended = stream.ended
                    yield outputs
                    if ended:
                        return
            except WorkerLostError:
                if begun or attempt == MAX_ATTEMPTS:
                    raise
                logger.warning(
                    "request %s starts over: its worker was lost before the first output", request.request_id
                )
            finally:
                if replica.streams.pop(request.request_id, None) is not None and stream.unfinished:
                    replica.send(Abort(request_id=request.request_id))

    def end_streams(self, model: str, error: EngineError) -> None:
        """Ends all requests for a model, in the workers at once; what has come of each is yielded first, then ``error``
        is raised. One that waits for a worker finds the model unloaded, or goes on."""
        for replica in self._router.replicas:
            for request_id, stream in list(replica.streams.items()):
                if stream.request.model == model:
                    del replica.streams[request_id]
                    if stream.unfinished:
                        replica.send(Abort(request_id=request_id))
                        stream.fail(error)

    def stop_completion(self, request_id: str, index: int) -> None:
        """Ends one completion of a running request with "stop": a stop string was found in its text.

        Its last output, with its timings, comes as all others do; unless its end is on the way already.
        """
        for replica in self._router.replicas:
            if request_id in replica.streams:
                replica.send(Abort(request_id=request_id, index=index, reason="stop"))

    # --------------------------------------------------------------------------------------------------------- jobs

    def run_job(self, spec: JobSpec) -> AsyncGenerator[JobEvent, None]:
        """Starts a job at the first iteration and yields its events, the last one terminal (JobFailed for a failure).

        Closing the generator cancels the job. A training run outlives its worker: it goes on from its last checkpoint
        after JobWarning("WORKER_RESTARTED"), with a second TrainStarted. Other jobs end with JobFailed("unavailable").

        Raises:
            EngineError: the job was not accepted.
        """
        return self._jobs.run(spec)

    async def start_job(self, spec: JobSpec, on_event: Callable[[JobEvent], None]) -> None:
        """Starts a job that runs on by itself; returns once a worker has accepted it.

        Args:
            on_event: gets every event, the last one terminal; if it raises, the job is cancelled.
        Raises:
            EngineError: the job was not accepted.
        """
        await self._jobs.start(spec, on_event)

    async def cancel_job(self, job_id: str) -> None:
        """Cancels a job, which then ends with JobFailed("cancelled").

        Raises:
            NotFoundError: there is no such job.
        """
        await self._jobs.cancel(job_id)

    async def checkpoint_jobs(self) -> None:
        """Ends training runs with a checkpoint to resume from. Their terminal events come first."""
        replicas = [replica for replica in self._router.replicas if replica.answers and replica.jobs]
        calls = (replica.call(type(None), lambda call: CheckpointJobs(call_id=call)) for replica in replicas)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLostError):
                raise outcome

    # ------------------------------------------------------------------------------------------- models and adapters

    def models(self) -> dict[str, ModelInfo]:
        """Every model that has been loaded, also while its worker restarts."""
        return dict(self._router.infos)

    def model(self, name: str) -> ModelInfo:
        """One model.

        Raises:
            NotFoundError: it is not loaded.
            UnavailableError: it is being loaded for the first time.
        """
        return self._router.info(name)

    def serves(self, model: str) -> bool:
        """Whether a request for the model could begin now: a worker holds it and is well."""
        return not self._router.draining and any(replica.is_well for replica in self._router.holding(model))

    async def load_model(self, name: str, path: str | Path) -> ModelInfo:
        """Loads a model on every worker, or on none, unless one holds it. Goes on if the caller is cancelled.

        Raises:
            AlreadyExistsError: the name is taken by another path.
            EngineError: why it cannot be loaded.
        """
        return await self._deployment.load_model(name, path)

    async def unload_model(self, name: str) -> None:
        """Unloads a model from every worker.

        Raises:
            NotFoundError: it is not loaded.
            FailedPreconditionError: requests or jobs are using it.
        """
        await self._deployment.unload_model(name)

    async def adapters(self, model: str | None = None) -> list[AdapterInfo]:
        """Every version of every adapter, of one model or of all."""
        replica = await (self._router.acquire_any() if model is None else self._router.acquire(model))
        return await replica.call(list[AdapterInfo], lambda call: ListAdapters(call_id=call, model=model))

    async def load_adapter(self, model: str, name: str, path: str | Path) -> AdapterInfo:
        """Loads a PEFT directory that the operator names."""
        return await self._deployment.load_adapter(model, name, str(path))

    async def load_adapter_version(
        self, model: str, name: str, version: int | None = None, *, force: bool = False
    ) -> AdapterInfo:
        """Makes a stored version the live one; None: the newest; force: also one of other base weights."""
        return await self._deployment.load_adapter(model, name, version, force=force)

    async def import_adapter(
        self, model: str, name: str, staged_dir: str | Path, *, force: bool = False
    ) -> AdapterInfo:
        """Checks an uploaded PEFT directory and publishes it as a new version; the directory is used up. force: also
        one of other base weights."""
        return await self._deployment.import_adapter(model, name, staged_dir, force=force)

    async def rename_adapter(self, model: str, name: str, new_name: str) -> None:
        """Gives an adapter another name. Requests in flight keep what they have."""
        await self._deployment.rename_adapter(model, name, new_name)

    async def prune_adapters(
        self, model: str, name: str | None, keep_last: int, keep: Collection[tuple[str, int]] = (), *, dry_run: bool
    ) -> list[AdapterInfo]:
        """Deletes versions that are not live, newest, in ``keep`` or in use; returns what was deleted, or would be."""
        return await self._deployment.prune_adapters(model, name, keep_last, keep, dry_run=dry_run)

    async def combine_adapters(
        self, model: str, name: str, sources: list[WeightedAdapter], method: str, *, force: bool, max_rank: int
    ) -> AdapterInfo:
        """Publishes a combination of adapters as a new version."""
        return await self._deployment.combine_adapters(model, name, sources, method, force=force, max_rank=max_rank)

    async def unload_adapter(self, model: str, name: str) -> None:
        """Drops an adapter from memory; it stays on disk. Requests in flight keep theirs."""
        await self._deployment.unload_adapter(model, name)

    async def delete_adapter(self, model: str, name: str, version: int | None = None) -> None:
        """Deletes a version, or all of them, from disk."""
        await self._deployment.delete_adapter(model, name, version)

    async def adapter_path(self, model: str, name: str, version: int | None = None) -> str:
        """The PEFT directory of a version; None: of the live one."""
        replica = await self._router.acquire(model)
        return await replica.call(str, lambda call: AdapterPath(call_id=call, model=model, name=name, version=version))

    # -------------------------------------------------------------------------------------------------- how it fares

    @property
    def num_jobs(self) -> int:
        """Jobs that workers are at."""
        return sum(len(replica.jobs) for replica in self._router.replicas)

    @property
    def num_streams(self) -> int:
        """Requests in flight."""
        return sum(len(replica.streams) for replica in self._router.replicas)

    @property
    def healthy(self) -> bool:
        """Whether every worker is up; one that loads models counts, one that hangs, restarts or stays down does not."""
        return bool(self._router.replicas) and all(replica.is_well for replica in self._router.replicas)

    def snapshot(self) -> list[WorkerSnapshot]:
        """All workers now. Call it every few seconds: observations are kept until it is called, and handed out once."""
        return [
            WorkerSnapshot(
                worker=str(replica.index),
                device=replica.device,
                state=replica.state,
                up=replica.is_well,
                heartbeat_age_seconds=None if replica.last_turn is None else time.monotonic() - replica.last_turn,
                restarts=replica.restarts,
                busy=replica.busy,
                pid=replica.process.pid if replica.process is not None else None,
                models=sorted(replica.models),
                num_streams=len(replica.streams),
                num_jobs=len(replica.jobs),
                stats=replica.stats.drain(),
            )
            for replica in self._router.replicas
        ]
