"""Idempotent calls: one work for one key, seen whole by all who follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from engine.errors import AlreadyExistsError
from server.shared_work import KEPT, SharedWork


class Source:
    """Counts its starts and ends; yields 0, 1, 2 when told to go on."""

    def __init__(self) -> None:
        self.starts = 0
        self.ends = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> AsyncGenerator[int]:
        self.starts += 1
        try:
            yield 0
            await self.go.wait()
            if self.error is not None:
                raise self.error
            yield 1
            yield 2
        finally:
            self.ends += 1


async def settle() -> None:
    """Lets every task go as far as it can without another event: by turns of the loop, since time orders nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


async def collect(items: AsyncGenerator[int]) -> list[int]:
    return [item async for item in items]


async def test_a_second_call_finds_the_first_ones_work() -> None:
    works, source = SharedWork[int](), Source()
    first = asyncio.create_task(collect(works.follow("k", b"", source)))
    second = asyncio.create_task(collect(works.follow("k", b"", source)))
    await settle()
    source.go.set()
    assert await first == await second == [0, 1, 2]
    assert await collect(works.follow("k", b"", source)) == [0, 1, 2]
    assert source.starts == 1


async def test_a_key_stands_for_one_request() -> None:
    works, source = SharedWork[int](), Source()
    source.go.set()
    await collect(works.follow("k", b"a", source))
    with pytest.raises(AlreadyExistsError, match="'k'"):
        await collect(works.follow("k", b"b", source))


async def test_it_ends_with_its_last_follower() -> None:
    works, source = SharedWork[int](), Source()
    followers = [asyncio.create_task(collect(works.follow("k", b"", source))) for _ in range(2)]
    await settle()
    followers[0].cancel()
    await asyncio.wait({followers[0]})
    assert source.ends == 0
    followers[1].cancel()
    await asyncio.wait({followers[1]})
    assert source.ends == 1
    source.go.set()
    assert await collect(works.follow("k", b"", source)) == [0, 1, 2]  # begun anew
    assert source.starts == 2


async def test_a_failure_reaches_every_follower_and_can_be_tried_again() -> None:
    works, source = SharedWork[int](), Source()
    source.error = ZeroDivisionError()
    followers = [asyncio.create_task(collect(works.follow("k", b"", source))) for _ in range(2)]
    await settle()
    source.go.set()
    for follower in followers:
        with pytest.raises(ZeroDivisionError):
            await follower
    source.error = None
    assert await collect(works.follow("k", b"", source)) == [0, 1, 2]


async def test_only_so_many_are_remembered() -> None:
    works, source = SharedWork[int](), Source()
    source.go.set()
    for number in range(KEPT + 2):
        await collect(works.follow(str(number), b"", source))
    assert source.starts == KEPT + 2
    await collect(works.follow(str(KEPT + 1), b"", source))
    assert source.starts == KEPT + 2
    await collect(works.follow("0", b"", source))
    assert source.starts == KEPT + 3


async def test_a_call_that_comes_while_the_work_clears_up_begins_it_anew() -> None:
    works, source, cleared = SharedWork[int](), Source(), asyncio.Event()

    async def slow_to_end() -> AsyncGenerator[int]:
        try:
            async for item in source():
                yield item
        finally:
            await cleared.wait()

    first = asyncio.create_task(collect(works.follow("k", b"a", slow_to_end)))
    await settle()
    first.cancel()
    await settle()
    retry = asyncio.create_task(collect(works.follow("k", b"b", source)))  # the cancelled one holds the key for nothing
    await settle()
    assert source.starts == 1
    cleared.set()
    source.go.set()
    assert await retry == [0, 1, 2]
    assert source.starts == 2
    with pytest.raises(asyncio.CancelledError):
        await first
