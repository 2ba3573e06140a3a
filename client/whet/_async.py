"""Calls for asyncio: deadlines, retries, typed errors, streams. The counterpart of ``_sync``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from whet._channel import TLS, call_metadata, channel_options
from whet._retry import NO_RETRY, Attempts, RetryPolicy
from whet._status import error_from_rpc
from whet._sync import Reader
from whet.errors import WhetError

ItemT = TypeVar("ItemT")
ResponseT = TypeVar("ResponseT")


class AsyncCaller:
    """A channel, and how calls are made over it.

    The channel is made by the first call, because it belongs to the event loop that is running then.
    """

    def __init__(
        self, address: str, *, token: str | None, tls: TLS | None, timeout: float, retry: RetryPolicy, max_bytes: int
    ) -> None:
        self._address = address
        self._tls = tls
        self._options = channel_options(max_bytes, tls)
        self._metadata = call_metadata(token)
        self._timeout = timeout
        self._retry = retry
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel."""
        if self._channel is None:
            if self._tls is None:
                self._channel = grpc.aio.insecure_channel(self._address, options=self._options)
            else:
                credentials = self._tls.credentials()
                self._channel = grpc.aio.secure_channel(self._address, credentials, options=self._options)
        return self._channel

    async def close(self) -> None:
        """Closes the channel; its calls are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    def attempts(self, timeout: float | None, *, repeat: bool = True, default: float | None = None) -> Attempts:
        """The attempts of a new call; see ``Caller.attempts``."""
        fallback = self._timeout if default is None else default
        return Attempts(self._retry if repeat else NO_RETRY, fallback if timeout is None else timeout)

    async def unary(
        self,
        method: Callable[..., Awaitable[ResponseT]],
        request: Any,
        request_id: str,
        *,
        timeout: float | None = None,
        repeat: bool = True,
    ) -> ResponseT:
        """Makes a call with one response; see ``Caller.unary``."""
        attempts = self.attempts(timeout, repeat=repeat)
        while True:
            try:
                return await method(
                    request() if callable(request) else request,
                    timeout=attempts.remaining(),
                    metadata=self._metadata,
                )
            except grpc.RpcError as failure:
                error = error_from_rpc(failure, request_id)
                delay = attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            await asyncio.sleep(delay)

    def begin(self, method: Callable[..., Any], request: Any, remaining: float | None) -> Any:
        """Begins a call with a stream of responses."""
        return method(request() if callable(request) else request, timeout=remaining, metadata=self._metadata)


class AsyncStream(Generic[ItemT], AsyncIterator[ItemT]):
    """Items as the server sends them. The call begins at once.

    Awaiting the stream waits until the server has taken up the work, and gives the stream itself. Closing it, leaving
    its ``async with`` block, or dropping the last reference cancels the call.
    """

    _call: Any = None

    def __init__(
        self, caller: AsyncCaller, method: Callable[..., Any], request: Any, reader: Reader[ItemT], attempts: Attempts
    ) -> None:
        self._begin: Callable[[], Any] = lambda: caller.begin(method, request, attempts.remaining())
        self._stream_reader = reader
        self._attempts = attempts
        self._items: deque[ItemT] = deque()
        self._received = False
        self._done = False
        self._loop = asyncio.get_running_loop()
        self._call = self._begin()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ItemT:
        while not self._items:
            if self._done:
                raise StopAsyncIteration
            try:
                response = await self._receive()
                if response is grpc.aio.EOF:
                    self._done = True
                    self._stream_reader.end()
                else:
                    self._items.extend(self._stream_reader.feed(response))
            except WhetError:
                self._stop()
                raise
        return self._items.popleft()

    async def _receive(self) -> Any:
        """The next response or EOF. Only before the first one is a failed call repeated."""
        while True:
            try:
                response = await self._call.read()
            except grpc.RpcError as failure:
                error = error_from_rpc(failure, self._stream_reader.request_id)
                delay = None if self._received else self._attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            else:
                self._received = True
                return response
            await asyncio.sleep(delay)
            self._call = self._begin()

    def __await__(self) -> Generator[Any, None, Self]:
        return self._ready().__await__()

    async def _ready(self) -> Self:
        await self._peek()
        return self

    async def _peek(self) -> None:
        """Waits for the first item, or the end."""
        if not self._items and not self._done:
            try:
                self._items.appendleft(await self.__anext__())
            except StopAsyncIteration:
                return

    async def _drain(self) -> None:
        """Drops all further items."""
        async for _ in self:
            pass

    @property
    def request_id(self) -> str:
        """Of the request; the server's log has it, too."""
        return self._stream_reader.request_id

    def _stop(self) -> None:
        self._done = True
        self._items.clear()
        if self._call is not None:
            self._call.cancel()

    async def close(self) -> None:
        """Cancels the call, if it has not ended. Nothing more is iterated."""
        self._stop()

    aclose = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def __del__(self) -> None:
        # gRPC's own call object stays alive by its tasks, and would go on receiving. Garbage may be collected in any
        # thread, and after the loop has ended.
        if self._call is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)
