"""The adapters that a scrape shows: as last heard, while a worker that can answer is busy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol

from engine.errors import EngineError
from engine.info import AdapterInfo, ModelInfo


class AdapterSource(Protocol):
    """Who knows the adapters: the worker pool."""

    async def adapters(self, model: str | None = None) -> list[AdapterInfo]: ...

    def models(self) -> dict[str, ModelInfo]: ...

    def serves(self, model: str) -> bool: ...


class AdapterView:
    """Asks for the adapters, and remembers the answer as long as their models are served.

    Args:
        patience_seconds: how long a scrape waits for the answer.
    """

    def __init__(self, source: AdapterSource, patience_seconds: float = 1.0) -> None:
        self._source = source
        self._patience_seconds = patience_seconds
        self._adapters: Sequence[AdapterInfo] = ()

    async def refresh(self) -> None:
        """Asks anew; an answer that does not come in time leaves the last one standing."""
        if not any(self._source.serves(model) for model in self._source.models()):
            return
        with contextlib.suppress(EngineError, TimeoutError):
            self._adapters = await asyncio.wait_for(self._source.adapters(None), self._patience_seconds)

    def adapters(self) -> list[AdapterInfo]:
        """Those whose model is served now."""
        return [info for info in self._adapters if self._source.serves(info.model)]
