"""One worker as the front end sees it, through all its lives: started, watched, restarted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineError, InternalError, UnavailableError
from engine.jobs import JobEvent, JobSpec
from engine.request import Request, RequestOutput
from server.workers.link import Link
from server.workers.messages import (
    AnyReport,
    Call,
    Command,
    Failure,
    Heartbeat,
    JobEvents,
    Outputs,
    Ready,
    Reply,
    RequestFailed,
    Shutdown,
    StartFailed,
    Statistics,
    WorkerConfig,
)
from server.workers.process import WorkerProcess, describe_exit
from server.workers.stats import StatsAccumulator

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["starting", "loading", "up", "restarting", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionConfig:
    """How workers are watched and restarted.

    Attributes:
        heartbeat_timeout_seconds: silence of the process after which it is killed.
        step_timeout_seconds: how long the loop of a process that is not silent may stand at one thing (a step, a slice
            of a job) until it is taken for hung, and killed. Longer than the longest forward.
        busy_timeout_seconds: the same for what the worker announced to be long: loading and saving.
        stale_seconds: silence, or standing at what was not announced, after which health no longer calls it well.
        start_timeout_seconds: from the start of the process to its first message.
        restart_backoff_seconds: before the first restart; doubles with each further one.
        max_restart_backoff_seconds: the backoff stops growing there.
        stable_seconds: a life at least this long makes earlier deaths forgotten.
        max_restarts: consecutive restarts after which the worker stays down.
        stop_timeout_seconds: for a clean exit, before the process is killed.
        heartbeat_interval_seconds: of the worker.
    """

    heartbeat_timeout_seconds: float = 60.0
    step_timeout_seconds: float = 600.0
    busy_timeout_seconds: float = 3600.0
    stale_seconds: float = 20.0
    start_timeout_seconds: float = 300.0
    restart_backoff_seconds: float = 0.5
    max_restart_backoff_seconds: float = 30.0
    stable_seconds: float = 60.0
    max_restarts: int = 10
    stop_timeout_seconds: float = 10.0
    heartbeat_interval_seconds: float = 0.5


class WorkerLostError(UnavailableError):
    """The worker died, or was stopped, with the work in its hands."""

    default_reason = "WORKER_LOST"


class Stream:
    """A request in flight: outputs on their way from the worker to the consumer.

    Attributes:
        unfinished: completions that have not reported their end.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.unfinished = request.n
        self._outputs: list[RequestOutput] = []
        self._error: EngineError | None = None
        self._arrived = asyncio.Event()

    def put(self, outputs: list[RequestOutput]) -> None:
        """Adds outputs of one step."""
        for output in outputs:
            if output.finish_reason == "error":
                failure = Failure(code=output.error_code, message=output.error_message, reason=output.error_reason)
                return self.fail(failure.to_error())
            self._outputs.append(output)
            self.unfinished -= output.finish_reason is not None
        return self._arrived.set()

    @property
    def ended(self) -> bool:
        """Whether the last take was the last."""
        return self.unfinished == 0 and not self._outputs

    def fail(self, error: EngineError) -> None:
        """Ends the stream, after the outputs that are there."""
        self._error = self._error or error
        self._arrived.set()

    async def take(self) -> list[RequestOutput]:
        """All outputs since the last call, at least one.

        Raises:
            EngineError: what the stream ended with.
        """
        await self._arrived.wait()
        if not self._outputs:
            assert self._error is not None
            raise self._error
        outputs, self._outputs = self._outputs, []
        if self._error is None:
            self._arrived.clear()
        return outputs


@dataclass(slots=True)
class Job:
    """A job in flight and its mailbox.

    Attributes:
        starting: while it waits for a worker to take it.
        cancelled: by its caller; what ends it now ends it as cancelled.
    """

    spec: JobSpec
    mailbox: asyncio.Queue[JobEvent | WorkerLostError] = field(default_factory=asyncio.Queue)
    replica: Replica | None = None
    starting: asyncio.Task[None] | None = None
    cancelled: bool = False


