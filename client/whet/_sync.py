"""Blocking calls: deadlines, retries, typed errors, streams."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from whet._channel import TLS, call_metadata, channel_options
from whet._retry import NO_RETRY, Attempts, RetryPolicy
from whet._status import error_from_rpc
from whet.errors import WhetError

ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)
ResponseT = TypeVar("ResponseT")


class Reader(Protocol[ItemT_co]):
    """Makes items of a stream's responses; knows nothing of how they arrive."""

    @property
    def request_id(self) -> str:
        """Of the request, for errors."""

    def feed(self, response: Any) -> Sequence[ItemT_co]:
        """Takes the next response; returns what it brings."""

    def end(self) -> None:
        """Raises if the stream ended too early."""


class Caller:
    """A channel, and how calls are made over it.

    Args:
        timeout: seconds for a call that names none.
    """

    def __init__(
        self, address: str, *, token: str | None, tls: TLS | None, timeout: float, retry: RetryPolicy, max_bytes: int
    ) -> None:
        options = channel_options(max_bytes, tls)
        if tls is None:
            self.channel = grpc.insecure_channel(address, options=options)
        else:
            self.channel = grpc.secure_channel(address, tls.credentials(), options=options)
        self._metadata = call_metadata(token)
        self._timeout = timeout
        self._retry = retry

    def attempts(self, timeout: float | None, *, repeat: bool = True, default: float | None = None) -> Attempts:
        """The attempts of a new call.

        Args:
            repeat: the call is safe to repeat.
            default: in place of the client's default timeout.
        """
        fallback = self._timeout if default is None else default
        return Attempts(self._retry if repeat else NO_RETRY, fallback if timeout is None else timeout)

    def unary(
        self,
        method: Callable[..., ResponseT],
        request: Any,
        request_id: str,
        *,
        timeout: float | None = None,
        repeat: bool = True,
    ) -> ResponseT:
        """Makes a call with one response.

        Args:
            method: of a stub.
            request: a message, or a function that makes a new iterator of messages for each attempt.
        Raises:
            WhetError: the call failed.
        """
        attempts = self.attempts(timeout, repeat=repeat)
        while True:
            try:
                return method(
                    request() if callable(request) else request,
                    timeout=attempts.remaining(),
                    metadata=self._metadata,
                )
            except grpc.RpcError as failure:
                error = error_from_rpc(failure, request_id)
                delay = attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            time.sleep(delay)

    def begin(self, method: Callable[..., Any], request: Any, remaining: float | None) -> Any:
        """Begins a call with a stream of responses."""
        return method(request() if callable(request) else request, timeout=remaining, metadata=self._metadata)


class Stream(Generic[ItemT], Iterator[ItemT]):
    """Items as the server sends them. The call begins at once.

    Closing it, leaving its ``with`` block, or dropping the last reference cancels the call.
    """

    _call: Any = None

    def __init__(
        self, caller: Caller, method: Callable[..., Any], request: Any, reader: Reader[ItemT], attempts: Attempts
    ) -> None:
        self._begin: Callable[[], Any] = lambda: caller.begin(method, request, attempts.remaining())
        self._stream_reader = reader
        self._attempts = attempts
        self._items: deque[ItemT] = deque()
        self._received = False
        self._done = False
        self._call = self._begin()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ItemT:
        while not self._items:
            if self._done:
                raise StopIteration
            try:
                response = self._receive()
                self._items.extend(self._stream_reader.feed(response))
            except StopIteration:
                self._done = True
                self._stream_reader.end()
            except WhetError:
                self.close()
                raise
        return self._items.popleft()

    def _receive(self) -> Any:
        """The next response. Only before the first one is a failed call repeated."""
        while True:
            try:
                response = next(self._call)
            except grpc.RpcError as failure:
                error = error_from_rpc(failure, self._stream_reader.request_id)
                delay = None if self._received else self._attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            else:
                self._received = True
                return response
            time.sleep(delay)
            self._call = self._begin()

    def _peek(self) -> None:
        """Waits for the first item, or the end."""
        with contextlib.suppress(StopIteration):
            self._items.appendleft(next(self))

    def _drain(self) -> None:
        """Drops all further items."""
        for _ in self:
            pass

    @property
    def request_id(self) -> str:
        """Of the request; the server's log has it, too."""
        return self._stream_reader.request_id

    def close(self) -> None:
        """Cancels the call, if it has not ended. Nothing more is iterated."""
        self._done = True
        self._items.clear()
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._call is not None:
            self._call.cancel()


UNBOUNDED = math.inf
"""Timeout of calls that take as long as they take."""
