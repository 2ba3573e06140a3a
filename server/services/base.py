"""What every servicer is given."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from engine.errors import InvalidArgumentError, UnavailableError
from engine.jobs import JobEvent, JobFailed, JobSpec
from server.admission import Admission
from server.config import ServerConfig
from server.errors import error_from_code, over_limit
from server.metrics import Metrics
from server.models import ModelRegistry, ReadyModel
from server.rpc import current_call
from server.workers.pool import WorkerPool

DEFAULT_PAGE_SIZE = 100


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of the front end that servicers share."""

    config: ServerConfig
    pool: WorkerPool
    models: ModelRegistry
    admission: Admission
    metrics: Metrics

    @contextmanager
    def working_on(self, name: str, *, units: int = 1, task: str | None = None) -> Iterator[ReadyModel]:
        """Reserves ``units`` and a ready model while the body runs, in this order.

        Raises:
            UnavailableError, OverloadedError: no work is taken now.
            NotFoundError, FailedPreconditionError: of the model.
        """
        with self.admission.reserve(units):
            current_call().notes["model"] = name[:128]
            model = self.models.ready(name, task=task)
            with model.entry.use():
                yield model

    async def job_events(self, spec: JobSpec, model: ReadyModel) -> AsyncGenerator[JobEvent]:
        """The events of a job, the last one a success. Closing it cancels the job.

        Raises:
            EngineError: the job was refused or failed.
        """
        async with aclosing(model.entry.guard(self.pool.run_job(spec))) as events:
            async for event in events:
                if isinstance(event, JobFailed):
                    if self.admission.state == "draining":
                        raise UnavailableError("the server is shutting down and ended the job", reason="DRAINING")
                    raise error_from_code(event.error_code, event.error_message, event.error_reason, event.error_field)
                yield event

    async def adopt(self, output: str) -> bool:
        """Takes up a model that a job has written and, where the workers could, loaded; says whether it is loaded."""
        await self.models.refresh()
        info = self.pool.models().get(output)
        if info is None:
            return False
        await self.models.adopt(output, info)
        return True

    def page_size(self, asked: int) -> int:
        """How many items a page may have; 0 asks for the default.

        Raises:
            InvalidArgumentError: it is negative or above the limit.
        """
        limit = self.config.max_page_size
        if asked < 0:
            raise InvalidArgumentError(f"page_size is {asked}; accepted: 0 to {limit}", field="page_size")
        if asked > limit:
            raise over_limit("page_size", asked, limit)
        return asked or min(DEFAULT_PAGE_SIZE, limit)


def encode_page_token(cursor: str) -> str:
    """An opaque token of the place where the next page begins."""
    return base64.urlsafe_b64encode(cursor.encode()).decode()


def decode_page_token(token: str) -> str | None:
    """The cursor; None for the first page.

    Raises:
        InvalidArgumentError: it is no token of ours.
    """
    if not token:
        return None
    try:
        return base64.b64decode(token.encode("ascii"), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidArgumentError(
            f"page_token is {token[:40]!r}; accepted: the next_page_token of an earlier reply", field="page_token"
        ) from None
