"""Runs jobs a slice at a time beside serving.

A job is a generator; each ``next`` is one piece of work, and a slice is the pieces that run between two steps. While
requests are running, each step earns jobs credit and each piece spends it, so that jobs get ``share`` of the time; and
a slice is no longer than the planner's gap, so that they get it in amounts that a stream does not notice. A piece that
is longer than the gap by itself runs alone, once the credit for it has gathered over several steps. Without requests
jobs run freely, yet control returns after ``slice_seconds``, so that commands and new requests are seen.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass

from engine.core.failures import as_engine_error
from engine.core.slice_planner import SlicePlanner
from engine.errors import AlreadyExistsError, EngineError, InternalError, NotFoundError
from engine.jobs import TERMINAL_EVENTS, JobEvent, JobFailed, Pause

logger = logging.getLogger(__name__)


Pieces = Iterator[JobEvent | Pause | None]


@dataclass(slots=True)
class _Job:
    """Attributes: upcoming: what the next piece is, where the job said so."""

    job_id: str
    kind: str
    model: str
    slices: Pieces
    holds: Collection[tuple[str, int]]
    trains: Collection[str]
    upcoming: Pause | None = None


class JobLoop:
    """The jobs of one engine, advanced in turn.

    Args:
        slice_seconds: how long one call of advance may take, about; a piece that is longer runs to its end.
        share: fraction of the time that jobs may take while requests are running, (0, 1].
        max_slowdown: largest factor by which jobs may stretch the time between two steps, above 1; inf: any.
        synchronize: waits for the device, where work is only launched; None: it is done when a call returns.
    """

    def __init__(
        self,
        slice_seconds: float,
        share: float,
        max_slowdown: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._slice_seconds = slice_seconds
        by_share = share / (1.0 - share) if share < 1.0 else math.inf
        self._earn = min(by_share, max_slowdown - 1.0)
        self._planner = SlicePlanner(slice_seconds, max_slowdown)
        self._clock = clock
        self._synchronize = synchronize
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
        slices: Pieces,
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
                        if event is not None and not isinstance(event, Pause):
                            events.append(event)
                        event = next(job.slices)
            except StopIteration:
                continue
            except Exception as raised:  # noqa: BLE001 - the failure is reported, and the others still end
                if raised is error:
                    raised = EngineError("the job was interrupted", reason="INTERRUPTED")
                events.append(_failure(job, raised))
        return events

    @property
    def gap_seconds(self) -> float:
        """What jobs may take between the next two steps."""
        return self._planner.gap_seconds

    def served(self, seconds: float) -> None:
        """Tells how long a step took, which earns the jobs their share."""
        self._planner.served(seconds)
        if not self._jobs:
            return
        # Credit for a full slice, or for the longest of the pieces that wait.
        most = max(self._slice_seconds, *(self._cost(job) for job in self._jobs))
        self._credit = most if math.isinf(self._earn) else min(self._credit + seconds * self._earn, most)

    def advance(self, serving: bool) -> list[JobEvent]:
        """Runs a slice: pieces of the job whose turn it is, and of the next ones where it ends.

        Args:
            serving: whether requests are running.
        Returns: the events that the pieces brought.
        """
        events: list[JobEvent] = []
        if not serving:
            self._credit = 0.0
        limit = self._planner.gap_seconds if serving else self._slice_seconds
        spent: dict[str, float] = defaultdict(float)
        total = 0.0
        while self._jobs and (self._is_due(self._jobs[0], total, limit) if serving else not spent or total < limit):
            job = self._jobs.popleft()
            seconds, ended = self._piece(job, events, serving)
            if not ended:
                self._jobs.appendleft(job)
            total += seconds
            spent[job.kind] += seconds
            self._credit -= seconds
        if spent:
            self._jobs.rotate(-1)
        for kind, seconds in spent.items():
            self._slices[kind].append(seconds)
            self._job_seconds[kind] += seconds
        return events

    def _is_due(self, job: _Job, spent: float, limit: float) -> bool:
        """Whether the next piece of a job may run in this gap, of which so much is spent."""
        cost = self._cost(job)
        if self._credit <= 0.0 or self._credit < cost:
            return False
        return spent == 0.0 or spent + cost <= limit

    def _cost(self, job: _Job) -> float:
        """Seconds that its next piece is expected to take; 0 where nothing is known."""
        return self._planner.cost(job.kind, job.upcoming) or 0.0

    def _piece(self, job: _Job, events: list[JobEvent], serving: bool) -> tuple[float, bool]:
        """One piece: its seconds, and whether the job has ended."""
        begin, piece = self._clock(), job.upcoming
        ended = self._next(job, events)
        if serving and self._synchronize is not None:
            self._synchronize()
        seconds = self._clock() - begin
        if serving or self._synchronize is None:
            self._planner.observe(job.kind, piece, seconds)
        return seconds, ended

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

    def _next(self, job: _Job, events: list[JobEvent]) -> bool:
        """Takes a job to its next pause; True once it has ended. One that fails takes nothing else with it."""
        job.upcoming = None
        try:
            event = next(job.slices)
        except StopIteration:
            return True
        except Exception as error:  # noqa: BLE001 - reported to the job's caller
            events.append(_failure(job, error))
            return True
        if isinstance(event, Pause):
            job.upcoming = event
        elif event is not None:
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
