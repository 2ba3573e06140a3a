"""Jobs as the front end sees them: started on a worker, followed to their one terminal event, outliving the worker
where they can."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Callable

from engine.errors import AlreadyExistsError, CancelledError, EngineError, NotFoundError
from engine.jobs import (
    TERMINAL_EVENTS,
    JobEvent,
    JobFailed,
    JobSpec,
    JobWarning,
    MergeFinished,
    MergeSpec,
    QuantizeFinished,
    QuantizeSpec,
    TrainCheckpoint,
    TrainPublished,
    TrainSpec,
)
from server.workers.deployment import Deployment
from server.workers.messages import CancelJob, StartJob, Tagged
from server.workers.replica import Job, WorkerLostError
from server.workers.routing import Router

logger = logging.getLogger(__name__)

MAX_FRUITLESS_RESTARTS = 3
"""Restarts of a training run without a checkpoint between them; after that the run is what kills its worker."""


class Jobs:
    """All jobs in flight."""

    def __init__(self, router: Router, deployment: Deployment) -> None:
        self._router = router
        self._deployment = deployment
        self._jobs: dict[str, Job] = {}
        self._detached: set[asyncio.Task[None]] = set()
        self._cancel_ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._jobs)

    async def run(self, spec: JobSpec) -> AsyncGenerator[JobEvent, None]:
        """Starts a job and yields its events; the last one is terminal. Closing cancels the job.

        Raises:
            EngineError: the job was not accepted.
        """
        job = self._enter(spec)
        try:
            await self._start(job)
            async for event in self._events(job):
                yield event
        finally:
            self._leave(job)

    async def start(self, spec: JobSpec, on_event: Callable[[JobEvent], None]) -> None:
        """Starts a job that runs on by itself; returns once a worker has accepted it.

        Args:
            on_event: gets every event, the last one terminal.
        Raises:
            EngineError: the job was not accepted.
        """
        job = self._enter(spec)
        try:
            await self._start(job)
        except BaseException:
            self._leave(job)
            raise
        task = asyncio.create_task(self._follow(job, on_event), name=f"job-{spec.job_id}")
        self._detached.add(task)
        task.add_done_callback(self._detached.discard)

    async def cancel(self, job_id: str) -> None:
        """Cancels a job, which then ends with JobFailed("cancelled").

        Raises:
            NotFoundError: there is no such job.
        """
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"there is no running job {job_id!r}", field="job_id")
        job.cancelled = True
        if job.starting is not None and not job.starting.done():
            job.starting.cancel()
        elif job.replica is not None:
            # It may have ended just now, or be gone with its worker: either way its terminal event is on the way.
            with contextlib.suppress(NotFoundError, WorkerLostError):
                await job.replica.call(type(None), lambda call: CancelJob(call_id=call, job_id=job_id))

    async def finish(self) -> None:
        """Waits for the detached jobs to deliver their last events. For the end of a drain."""
        if self._detached:
            await asyncio.wait(self._detached)

    # ----------------------------------------------------------------------------------------------------- lifetime

    def _enter(self, spec: JobSpec) -> Job:
        if spec.job_id in self._jobs:
            raise AlreadyExistsError(f"job {spec.job_id!r} is already running", field="job_id")
        job = self._jobs[spec.job_id] = Job(spec)
        return job

    async def _start(self, job: Job) -> None:
        """Places the job on a worker, however long that takes.

        Raises:
            EngineError: the worker's refusal, or CancelledError if the caller cancelled the job meanwhile.
        """
        job.starting = asyncio.ensure_future(self._place(job))
        try:
            await job.starting
        except asyncio.CancelledError:
            if not job.cancelled:
                raise
            raise CancelledError("the job was cancelled") from None
        finally:
            job.starting = None

    async def _place(self, job: Job) -> None:
        spec = job.spec
        if isinstance(spec, QuantizeSpec | MergeSpec):
            # The result is loaded from here: on every worker, each of which first says that it will be busy.
            spec = dataclasses.replace(spec, load=False)
        replica = await self._router.acquire(spec.model)
        job.replica = replica
        replica.jobs[spec.job_id] = job
        try:
            await replica.call(type(None), lambda call: StartJob(call_id=call, job=Tagged.of(spec)))
        except EngineError:
            replica.jobs.pop(spec.job_id, None)
            job.replica = None
            raise

    def _leave(self, job: Job) -> None:
        """Forgets the job, and cancels it where it still runs."""
        self._jobs.pop(job.spec.job_id, None)
        if job.replica is not None and job.replica.jobs.pop(job.spec.job_id, None) is not None:
            # Nobody waits for the reply: call ids below zero are never given out.
            job.replica.send(CancelJob(call_id=-next(self._cancel_ids), job_id=job.spec.job_id))

    async def _follow(self, job: Job, on_event: Callable[[JobEvent], None]) -> None:
        try:
            async for event in self._events(job):
                on_event(event)
        except Exception:
            logger.exception("the events of job %s could not be handled; it is cancelled", job.spec.job_id)
        finally:
            self._leave(job)

    # ------------------------------------------------------------------------------------------------------- events

    async def _events(self, job: Job) -> AsyncGenerator[JobEvent, None]:
        fruitless = 0
        step: int | None = None
        while True:
            item = await job.mailbox.get()
            if isinstance(item, WorkerLostError):
                fruitless += 1
                if job.cancelled or fruitless > MAX_FRUITLESS_RESTARTS or not isinstance(job.spec, TrainSpec):
                    yield self._lost(job, item)
                    return
                logger.warning("training run %s waits for a worker: %s", job.spec.job_id, item.message)
                failed = await self._restart(job)
                if failed is not None:
                    yield failed
                    return
                yield JobWarning(
                    job_id=job.spec.job_id,
                    step=step,
                    reason="WORKER_RESTARTED",
                    message=f"{item.message}; the run goes on from its last checkpoint",
                )
                continue
            if isinstance(item, TrainCheckpoint):
                fruitless, step = 0, item.step
            ended = isinstance(item, TERMINAL_EVENTS)
            if ended and job.replica is not None:
                job.replica.jobs.pop(job.spec.job_id, None)
                job.replica = None
            warning = await self._propagate(job, item)
            if warning is not None:
                yield warning
            yield item
            if ended:
                return

    async def _restart(self, job: Job) -> JobFailed | None:
        """Starts a lost run again; a returned event says why it cannot be."""
        try:
            await self._start(job)
        except WorkerLostError:
            return None  # once more; the mailbox says so as well
        except EngineError as error:
            return _failed(job, error.code, error.message, error.reason, error.field)
        return None

    def _lost(self, job: Job, lost: WorkerLostError) -> JobFailed:
        if job.cancelled:
            return _failed(job, "cancelled", "the job was cancelled", "CANCELLED")
        return _failed(job, lost.code, lost.message, lost.reason)

    async def _propagate(self, job: Job, event: JobEvent) -> JobWarning | None:
        """Carries what a job changed on its worker to the others, before anybody hears of it."""
        try:
            if isinstance(event, TrainPublished):
                await self._deployment.published(job.spec.model, event.adapter, event.version, by=job.replica)
            elif isinstance(event, QuantizeFinished | MergeFinished) and _loads_result(job.spec):
                await self._deployment.load_model(event.output_name, event.output_dir)
        except EngineError as error:
            logger.error("job %s: not every worker could follow: %s", job.spec.job_id, error.message)
            return JobWarning(job_id=job.spec.job_id, step=None, reason=error.reason, message=error.message)
        return None


def _loads_result(spec: JobSpec) -> bool:
    if isinstance(spec, MergeSpec):
        return spec.load
    return isinstance(spec, QuantizeSpec) and spec.load and not spec.dry_run


def _failed(job: Job, code: str, message: str, reason: str, field: str = "") -> JobFailed:
    return JobFailed(
        job_id=job.spec.job_id, error_code=code, error_message=message, error_reason=reason, error_field=field
    )
