"""JobLoop: shares of time, order, failures and endings, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.core.job_loop import JobLoop
from engine.core.slice_planner import SlicePlanner
from engine.errors import AlreadyExistsError, NotFoundError, OverloadedError
from engine.jobs import JobEvent, JobFailed, JobWarning, Pause


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


def announced(clock: Clock, kind: str, size: int, seconds: float, log: list[str]) -> Iterator[JobEvent | Pause | None]:
    """Pieces that say what they are."""
    while True:
        yield Pause(kind, size)
        clock.now += seconds
        log.append(kind)


def gaps_of(loop: JobLoop, clock: Clock, num_steps: int, step_seconds: float) -> list[float]:
    """What the jobs took in each gap between two steps."""
    gaps = []
    for _ in range(num_steps):
        clock.now += step_seconds
        loop.served(step_seconds)
        begin = clock.now
        loop.advance(serving=True)
        gaps.append(clock.now - begin)
    return gaps


@pytest.mark.parametrize("piece", [0.0003, 0.001, 0.0035])
def test_gaps_keep_to_the_slowdown(piece: float) -> None:
    """With a slowdown of 1.5, no gap takes more than half a step once the pieces are known, and jobs get at least half
    of what that leaves them, whatever the size of their pieces."""
    clock, log = Clock(), []
    loop = JobLoop(slice_seconds=1.0, share=0.5, max_slowdown=1.5, clock=clock)
    loop.start("a", "train", "m", announced(clock, "forward", 128, piece, log))
    gaps = gaps_of(loop, clock, 1000, 0.01)[10:]
    assert max(gaps) <= 0.005 + 1e-9
    assert sum(gaps) / len(gaps) >= 0.5 * 0.005
    assert loop.gap_seconds == pytest.approx(0.005)


def test_a_piece_longer_than_the_gap_waits_for_its_credit() -> None:
    """It runs alone, in so few gaps that the share is kept."""
    clock, log = Clock(), []
    loop = JobLoop(slice_seconds=0.02, share=0.5, max_slowdown=1.5, clock=clock)
    loop.start("a", "train", "m", announced(clock, "publish", 1, 0.1, log))
    gaps = gaps_of(loop, clock, 1000, 0.01)
    assert {round(gap, 6) for gap in gaps} == {0.0, 0.1}
    assert sum(gaps) / 1000 == pytest.approx(0.005, rel=0.05)
    assert sum(gap > 0 for gap in gaps) / 1000 == pytest.approx(0.05, rel=0.05)


def test_costs_are_in_proportion_to_sizes() -> None:
    """What a kind of piece costs is learnt from pieces of other sizes, of the upper ones among the latest."""
    planner = SlicePlanner(slice_seconds=1.0, max_slowdown=2.0)
    assert planner.cost("train", Pause("forward", 8)) is None
    for _ in range(90):
        planner.observe("train", Pause("forward", 100), 9.0)
    assert planner.cost("train", Pause("forward", 50)) == pytest.approx(4.5)
    for index in range(64):  # what was is forgotten
        planner.observe("train", Pause("forward", 100), 2.0 if index % 4 == 0 else 1.0)
    assert planner.cost("train", Pause("forward", 50)) == pytest.approx(1.0)
    assert planner.cost("perplexity", Pause("forward", 50)) is None
    assert planner.cost("train", Pause("backward", 50)) is None


def test_a_long_prompt_does_not_lengthen_the_gaps() -> None:
    """The gap is of a typical step, and never more than slice_seconds."""
    planner = SlicePlanner(slice_seconds=0.05, max_slowdown=1.5)
    assert planner.gap_seconds == 0.05
    for seconds in [0.01] * 20 + [5.0] * 5:
        planner.served(seconds)
    assert planner.gap_seconds == pytest.approx(0.005)
    for _ in range(64):
        planner.served(5.0)
    assert planner.gap_seconds == 0.05


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
