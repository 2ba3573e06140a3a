"""What the asyncio client's streaming calls return. The counterpart of ``_streams``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Self

import grpc

from whet._async import AsyncCaller, AsyncStream
from whet._generation import GenerationReader
from whet._merging import MergeReader
from whet._quantization import QuantizeReader
from whet._retry import Attempts
from whet._training import RunReader
from whet._values import run_id_of
from whet.events import Finished, TrainEvent
from whet.types import Chunk, MergeProgress, MergeReport, QuantizeProgress, QuantizeReport, Reply, RunInfo


class AsyncGeneration(AsyncStream[Chunk]):
    """Chunks of an answer as they come."""

    def __init__(
        self,
        caller: AsyncCaller,
        method: Callable[..., Any],
        request: Any,
        reader: GenerationReader,
        attempts: Attempts,
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader

    async def result(self) -> Reply:
        """Waits for the end; the whole answer, chunks that were already iterated included."""
        await self._drain()
        if self._reader.reply is None:
            self._reader.end()
        assert self._reader.reply is not None
        return self._reader.reply


class AsyncQuantizeJob(AsyncStream[QuantizeProgress]):
    """Progress of a quantization as it comes; then its report."""

    def __init__(
        self, caller: AsyncCaller, method: Callable[..., Any], request: Any, reader: QuantizeReader, attempts: Attempts
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader

    @property
    def report(self) -> QuantizeReport:
        """The report, after the end.

        Raises:
            RuntimeError: it has not ended; ``await job.result()`` waits for it.
        """
        if self._reader.report is None:
            raise RuntimeError("the quantization has not ended; iterate to its end, or await result()")
        return self._reader.report

    async def result(self) -> QuantizeReport:
        """Waits for the end; the report."""
        await self._drain()
        if self._reader.report is None:
            self._reader.end()
        return self.report


class AsyncMergeJob(AsyncStream[MergeProgress]):
    """Progress of a merge as it comes; then its report."""

    def __init__(
        self, caller: AsyncCaller, method: Callable[..., Any], request: Any, reader: MergeReader, attempts: Attempts
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader

    @property
    def report(self) -> MergeReport:
        """The report, after the end.

        Raises:
            RuntimeError: it has not ended; ``await job.result()`` waits for it.
        """
        if self._reader.report is None:
            raise RuntimeError("the merge has not ended; iterate to its end, or await result()")
        return self._reader.report

    async def result(self) -> MergeReport:
        """Waits for the end; the report."""
        await self._drain()
        if self._reader.report is None:
            self._reader.end()
        return self.report


class AsyncTrainingRun(AsyncStream[TrainEvent]):
    """Events of a training run as they come.

    Closing it stops watching, not the run (unless it was begun with ``on_disconnect="cancel"``); ``AsyncClient.watch``
    attaches to it again by its id.
    """

    def __init__(
        self,
        caller: AsyncCaller,
        method: Callable[..., Any],
        request: Any,
        reader: RunReader,
        attempts: Attempts,
        cancel: Callable[[str], Awaitable[RunInfo]],
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader
        self._cancel = cancel

    async def _ready(self) -> Self:
        if not self._reader.run_id and not self._done:
            self._reader.run_id = run_id_of(await _initial_metadata(self._call))
            if not self._reader.run_id:
                await self._peek()
        return self

    @property
    def id(self) -> str:
        """The run's id, once the run was awaited or has brought an event.

        Raises:
            RuntimeError: it is not known yet.
        """
        if not self._reader.run_id:
            raise RuntimeError("the run's id is not known yet; await the run, or its first event")
        return self._reader.run_id

    async def cancel(self) -> RunInfo:
        """Ends the run after its present slice; its last checkpoint stays. The stream ends with ``finished``."""
        return await self._cancel((await self).id)

    async def result(self) -> Finished:
        """Waits for the end of the run; its last event.

        Raises:
            RunFailedError: the run could not go on.
            UnavailableError: it was interrupted.
        """
        await self._drain()
        return self._reader.result()


async def _initial_metadata(call: Any) -> Any:
    try:
        return await call.initial_metadata()
    except grpc.RpcError:  # the call failed; reading from it tells why
        return None
