"""Admission: bounded, reserved at the check, and closed while loading and draining."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import OverloadedError, UnavailableError
from server.admission import Admission
from server.metrics import Metrics


@pytest.fixture
async def metrics() -> Metrics:
    return Metrics("1.0")


def rejections(metrics: Metrics, reason: str) -> float:
    return metrics.registry.get_sample_value("whet_admission_rejections_total", {"reason": reason}) or 0.0


async def test_places_are_reserved_at_the_check_and_given_back(metrics: Metrics) -> None:
    admission = Admission(3, metrics)
    admission.open()
    with admission.reserve(2), admission.reserve(1):
        with pytest.raises(OverloadedError) as caught, admission.reserve(1):
            pass
        assert caught.value.retry_after_seconds is not None
        assert 0 < caught.value.retry_after_seconds <= 5
    assert admission.in_use == 0
    assert rejections(metrics, "queue_full") == 1
    with admission.reserve(3):
        pass


async def test_a_request_larger_than_all_places_is_refused(metrics: Metrics) -> None:
    admission = Admission(3, metrics)
    admission.open()
    with pytest.raises(OverloadedError, match="needs 4"), admission.reserve(4):
        pass


async def test_a_failure_gives_its_places_back(metrics: Metrics) -> None:
    admission = Admission(1, metrics)
    admission.open()
    with pytest.raises(ZeroDivisionError), admission.reserve():
        raise ZeroDivisionError
    with admission.reserve():
        pass


@pytest.mark.parametrize("state", ["loading", "draining"])
async def test_no_work_is_taken_while_loading_or_draining(metrics: Metrics, state: str) -> None:
    admission = Admission(1, metrics)
    if state == "draining":
        admission.open()
        admission.drain()
    with pytest.raises(UnavailableError) as caught, admission.reserve():
        pass
    assert caught.value.reason == state.upper()
    assert rejections(metrics, state) == 1


async def test_a_drain_waits_for_work_in_progress(metrics: Metrics) -> None:
    admission = Admission(1, metrics)
    admission.open()
    with admission.reserve():
        admission.drain()
        assert not await admission.wait_idle(0.01)
        waiting = asyncio.create_task(admission.wait_idle(5.0))
        await asyncio.sleep(0)
    assert await waiting
