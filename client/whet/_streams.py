"""What the blocking client's streaming calls return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from whet._generation import GenerationReader
from whet._merging import MergeReader
from whet._quantization import QuantizeReader
from whet._retry import Attempts
from whet._sync import Caller, Stream
from whet._training import RunReader
from whet._values import run_id_of
from whet.events import Finished, TrainEvent
from whet.types import Chunk, MergeProgress, MergeReport, QuantizeProgress, QuantizeReport, Reply, RunInfo


class Generation(Stream[Chunk]):
    """Chunks of an answer as they come."""

    def __init__(
        self, caller: Caller, method: Callable[..., Any], request: Any, reader: GenerationReader, attempts: Attempts
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader

    def result(self) -> Reply:
        """Waits for the end; the whole answer, chunks that were already iterated included."""
        self._drain()
        if self._reader.reply is None:
            self._reader.end()
        assert self._reader.reply is not None
        return self._reader.reply


class QuantizeJob(Stream[QuantizeProgress]):
    """Progress of a quantization as it comes; then its report."""

    def __init__(
        self, caller: Caller, method: Callable[..., Any], request: Any, reader: QuantizeReader, attempts: Attempts
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader

    @property
    def report(self) -> QuantizeReport:
        """The report; waits for the end."""
        self._drain()
        if self._reader.report is None:
            self._reader.end()
        assert self._reader.report is not None
        return self._reader.report

    def result(self) -> QuantizeReport:
        """The same as ``report``."""
        return self.report


class MergeJob(Stream[MergeProgress]):
    """Progress of a merge as it comes; then its report."""

    def __init__(
        self, caller: Caller, method: Callable[..., Any], request: Any, reader: MergeReader, attempts: Attempts
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader

    @property
    def report(self) -> MergeReport:
        """The report; waits for the end."""
        self._drain()
        if self._reader.report is None:
            self._reader.end()
        assert self._reader.report is not None
        return self._reader.report

    def result(self) -> MergeReport:
        """The same as ``report``."""
        return self.report


class TrainingRun(Stream[TrainEvent]):
    """Events of a training run as they come.

    Closing it stops watching, not the run (unless it was begun with ``on_disconnect="cancel"``); ``Client.watch``
    attaches to it again by its id.
    """

    def __init__(
        self,
        caller: Caller,
        method: Callable[..., Any],
        request: Any,
        reader: RunReader,
        attempts: Attempts,
        cancel: Callable[[str], RunInfo],
    ) -> None:
        super().__init__(caller, method, request, reader, attempts)
        self._reader = reader
        self._cancel = cancel

    @property
    def id(self) -> str:
        """The run's id; waits until the server has taken up the run."""
        if not self._reader.run_id and not self._done:
            self._reader.run_id = run_id_of(_initial_metadata(self._call))
            if not self._reader.run_id:
                self._peek()
        return self._reader.run_id

    def cancel(self) -> RunInfo:
        """Ends the run after its present slice; its last checkpoint stays. The stream ends with ``finished``."""
        return self._cancel(self.id)

    def result(self) -> Finished:
        """Waits for the end of the run; its last event.

        Raises:
            RunFailedError: the run could not go on.
            UnavailableError: it was interrupted.
        """
        self._drain()
        return self._reader.result()


def _initial_metadata(call: Any) -> Any:
    try:
        return call.initial_metadata()
    except grpc.RpcError:  # the call failed; reading from it tells why
        return None
