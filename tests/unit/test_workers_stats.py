"""Statistics of a worker across its lives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.info import EngineStats, ModelStats
from server.workers.stats import COUNTERS, StatsAccumulator


def report(preemptions: int, *, running: int = 0, seconds: list[float] | None = None) -> EngineStats:
    observations = {"time_to_first_token_seconds": seconds} if seconds else {}
    model = ModelStats(model="m", preemptions=preemptions, requests_running=running, observations=observations)
    return EngineStats(models=[model], job_slice_seconds={"train": list(seconds or [])})


def test_counters_add_up_over_the_lives_of_a_worker() -> None:
    stats = StatsAccumulator()
    stats.add(report(3))
    stats.add(report(5))
    stats.worker_lost()
    stats.add(report(2))
    assert stats.drain().models[0].preemptions == 7


def test_a_model_loaded_again_by_the_same_worker_counts_on() -> None:
    stats = StatsAccumulator()
    stats.add(report(5))
    stats.add(report(1))
    assert stats.drain().models[0].preemptions == 6


def test_observations_are_handed_out_once_each() -> None:
    stats = StatsAccumulator()
    stats.add(report(0, seconds=[0.1]))
    stats.add(report(0, seconds=[0.2]))
    first, second = stats.drain(), stats.drain()
    assert first.models[0].observations == {"time_to_first_token_seconds": [0.1, 0.2]}
    assert first.job_slice_seconds == {"train": [0.1, 0.2]}
    assert second.models[0].observations == {}
    assert second.job_slice_seconds == {}


def test_gauges_of_a_lost_worker_fall_to_zero_and_its_counters_stay() -> None:
    stats = StatsAccumulator()
    stats.add(report(4, running=2))
    assert stats.drain().models[0].requests_running == 2
    stats.worker_lost()
    model = stats.drain().models[0]
    assert (model.requests_running, model.preemptions) == (0, 4)


@given(st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=5))
def test_no_counter_ever_falls_and_none_loses_a_count(lives: list[list[int]]) -> None:
    """Each life counts up from zero by the given steps; the total is the sum of them all."""
    stats = StatsAccumulator()
    total = before = 0
    for steps in lives:
        count = 0
        for step in steps:
            count += step
            total += step
            stats.add(EngineStats(models=[ModelStats(model="m", **dict.fromkeys(COUNTERS, count))]))
            model = stats.drain().models[0]
            assert {getattr(model, name) for name in COUNTERS} == {total}
            assert total >= before
            before = total
        stats.worker_lost()
