"""Work that several calls may follow: a repeated call with the same idempotency key finds what the first one began."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

from engine.errors import AlreadyExistsError

T = TypeVar("T")
KEPT = 256
"""Finished works that are remembered."""


class _Work(Generic[T]):
    """One generator, run by a task of its own, and what it has yielded.

    Attributes: is_ending: it was cancelled, and may still be clearing up.
    """

    def __init__(self, fingerprint: bytes, source: AsyncGenerator[T]) -> None:
        self.fingerprint = fingerprint
        self.items: list[T] = []
        self.followers = 0
        self.is_ending = False
        self._more = asyncio.Event()
        self.task = asyncio.create_task(self._run(source))
        self.task.add_done_callback(lambda _: self._announce())

    async def _run(self, source: AsyncGenerator[T]) -> None:
        async with aclosing(source):
            async for item in source:
                self.items.append(item)
                self._announce()

    def _announce(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()

    async def follow(self) -> AsyncGenerator[T]:
        """Yields everything from the beginning; raises what the work raised."""
        sent = 0
        while True:
            more = self._more
            while sent < len(self.items):
                sent += 1
                yield self.items[sent - 1]
            if self.task.done():
                self.task.result()
                return
            await more.wait()


class SharedWork(Generic[T]):
    """Works by their keys. A failed or cancelled one is forgotten, so that it can be tried again."""

    def __init__(self) -> None:
        self._works: OrderedDict[str, _Work[T]] = OrderedDict()

    async def follow(self, key: str, fingerprint: bytes, start: Callable[[], AsyncGenerator[T]]) -> AsyncGenerator[T]:
        """Follows the work of that key, begun by ``start`` if there is none.

        The work is cancelled when its last follower leaves before its end; who comes then waits until it has cleared
        up, and begins anew.

        Args:
            fingerprint: of what is asked for; a key stands for one thing only.
        Raises:
            AlreadyExistsError: the key was used for something else.
        """
        while (work := self._works.get(key)) is not None and work.is_ending and not work.task.done():
            await asyncio.wait({work.task})
        if work is None:
            work = self._works[key] = _Work(fingerprint, start())
            work.task.add_done_callback(lambda _: self._ended(key))
        elif work.fingerprint != fingerprint:
            raise AlreadyExistsError(
                f"request_id {key!r} was used for another request; accepted: one id per request",
                field="request_id",
                reason="REQUEST_ID_REUSED",
            )
        work.followers += 1
        try:
            async with aclosing(work.follow()) as items:
                async for item in items:
                    yield item
        finally:
            work.followers -= 1
            if work.followers == 0 and not work.task.done():
                work.is_ending = True
                work.task.cancel()
                await asyncio.wait({work.task})

    def _ended(self, key: str) -> None:
        work = self._works[key]
        if work.task.cancelled() or work.task.exception() is not None:
            del self._works[key]
        finished = [name for name, other in self._works.items() if other.task.done()]
        for name in finished[: max(0, len(finished) - KEPT)]:
            del self._works[name]
