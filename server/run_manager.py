"""Training runs in progress: they go on without their callers, and whoever wants to watches them.

The archive is the one source of events. A watcher reads it up to its end, then waits to be told that there is more; so
it sees what is past and what is new in one sequence, without gaps and without repetitions, however slow it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import (
    CancelledError,
    EngineError,
    FailedPreconditionError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from engine.jobs import (
    JobEvent,
    JobFailed,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainPublished,
    TrainSpec,
    TrainStep,
)
from server.metrics import Metrics
from server.runs import EventRecord, RunArchive, RunKind, RunRecord, RunState, TrainEvent, is_train_event
from server.workers.pool import WorkerPool

logger = logging.getLogger("whet.runs")

T = TypeVar("T")


@dataclass(slots=True)
class _LiveRun:
    """Attributes:
    more: set, and replaced by a new one, whenever the archive has something new of the run.
    cancelled: it is to end, also where no worker has accepted it yet.
    """

    model: str
    adapter: str
    init_adapter: str | None
    events: asyncio.Queue[JobEvent] = field(default_factory=asyncio.Queue)
    more: asyncio.Event = field(default_factory=asyncio.Event)
    follower: asyncio.Task[None] | None = None
    cancelled: bool = False

    def announce(self) -> None:
        """Wakes the watchers."""
        more, self.more = self.more, asyncio.Event()
        more.set()


class RunManager:
    """Starts, follows, cancels and resumes runs.

    Args:
        archive: where all of it is written.
        pool: computes.
        max_active: runs at once, queued ones included.

    Attributes:
        on_published: awaited with model and adapter after a run has made a version live.
    """

    def __init__(self, archive: RunArchive, pool: WorkerPool, metrics: Metrics, max_active: int) -> None:
        self._archive = archive
        self._pool = pool
        self._metrics = metrics
        self._max_active = max_active
        self._live: dict[str, _LiveRun] = {}
        self._draining = False
        self._starting: set[asyncio.Task[Any]] = set()
        self.on_published: Callable[[str, str], Awaitable[None]] | None = None
        # One thread: writes come in order, and a slow disk holds up no stream.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="archive")

    async def _on_disk(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, lambda: function(*args, **kwargs))

    # ------------------------------------------------------------------------------------------------------ archive

    async def get(self, run_id: str) -> RunRecord:
        """The run of that id; NotFoundError if there is none."""
        return await self._on_disk(self._archive.get, run_id)

    async def find_request(self, request_id: str) -> RunRecord | None:
        """The run that a call with this idempotency key began, if any."""
        return await self._on_disk(self._archive.find_request, request_id)

    async def page(
        self, *, limit: int, before: int | None, model: str, adapter: str, state: RunState | None
    ) -> list[RunRecord]:
        """Runs, newest first."""
        return await self._on_disk(
            self._archive.page, limit=limit, before=before, model=model, adapter=adapter, state=state
        )

    def is_live(self, run_id: str) -> bool:
        """Whether it is queued or running."""
        return run_id in self._live

    def live_of(self, model: str) -> list[str]:
        """Ids of the live runs of a model."""
        return [run_id for run_id, run in self._live.items() if run.model == model]

    def run_with(self, model: str, adapter: str) -> str | None:
        """Id of a live run that trains an adapter of that name, or goes on from it; None if there is none."""
        for run_id, run in self._live.items():
            if run.model == model and adapter in (run.adapter, run.init_adapter):
                return run_id
        return None

    async def needed_versions(self, model: str) -> set[tuple[str, int]]:
        """Names and versions of the adapters with which runs of a model would begin once more: those that are active
        or may be resumed, and have no checkpoint yet to go on from."""
        return await self._on_disk(self._needed_versions, model)

    def _needed_versions(self, model: str) -> set[tuple[str, int]]:
        specs = [record.train_spec() for record in self._archive.unfinished(model)]
        return {
            (spec.init_adapter, spec.init_adapter_version)
            for spec in specs
            if spec.init_adapter is not None
            and spec.init_adapter_version is not None
            and not any(Path(spec.run_dir).glob("checkpoints/step-*"))
        }

    def check_capacity(self) -> None:
        """Raises OverloadedError if one run more would be too many."""
        if len(self._live) >= self._max_active:
            self._metrics.admission_rejections_total.labels("runs_full").inc()
            raise OverloadedError(
                f"{len(self._live)} training runs are active; accepted: at most {self._max_active}",
                reason="RUNS_FULL",
                retry_after_seconds=5.0,
            )

    # ----------------------------------------------------------------------------------------------------- lifetime

    async def start(
        self,
        spec: TrainSpec,
        *,
        kind: RunKind,
        request_id: str | None,
        config: str,
        dataset: str,
        cancel_with_caller: bool,
    ) -> RunRecord:
        """Archives a run and hands it to a worker.

        Args:
            cancel_with_caller: a caller that leaves meanwhile takes the run with it; else it goes on.
        Raises:
            OverloadedError: too many are active.
            AlreadyExistsError: of this request_id.
            EngineError: the engine did not accept it; the archive says so, too.
        """
        self.check_capacity()
        live = self._live[spec.job_id] = _LiveRun(spec.model, spec.adapter, spec.init_adapter)

        async def begin() -> RunRecord:
            try:
                await self._on_disk(
                    self._archive.create, spec=spec, kind=kind, request_id=request_id, config=config, dataset=dataset
                )
            except BaseException:
                del self._live[spec.job_id]
                raise
            return await self._launch(spec, live)

        return await self._to_the_end(begin(), spec.job_id if cancel_with_caller else None)

    async def resume(self, run_id: str, *, cancel_with_caller: bool = False) -> int:
        """Goes on with a run from its last checkpoint. Returns the sequence number of its last event so far.

        Args:
            cancel_with_caller: as of ``start``.
        Raises:
            NotFoundError: there is no such run.
            FailedPreconditionError: it is running, or has ended.
        """
        record = await self.get(run_id)
        if record.state not in ("interrupted", "cancelled") or run_id in self._live:
            raise FailedPreconditionError(
                f"run {run_id} is {record.state}; accepted: one that is interrupted or cancelled",
                field="run_id",
                reason="RUN_NOT_RESUMABLE",
            )
        self.check_capacity()
        live = self._live[run_id] = _LiveRun(record.model, record.adapter, record.train_spec().init_adapter)

        async def begin() -> int:
            try:
                last = await self._on_disk(self._archive.reopen, run_id)
            except BaseException:
                del self._live[run_id]
                raise
            await self._launch(record.train_spec(), live)
            return last

        return await self._to_the_end(begin(), run_id if cancel_with_caller else None)

    async def _to_the_end(self, beginning: Coroutine[Any, Any, T], run_id: str | None) -> T:
        """Begins a run in a task of its own: a caller that leaves right now must not leave a run behind that is
        archived and that nobody follows.

        Args:
            run_id: of the run to cancel when the caller leaves; None: it goes on.
        """
        task = asyncio.create_task(beginning)
        self._starting.add(task)
        task.add_done_callback(self._begun)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if run_id is not None:
                ending = asyncio.create_task(self.cancel(run_id))
                self._starting.add(ending)
                ending.add_done_callback(self._begun)
                with contextlib.suppress(asyncio.CancelledError, EngineError):
                    await asyncio.shield(ending)
            raise

    def _begun(self, task: asyncio.Task[Any]) -> None:
        self._starting.discard(task)
        if not task.cancelled():
            task.exception()  # where the caller has left, nobody else asks

    async def _launch(self, spec: TrainSpec, live: _LiveRun) -> RunRecord:
        live.follower = asyncio.create_task(self._follow(spec.job_id, live), name=f"run-{spec.job_id}")
        try:
            if live.cancelled:
                raise CancelledError(f"run {spec.job_id} was cancelled")
            await self._pool.start_job(spec, live.events.put_nowait)
            if live.cancelled:  # while no job was there to be cancelled
                with contextlib.suppress(NotFoundError):
                    await self._pool.cancel_job(spec.job_id)
        except EngineError as error:
            live.events.put_nowait(
                JobFailed(
                    job_id=spec.job_id,
                    error_code=error.code,
                    error_message=error.message,
                    error_reason=error.reason,
                    error_field=error.field,
                )
            )
            await live.follower
            raise
        return await self.get(spec.job_id)

    async def cancel(self, run_id: str) -> RunRecord:
        """Ends a run after its present slice; does nothing to one that has ended.

        Raises:
            NotFoundError: there is no such run.
        """
        record = await self.get(run_id)
        live = self._live.get(run_id)
        if live is not None:
            live.cancelled = True
            try:
                await self._pool.cancel_job(run_id)
            except EngineError as error:
                if error.code != "not_found":  # it has just ended by itself, or no worker was asked for it yet
                    raise
            if live.follower is not None:
                # Slices are short: most callers want to see the run cancelled, and need not ask again.
                await asyncio.wait({live.follower}, timeout=5.0)
        elif record.state == "interrupted":
            return await self._on_disk(self._archive.set_state, run_id, "cancelled")
        return await self.get(run_id)

    def drain(self) -> None:
        """From now on a run that loses its worker is interrupted, not failed."""
        self._draining = True

    async def close(self, timeout: float) -> None:
        """Waits for the followers to archive the last events; runs that are still live count as interrupted."""
        followers = {run.follower for run in self._live.values() if run.follower is not None}
        if followers:
            await asyncio.wait(followers, timeout=timeout)
        for run_id, run in list(self._live.items()):
            if run.follower is not None:
                run.follower.cancel()
            await self._end(run_id, run, "interrupted")
        self._disk.shutdown()
        self._archive.close()

    # ------------------------------------------------------------------------------------------------------- events

    async def _follow(self, run_id: str, live: _LiveRun) -> None:
        """Archives the events of a run up to its terminal one."""
        try:
            while True:
                event = await live.events.get()
                if not is_train_event(event):
                    logger.error("run %s brought a %s, which no run has", run_id, type(event).__name__)
                    continue
                if isinstance(event, JobFailed) and self._is_interruption(event):
                    await self._end(run_id, live, "interrupted")
                    return
                self._measure(live, event)  # type: ignore[arg-type]  # who reads the event finds it measured
                await self._on_disk(self._archive.append, run_id, event)
                if isinstance(event, TrainPublished) and self.on_published is not None:
                    await self.on_published(live.model, live.adapter)
                if isinstance(event, (TrainFinished, JobFailed)):
                    break
                live.announce()
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("run %s can not be archived; it is cancelled", run_id)
            await self._pool.cancel_job(run_id)
        finally:
            self._live.pop(run_id, None)
            self._metrics.forget_run(live.model, live.adapter)
            live.announce()

    async def _end(self, run_id: str, live: _LiveRun, state: RunState) -> None:
        await self._on_disk(self._archive.set_state, run_id, state)
        self._metrics.train_runs_total.labels(live.model, state).inc()
        self._live.pop(run_id, None)
        live.announce()

    def _is_interruption(self, event: JobFailed) -> bool:
        lost = self._draining and event.error_code == "unavailable"
        return lost or event.error_reason in ("INTERRUPTED", "DRAINING")

    def _measure(self, live: _LiveRun, event: TrainEvent) -> None:
        metrics, labels = self._metrics, (live.model, live.adapter)
        match event:
            case TrainStep():
                readings = {
                    "train_loss": event.loss,
                    "train_gradient_norm": event.grad_norm,
                    "train_learning_rate": event.learning_rate,
                    "train_step": event.step,
                    "train_tokens_per_second": event.tokens_per_second,
                }
                for name, value in readings.items():
                    if value is not None:
                        metrics.train_gauges[name].labels(*labels).set(value)
                counted = live.model, metrics.adapter_label(live.model, live.adapter)
                if event.skipped:
                    metrics.train_skipped_steps_total.labels(*counted).inc()
                elif event.step > 0:
                    metrics.train_steps_total.labels(*counted).inc()
            case TrainEvaluation():
                metrics.train_gauges["train_evaluation_loss"].labels(*labels).set(event.nll)
            case TrainCheckpoint():
                metrics.train_checkpoint_seconds.labels("train").observe(event.seconds)
            case TrainFinished():
                metrics.train_runs_total.labels(live.model, "finished").inc()
            case JobFailed():
                outcome = "cancelled" if event.error_code == "cancelled" else "failed"
                metrics.train_runs_total.labels(live.model, outcome).inc()
            case _:
                pass

    async def watch(
        self, run_id: str, from_step: int = 0, after: int = -1
    ) -> AsyncGenerator[tuple[EventRecord, RunRecord], None]:
        """Yields the events of a run, past and to come, up to its end or interruption.

        Args:
            from_step: leave out events of earlier steps.
            after: leave out events up to this sequence number.
        Raises:
            NotFoundError: there is no such run.
        """
        while True:
            live = self._live.get(run_id)
            more = live.more if live is not None else None  # before reading: what comes later sets it
            batch = await self._on_disk(self._archive.events, run_id, after=after, from_step=from_step)
            record = await self.get(run_id)
            for event in batch:
                after = event.sequence
                yield event, record
            if batch:
                continue
            if more is None:
                return
            await more.wait()

    async def outcome(self, run_id: str) -> RunRecord:
        """The run once it has ended.

        Raises:
            UnavailableError: it was interrupted.
        """
        while (live := self._live.get(run_id)) is not None:
            await live.more.wait()
        record = await self.get(run_id)
        if record.state == "interrupted":
            raise interrupted(run_id)
        return record


def interrupted(run_id: str) -> UnavailableError:
    """The error of a call whose run was interrupted under it."""
    return UnavailableError(
        f"run {run_id} was interrupted; ResumeRun goes on with it from its last checkpoint", reason="RUN_INTERRUPTED"
    )
