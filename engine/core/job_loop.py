"""Runs jobs a slice at a time beside serving.

A job is a generator; each ``next`` is one slice. While requests are running, jobs may take ``job_share`` of the loop's
time: each serving step earns credit, each slice spends it. Without requests jobs run freely, yet control still returns
after ``job_slice_seconds``, so that commands and new requests are seen.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass

from engine.core.failures import as_engine_error
from engine.errors import AlreadyExistsError, EngineError, InternalError, NotFoundError
from engine.jobs import TERMINAL_EVENTS, JobEvent, JobFailed

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    job_id: str
    kind: str
    model: str
    slices: Iterator[JobEvent | None]
    holds: Collection[tuple[str, int]]
    trains: Collection[str]


class JobLoop:
    """The jobs of one engine, advanced in turn.

    Args:
        slice_seconds: how long one call of advance may take, about; a slice that is longer runs to its end.
        share: fraction of the time that jobs may take while requests are running, (0, 1].
    """

    def __init__(self, slice_seconds: float, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._slice_seconds = slice_seconds
        self._earn = share / (1.0 - share) if share < 1.0 else None
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self._credit = 0.0
        self._slices: dict[str, list[float]] = defaultdict(list)
        self._job_seconds: dict[str, float] = defaultdict(float)
        self._since = clock()

    def __len__(self) -> int:
        return len(self._jobs)

    def uses(self, model: str) -> bool:
        """Whether a job works on that model."""
        return any(job.model == model for job in self._jobs)

    def holds(self, model: str) -> set[tuple[str, int]]:
        """Names and versions of the adapters that jobs of that model work with."""
        return {version for job in self._jobs if job.model == model for version in job.holds}

    def trainer_of(self, model: str, adapter: str) -> str | None:
        """Id of a job that trains an adapter of that name, or goes on from it; None if there is none."""
        return next((job.job_id for job in self._jobs if job.model == model and adapter in job.trains), None)

    def start(
        self,
        job_id: str,
        kind: str,
        model: str,
        slices: Iterator[JobEvent | None],
        *,
        holds: Collection[tuple[str, int]] = (),
        trains: Collection[str] = (),
    ) -> None:
        """Enters a job; its first slice runs with a later advance.

        Args:
            holds: names and versions of the adapters that it works with.
            trains: names of the adapters that it trains or goes on from.
        Raises:
            AlreadyExistsError: a job of that id is running.
        """
        if any(job.job_id == job_id for job in self._jobs):
            raise AlreadyExistsError(f"job {job_id!r} is already running", field="job_id")
        self._jobs.append(_Job(job_id, kind, model, slices, holds, trains))

    def cancel(self, job_id: str) -> JobFailed:
        """Ends a job; its own clean-up runs before this returns.

        Raises:
            NotFoundError: there is no such job.
        """
        job = self._take(job_id)
        self._close(job)
        return JobFailed(
            job_id=job_id, error_code="cancelled", error_message="the job was cancelled", error_reason="CANCELLED"
        )

    def interrupt(self, kind: str, error: Exception) -> list[JobEvent]:
        """Throws ``error`` into every job of that kind and returns the events with which they end."""
        events: list[JobEvent] = []
        for job in [job for job in self._jobs if job.kind == kind]:
            self._jobs.remove(job)
            try:
                if isinstance(job.slices, Generator):
                    event = job.slices.throw(error)
                    while True:
                        if event is not None:
                            events.append(event)
                        event = next(job.slices)
            except StopIteration:
                continue
            except Exception as raised:  # noqa: BLE001 - the failure is reported, and the others still end
                if raised is error:
                    raised = EngineError("the job was interrupted", reason="INTERRUPTED")
                events.append(_failure(job, raised))
        return events

    def served(self, seconds: float) -> None:
        """Tells that serving took so long, which earns the jobs their share."""
        if self._earn is not None:
            self._credit = min(self._credit + seconds * self._earn, self._slice_seconds)

    def advance(self, serving: bool) -> list[JobEvent]:
        """Runs slices of the jobs in turn, within the time that is due.

        Args:
            serving: whether requests are running.
        Returns: the events that the slices brought.
        """
        events: list[JobEvent] = []
        if not serving:
            self._credit = 0.0
        elif self._earn is not None and self._credit <= 0.0:
            return events
        end = self._clock() + self._slice_seconds
        while self._jobs:
            job = self._jobs.popleft()
            begin = self._clock()
            finished = self._slice(job, events)
            now = self._clock()
            self._slices[job.kind].append(now - begin)
            self._job_seconds[job.kind] += now - begin
            self._credit -= now - begin
            if not finished:
                self._jobs.append(job)
            if now >= end or (serving and self._earn is not None and self._credit <= 0.0):
                break
        return events

    def drain_stats(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Per kind, the share of time since the last call, and the seconds of each slice."""
        now = self._clock()
        elapsed = max(now - self._since, 1e-9)
        share = {kind: seconds / elapsed for kind, seconds in self._job_seconds.items()}
        slices = dict(self._slices)
        self._since = now
        self._job_seconds = defaultdict(float, dict.fromkeys(self._job_seconds, 0.0))
        self._slices = defaultdict(list)
        return share, slices

    def _slice(self, job: _Job, events: list[JobEvent]) -> bool:
        """One slice; True once the job has ended. A job that fails takes nothing else with it."""
        try:
            event = next(job.slices)
        except StopIteration:
            return True
        except Exception as error:  # noqa: BLE001 - reported to the job's caller
            events.append(_failure(job, error))
            return True
        if event is not None:
            events.append(event)
        if isinstance(event, TERMINAL_EVENTS):
            self._close(job)
            return True
        return False

    def _take(self, job_id: str) -> _Job:
        for job in self._jobs:
            if job.job_id == job_id:
                self._jobs.remove(job)
                return job
        raise NotFoundError(f"there is no running job {job_id!r}", field="job_id")

    def _close(self, job: _Job) -> None:
        if isinstance(job.slices, Generator):
            try:
                job.slices.close()
            except Exception:
                logger.exception("job %s failed while it was being closed", job.job_id)


def _failure(job: _Job, error: Exception) -> JobFailed:
    reported = as_engine_error(error, f"the {job.kind} job")
    if isinstance(reported, InternalError):
        logger.error("%s job %s failed", job.kind, job.job_id, exc_info=error)
    return JobFailed(
        job_id=job.job_id,
        error_code=reported.code,
        error_message=reported.message,
        error_reason=reported.reason,
        error_field=reported.field,
    )
