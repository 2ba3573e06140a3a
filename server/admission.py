"""Admission: what may start, decided before any work is done on a request, and reserved at the decision."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from engine.errors import OverloadedError, UnavailableError
from server.metrics import Metrics

GateState = Literal["loading", "open", "draining"]


class Admission:
    """Counts the work in progress against a limit, and refuses new work while loading and draining.

    Args:
        capacity: units at once; a completion is one unit, any other call is one.
        metrics: counts rejections.
    """

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self._capacity = capacity
        self._metrics = metrics
        self._in_use = 0
        self._state: GateState = "loading"
        self._idle = asyncio.Event()
        self._idle.set()
        self._mean_seconds = 0.0

    @property
    def state(self) -> GateState:
        """Whether new work is taken."""
        return self._state

    @property
    def in_use(self) -> int:
        """Units reserved now."""
        return self._in_use

    def open(self) -> None:
        """Takes work from now on."""
        self._state = "open"

    def drain(self) -> None:
        """Takes no work any more."""
        self._state = "draining"

    async def wait_idle(self, timeout: float) -> bool:
        """Waits for all work in progress to end; False after ``timeout`` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def check_open(self) -> None:
        """Raises UnavailableError unless new work is taken."""
        if self._state == "loading":
            self._metrics.admission_rejections_total.labels("loading").inc()
            raise UnavailableError("the server is loading its models; try again soon", reason="LOADING")
        if self._state == "draining":
            self._metrics.admission_rejections_total.labels("draining").inc()
            raise UnavailableError("the server is shutting down and takes no new work", reason="DRAINING")

    def check_serving(self) -> None:
        """Raises UnavailableError while the models are loading; reading is allowed while draining."""
        if self._state == "loading":
            raise UnavailableError("the server is loading its models; try again soon", reason="LOADING")

    @contextmanager
    def reserve(self, units: int = 1) -> Iterator[None]:
        """Holds ``units`` while the body runs.

        Raises:
            UnavailableError: the server is loading or draining.
            OverloadedError: the limit is reached; it says when to try again.
        """
        self.check_open()
        if self._in_use + units > self._capacity:
            self._metrics.admission_rejections_total.labels("queue_full").inc()
            raise OverloadedError(
                f"{self._in_use} of {self._capacity} places are taken and the request needs {units}",
                reason="QUEUE_FULL",
                retry_after_seconds=self._retry_after(units),
            )
        self._in_use += units
        self._idle.clear()
        began = time.monotonic()
        try:
            yield
        finally:
            self._in_use -= units
            seconds = time.monotonic() - began
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            if self._in_use == 0:
                self._idle.set()

    def _retry_after(self, units: int) -> float:
        """When that many places should be free, were they to free up at the recent rate."""
        return min(max(self._mean_seconds * units / self._capacity, 0.1), 5.0)
