"""Which worker gets the next request: the least loaded of those that hold the model."""

from __future__ import annotations

import asyncio

from engine.errors import NotFoundError, UnavailableError
from engine.info import ModelInfo
from server.workers.replica import Replica


class Router:
    """All workers, the models that they serve, and a way to wait for either to change.

    Attributes:
        replicas: in the order of their devices.
        infos: every model that has been loaded and not unloaded; it stays while a worker restarts.
        configured: names that are to be loaded; those without info are still loading, or failed to.
        draining: no new work is accepted.
    """

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.infos: dict[str, ModelInfo] = {}
        self.configured: set[str] = set()
        self.draining = False
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wakes all who wait for a change."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self) -> None:
        """Waits for the next change of a worker's state or models."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def info(self, model: str) -> ModelInfo:
        """The model of that name.

        Raises:
            NotFoundError: there is none.
            UnavailableError: it is being loaded for the first time.
        """
        if model in self.infos:
            return self.infos[model]
        if model in self.configured:
            raise UnavailableError(f"model {model!r} is being loaded", field="model", reason="MODEL_LOADING")
        known = ", ".join(sorted(self.infos)) or "none"
        raise NotFoundError(f"model {model!r} is not loaded; loaded: {known}", field="model", reason="MODEL_NOT_FOUND")

    def holding(self, model: str) -> list[Replica]:
        """The live workers that hold a model, least loaded first."""
        held = [replica for replica in self.replicas if replica.answers and model in replica.models]
        return sorted(held, key=lambda replica: (replica.load, replica.index))

    async def acquire(self, model: str) -> Replica:
        """The least loaded worker that holds the model; waits while none does but one may again.

        Raises:
            NotFoundError: the model is not loaded.
            UnavailableError: it is loading for the first time, or could not be loaded again; the server is draining,
                or every worker is down for good.
        """
        while True:
            self.refuse_if_draining()
            self.info(model)
            if held := self.holding(model):
                return held[0]
            self._refuse_if_down()
            if not any(replica.may_come_to_hold(model) for replica in self.replicas):
                why = next((r.failures[model].message for r in self.replicas if model in r.failures), "")
                raise UnavailableError(
                    f"no worker holds model {model!r}" + (f", as it could not be loaded again: {why}" if why else ""),
                    field="model",
                    reason="MODEL_LOAD_FAILED",
                )
            await self.changed()

    async def acquire_any(self) -> Replica:
        """A worker that has all its models; waits while none has.

        Raises:
            UnavailableError: every worker is down for good.
        """
        while True:
            restored = [replica for replica in self.replicas if replica.state == "up"]
            if restored:
                return restored[0]
            self._refuse_if_down()
            await self.changed()

    def refuse_if_draining(self) -> None:
        """Raises:
        UnavailableError: the server is draining.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down", reason="DRAINING")

    def _refuse_if_down(self) -> None:
        if all(replica.state in ("failed", "stopped") for replica in self.replicas):
            raise UnavailableError("every worker is down; the server's log tells why", reason="WORKERS_DOWN")
