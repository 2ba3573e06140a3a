"""Outputs of steps on their way out of a worker."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.request import RequestOutput


class OutputSender:
    """Sends outputs, those of short decode steps together.

    A message to a client takes a few tenths of a millisecond of the front end's time and the client's, whatever is in
    it: as much as a token of a small model, or of a GPU, and where the engine has all cores, of its time. So tokens of
    steps that follow each other within ``interval_seconds`` leave together. Nothing that somebody waits for is kept: a
    first token, an end, or anything if what comes before the next outputs is longer than a decode step.

    Args:
        send: takes the outputs of a message.
        interval_seconds: between two messages; 0: each step has its own.
    """

    def __init__(
        self,
        send: Callable[[list[RequestOutput]], None],
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._interval = interval_seconds
        self._clock = clock
        self._kept: list[RequestOutput] = []
        self._sent_at = float("-inf")

    def take(self, outputs: list[RequestOutput], *, only_decodes: Callable[[], bool]) -> None:
        """Sends the outputs of a step, now or with those of the next.

        Args:
            only_decodes: whether a short decode step is all that comes before the next outputs.
        """
        # A prefill chunk that brought no token yet is no news.
        self._kept += [output for output in outputs if output.token_ids or output.finish_reason]
        if not (
            self._clock() - self._sent_at < self._interval
            and all(len(o.token_ids) < o.num_completion_tokens and not o.finish_reason for o in outputs)
            and only_decodes()
        ):
            self.flush()

    def flush(self) -> None:
        """Sends what was kept."""
        if self._kept:
            kept, self._kept = self._kept, []
            self._sent_at = self._clock()
            self._send(kept)
