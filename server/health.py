"""Health: what Kubernetes and load balancers are told.

``""`` is liveness: the server and its workers do their work, or are about to. Each service's name and ``model/NAME`` is
readiness: a call now would be served. A dead or hung worker never looks healthy.
"""

from __future__ import annotations

from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from server.admission import Admission
from server.models import ModelRegistry
from server.workers.pool import WorkerPool

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Derives health from the parts of the server, and serves it as grpc.health.v1.

    Args:
        service_names: full names of the services, such as "whet.v1.GenerationService".
    """

    def __init__(
        self, service_names: Sequence[str], pool: WorkerPool, models: ModelRegistry, admission: Admission
    ) -> None:
        self.servicer = health.aio.HealthServicer()
        self._service_names = list(service_names)
        self._pool = pool
        self._models = models
        self._admission = admission
        self._pool_started = False
        self._reported: dict[str, int] = {}

    def pool_started(self) -> None:
        """From now on workers are expected to be well."""
        self._pool_started = True

    @property
    def live(self) -> bool:
        """Whether the workers are well, or will be for all one knows: false where one hangs, is down or restarts."""
        return not self._pool_started or self._admission.state == "draining" or self._pool.healthy

    @property
    def ready(self) -> bool:
        """Whether all configured models would be served now."""
        return self._admission.state == "open" and all(
            entry.state == "ready" and self._pool.serves(entry.name) for entry in self._models.configured()
        )

    def why_not_ready(self) -> str:
        """One line for people; "" when ready."""
        if self._admission.state != "open":
            return self._admission.state
        waiting = [
            f"model {entry.name} is {entry.state if entry.state != 'ready' else 'without a healthy worker'}"
            for entry in self._models.configured()
            if entry.state != "ready" or not self._pool.serves(entry.name)
        ]
        return "; ".join(waiting)

    async def update(self) -> None:
        """Publishes the present state; watchers hear of changes."""
        ready = self.ready
        statuses = {"": self.live and self._admission.state != "draining"}
        statuses.update(dict.fromkeys(self._service_names, ready))
        for entry in self._models.entries():
            serving = self._admission.state == "open" and entry.state == "ready" and self._pool.serves(entry.name)
            statuses[f"model/{entry.name}"] = serving
        for name, serving in statuses.items():
            status = SERVING if serving else NOT_SERVING
            if self._reported.get(name) != status:
                self._reported[name] = status
                await self.servicer.set(name, status)