class Replica:
    """A worker of one device.

    Args:
        restore: loads what should be loaded into a fresh life; called once it is ready.
        changed: called whenever ``state`` or ``models`` changed.
        stream_interval_seconds: least time between two reports of outputs of the worker.

    Attributes:
        models: names that this worker holds and may be sent requests for.
        loading: names that it is being told to load.
        failures: names that this life could not load, and why.
        streams, jobs: what it is working on, by request id and job id.
        busy: what long work it announced, in words; "" for none.
        last_heartbeat: time.monotonic() of it; None before the first.
        last_turn: time.monotonic() when its loop last went round, as far as known; None before the first.
    """

    def __init__(
        self,
        index: int,
        engine: EngineConfig,
        config: SupervisionConfig,
        link: Link,
        *,
        restore: Callable[[Replica], Awaitable[None]],
        changed: Callable[[], None],
        stream_interval_seconds: float,
        log_level: str,
        log_format: Literal["json", "text"],
    ) -> None:
        self.index = index
        self.engine = engine
        self.device = engine.device
        self.state: State = "starting"
        self.identity = ""
        self.restarts = 0
        self.busy = ""
        self.last_heartbeat: float | None = None
        self.last_turn: float | None = None
        self.models: set[str] = set()
        self.loading: set[str] = set()
        self.failures: dict[str, EngineError] = {}
        self.streams: dict[str, Stream] = {}
        self.jobs: dict[str, Job] = {}
        self.stats = StatsAccumulator()
        self.process: WorkerProcess | None = None
        self._config = config
        self._link = link
        self._restore = restore
        self._changed = changed
        self._stream_interval_seconds = stream_interval_seconds
        self._log_level = log_level
        self._log_format = log_format
        self._doing = ""
        self._standing_seconds = 0.0
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._call_ids = itertools.count(1)
        self._ready: asyncio.Future[None] | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = asyncio.Event()
        self._patience_seconds = config.stop_timeout_seconds
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        """Completions and jobs in flight."""
        return sum(stream.request.n for stream in self.streams.values()) + len(self.jobs)

    @property
    def answers(self) -> bool:
        """Whether commands reach a live engine."""
        return self.state in ("loading", "up")

    @property
    def is_well(self) -> bool:
        """Whether it answers, beats, and its loop goes round or is at what it announced to be long."""
        if not self.answers or self.last_heartbeat is None or self.last_turn is None:
            return False
        now, limit = time.monotonic(), self._config.stale_seconds
        return now - self.last_heartbeat <= limit and (bool(self.busy) or now - self.last_turn <= limit)

    def may_come_to_hold(self, model: str) -> bool:
        """Whether it is loading the model, or will try to."""
        if self.state == "loading":
            return model not in self.failures
        return self.state in ("starting", "restarting") or model in self.loading

    async def start(self) -> None:
        """Starts the worker and waits for its first life to be ready.

        Raises:
            EngineError: it cannot start; it then stays down.
        """
        self._supervisor = asyncio.create_task(self._supervise(), name=f"worker-{self.index}")
        await asyncio.shield(self._started)

    async def stop(self, patience_seconds: float | None = None) -> None:
        """Ends the worker, cleanly if it still answers, and for good.

        Args:
            patience_seconds: how long it may take before it is killed; None: as configured.
        """
        if patience_seconds is not None:
            self._patience_seconds = patience_seconds
        self._stopping.set()
        if self._supervisor is not None:
            await self._supervisor

    def send(self, message: Command) -> None:
        """Sends a command to the present life."""
        self._link.send(self.identity, message)

    async def call(self, kind: type[T], make: Callable[[int], Call]) -> T:
        """Sends a command and waits for its reply.

        Args:
            kind: type of the reply's value.
            make: the command, given its call id.
        Raises:
            EngineError: the worker's own, or UnavailableError if it died meanwhile.
        """
        if not self.answers:
            raise WorkerLostError(f"worker {self.index} is {self.state}")
        call_id = next(self._call_ids)
        replied: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = replied
        try:
            self.send(make(call_id))
            return (await replied).value(kind)
        finally:
            self._calls.pop(call_id, None)

    # ----------------------------------------------------------------------------------------------------- reports

    def handle(self, report: AnyReport) -> None:
        """Takes a report of the present life."""
        match report:
            case Outputs(outputs=outputs):
                by_request: dict[str, list[RequestOutput]] = defaultdict(list)
                for output in outputs:
                    by_request[output.request_id].append(output)
                for request_id, batch in by_request.items():
                    if (stream := self.streams.get(request_id)) is not None:
                        stream.put(batch)
            case JobEvents(events=events):
                for event in (tagged.event() for tagged in events):
                    if (job := self.jobs.get(event.job_id)) is not None:
                        job.mailbox.put_nowait(event)
            case Heartbeat(doing=doing, announced=announced, seconds=seconds):
                self.last_heartbeat = time.monotonic()
                self.last_turn = self.last_heartbeat - seconds
                self.busy = doing if announced else ""
                self._doing, self._standing_seconds = doing, seconds
            case Statistics(stats=stats):
                self.stats.add(stats)
            case Reply(call_id=call_id):
                call = self._calls.get(call_id)
                if call is not None and not call.done():
                    call.set_result(report)
            case RequestFailed(request_id=request_id, failure=failure):
                if (stream := self.streams.get(request_id)) is not None:
                    stream.fail(failure.to_error())
            case Ready(device=device):
                self.device = device
                self._settle_ready(None)
            case StartFailed(failure=failure):
                self._settle_ready(failure.to_error())

    def _settle_ready(self, error: EngineError | None) -> None:
        if self._ready is not None and not self._ready.done():
            if error is None:
                self._ready.set_result(None)
            else:
                self._ready.set_exception(error)

    # ------------------------------------------------------------------------------------------------- supervision

    async def _supervise(self) -> None:
        deaths = 0
        while True:
            began = time.monotonic()
            error: EngineError
            try:
                error = InternalError(await self._live(), reason="WORKER_LOST")
            except EngineError as refused:
                error = refused
            self._lose(error.message)
            if self._stopping.is_set():
                self._enter("stopped")
                self._settle_started(UnavailableError("the server is stopping", reason="DRAINING"))
                return
            if not self._started.done():
                # Nothing has worked yet, so nothing suggests that a second try would.
                self._enter("failed")
                self._settle_started(error)
                return
            deaths = 1 if time.monotonic() - began >= self._config.stable_seconds else deaths + 1
            if deaths > self._config.max_restarts:
                logger.error("worker %d died %d times in a row and stays down: %s", self.index, deaths, error.message)
                self._enter("failed")
                return
            delay = min(
                self._config.restart_backoff_seconds * 2 ** (deaths - 1), self._config.max_restart_backoff_seconds
            )
            logger.error("worker %d was lost: %s; restarting in %.1f s", self.index, error.message, delay)
            self.restarts += 1
            self._enter("restarting")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _live(self) -> str:
        """One life, from spawn to death. Returns how it ended.

        Raises:
            EngineError: the worker refused its configuration.
        """
        if self._stopping.is_set():
            return "stopped"
        # A name that no earlier life bore: what those still had on the way cannot be taken for this one's.
        self.identity = f"{self.index}-{uuid.uuid4().hex}"
        self._enter("starting")
        self._ready = asyncio.get_running_loop().create_future()
        config = WorkerConfig(
            endpoint=self._link.endpoint,
            identity=self.identity,
            engine=self.engine,
            heartbeat_interval_seconds=self._config.heartbeat_interval_seconds,
            stream_interval_seconds=self._stream_interval_seconds,
            log_level=self._log_level,
            log_format=self._log_format,
        )
        self.process = process = await WorkerProcess.spawn(msgspec.json.encode(config) + b"\n")
        exited = asyncio.create_task(process.wait())
        restoring: asyncio.Task[None] | None = None
        try:
            stopping = asyncio.create_task(self._stopping.wait())
            news: set[asyncio.Future[Any]] = {exited, self._ready, stopping}
            await asyncio.wait(news, timeout=self._config.start_timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not self._ready.done():
                if exited.done():
                    return f"it ended while starting ({describe_exit(exited.result())}); its log tells why"
                return f"it was not ready within {self._config.start_timeout_seconds:g} s"
            self._ready.result()
            self.last_heartbeat = self.last_turn = time.monotonic()
            self._enter("loading")
            self._settle_started(None)
            restoring = asyncio.create_task(self._restored())
            return await self._watch(exited)
        finally:
            if restoring is not None:
                restoring.cancel()
            process.kill()
            await exited
            self.process = None

    async def _restored(self) -> None:
        await self._restore(self)
        self._enter("up")

    async def _watch(self, exited: asyncio.Task[int]) -> str:
        """Waits for the end of the process, or for it to hang. Returns which."""
        shortest = min(self._config.heartbeat_timeout_seconds, self._config.step_timeout_seconds)
        interval = max(0.05, shortest / 20)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while True:
                looked = time.monotonic()
                await asyncio.wait({exited, stopping}, timeout=interval, return_when=asyncio.FIRST_COMPLETED)
                if exited.done():
                    # What it said last may still be on the way: a finished stream should not end as lost.
                    await asyncio.sleep(0.05)
                    return describe_exit(exited.result())
                if stopping.done():
                    self.send(Shutdown())
                    # One that is loading would hear of it only afterwards, and has nothing to save.
                    patience = 0.0 if self.busy else self._patience_seconds
                    done, _ = await asyncio.wait({exited}, timeout=patience)
                    return "stopped" if done else "did not stop, and was killed"
                now = time.monotonic()
                assert self.last_heartbeat is not None
                if now - looked > 2 * interval:
                    # It was this process that stood still, so the silence is no sign of the worker's.
                    self.last_heartbeat = now
                if now - self.last_heartbeat > self._config.heartbeat_timeout_seconds:
                    return f"no heartbeat for {now - self.last_heartbeat:.1f} s; it was killed"
                # By the worker's own clock, on which it does not matter how long the report was on its way.
                limit = self._config.busy_timeout_seconds if self.busy else self._config.step_timeout_seconds
                if self._standing_seconds > limit:
                    return f"its loop stood for {self._standing_seconds:.1f} s at {self._doing}; it was killed"
        finally:
            stopping.cancel()

    def _lose(self, reason: str) -> None:
        """Tells everyone who waits for the life that ended."""
        lost = WorkerLostError(f"worker {self.index} was lost: {reason}")
        if self._stopping.is_set():
            lost = WorkerLostError("the server is shutting down", reason="DRAINING")
        self.models.clear()
        self.loading.clear()
        self.failures.clear()
        self.busy = self._doing = ""
        self._standing_seconds = 0.0
        self.stats.worker_lost()
        streams, self.streams = self.streams, {}
        jobs, self.jobs = self.jobs, {}
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done():
                call.set_exception(lost)
        for stream in streams.values():
            stream.fail(lost)
        for job in jobs.values():
            job.replica = None
            job.mailbox.put_nowait(lost)

    def _settle_started(self, error: EngineError | None) -> None:
        if not self._started.done():
            if error is None:
                self._started.set_result(None)
            else:
                self._started.set_exception(error)

    def _enter(self, state: State) -> None:
        self.state = state
        self._changed()
