"""JobLoop: shares of time, order, failures and endings, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.core.job_loop import JobLoop
from engine.errors import AlreadyExistsError, NotFoundError, OverloadedError
from engine.jobs import JobEvent, JobFailed, JobWarning


class Clock:
    """Monotonic seconds that move only when a slice says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(clock: Clock, job_id: str, slices: int, seconds: float, log: list[str]) -> Iterator[JobEvent | None]:
    try:
        for _ in range(slices):
            clock.now += seconds
            log.append(job_id)
            yield None
        yield JobWarning(job_id=job_id, step=None, reason="DONE", message="")
    finally:
        log.append(f"{job_id} closed")


def test_share_of_time_is_kept_while_serving() -> None:
    """At share 0.25, a job gets one second in four, however long its slices are against the steps."""
    clock, log = Clock(), []
    loop = JobLoop(slice_seconds=0.1, share=0.25, clock=clock)
    loop.start("a", "train", "m", work(clock, "a", 10_000, 0.05, log))
    served = 0.0
    while clock.now < 100.0:
        clock.now += 0.01
        served += 0.01
        loop.served(0.01)
        loop.advance(serving=True)
    assert (clock.now - served) / clock.now == pytest.approx(0.25, abs=0.01)
    share, slices = loop.drain_stats()
    assert share["train"] == pytest.approx(0.25, abs=0.01)
    assert slices["train"][0] == pytest.approx(0.05)


def test_idle_engine_runs_slices_until_the_budget_is_spent() -> None:
    """Without requests a job runs on, yet control returns after slice_seconds."""
    clock, log = Clock(), []
    loop = JobLoop(slice_seconds=0.125, share=0.5, clock=clock)
    loop.start("a", "train", "m", work(clock, "a", 100, 0.0625, log))
    loop.advance(serving=False)
    assert clock.now == pytest.approx(0.125)
    loop.advance(serving=False)
    assert clock.now == pytest.approx(0.25)


def test_jobs_take_turns() -> None:
    clock, log = Clock(), []
    loop = JobLoop(slice_seconds=0.0, share=0.5, clock=clock)
    loop.start("a", "train", "m", work(clock, "a", 2, 1.0, log))
    loop.start("b", "embed", "m", work(clock, "b", 2, 1.0, log))
    for _ in range(4):
        loop.advance(serving=False)
    assert log == ["a", "b", "a", "b"]
    with pytest.raises(AlreadyExistsError):
        loop.start("a", "train", "m", iter(()))


def test_cancel_closes_the_generator_and_reports() -> None:
    clock, log = Clock(), []
    loop = JobLoop(slice_seconds=0.0, share=0.5, clock=clock)
    loop.start("a", "train", "m", work(clock, "a", 5, 1.0, log))
    loop.advance(serving=False)
    failed = loop.cancel("a")
    assert failed.error_code == "cancelled"
    assert log == ["a", "a closed"]
    assert len(loop) == 0
    with pytest.raises(NotFoundError):
        loop.cancel("a")


def test_a_failing_job_reports_its_error_and_leaves_others_alone() -> None:
    clock, log = Clock(), []

    def failing(error: Exception) -> Iterator[JobEvent | None]:
        yield None
        raise error

    loop = JobLoop(slice_seconds=10.0, share=0.5, clock=clock)
    loop.start("typed", "embed", "m", failing(OverloadedError("full", field="f", reason="R")))
    loop.start("bug", "embed", "m", failing(ZeroDivisionError("oops")))
    loop.start("memory", "embed", "m", failing(MemoryError()))
    loop.start("fine", "embed", "m", work(clock, "fine", 3, 0.1, log))
    events: dict[str, JobEvent] = {}
    while len(loop):
        events.update({event.job_id: event for event in loop.advance(serving=False)})
    typed, bug, memory = (events[name] for name in ("typed", "bug", "memory"))
    assert isinstance(typed, JobFailed)
    assert (typed.error_code, typed.error_field, typed.error_reason) == ("resource_exhausted", "f", "R")
    assert isinstance(bug, JobFailed)
    assert bug.error_code == "internal"
    assert isinstance(memory, JobFailed)
    assert memory.error_reason == "OUT_OF_MEMORY"
    assert isinstance(events["fine"], JobWarning)


def test_interrupt_lets_every_job_say_how_it_ended() -> None:
    class Stop(Exception):
        pass

    def careful() -> Iterator[JobEvent | None]:
        try:
            while True:
                yield None
        except Stop:
            yield JobWarning(job_id="careful", step=1, reason="SAVED", message="")

    loop = JobLoop(slice_seconds=0.0, share=0.5, clock=Clock())
    loop.start("careful", "train", "m", careful())
    loop.start("careless", "train", "m", work(Clock(), "careless", 5, 1.0, []))
    loop.start("other", "embed", "m", work(Clock(), "other", 5, 1.0, []))
    for _ in range(3):
        loop.advance(serving=False)
    events = {event.job_id: event for event in loop.interrupt("train", Stop())}
    assert isinstance(events["careful"], JobWarning)
    careless = events["careless"]
    assert isinstance(careless, JobFailed)
    assert careless.error_reason == "INTERRUPTED"
    assert len(loop) == 1
