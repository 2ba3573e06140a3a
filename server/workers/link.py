"""The front end's end of the line to its workers: one ZeroMQ ROUTER in a private directory.

Workers connect DEALERs that bear the identity they were started with. Frames from any other identity, and bytes that
are no message, are logged and dropped: they can neither raise here nor reach a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from server.workers.messages import AnyReport, Command, decode_report, encode

logger = logging.getLogger(__name__)

_MAX_IPC_PATH = 107  # sockaddr_un's, less the terminating zero


class Link:
    """Sends commands to workers and hands on what they report.

    Args:
        receive: gets the identity of a worker and its report; identities that it does not know it answers with False.
    """

    def __init__(self, receive: Callable[[str, AnyReport], bool]) -> None:
        self._receive = receive
        self._directory = Path(tempfile.mkdtemp(prefix="whet-"))  # mode 0700
        path = self._directory / "workers"
        if len(str(path)) > _MAX_IPC_PATH:
            self._directory.rmdir()
            raise OSError(
                f"the temporary directory's path is too long for a socket: {path}; set TMPDIR to a shorter one"
            )
        self.endpoint = f"ipc://{path}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # Unbounded: a ROUTER drops what exceeds its mark, and admission bounds what there can be.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.endpoint)
        self._reader = asyncio.create_task(self._read(), name="worker-link")

    def send(self, identity: str, message: Command) -> None:
        """Sends at once. A worker that is gone gets nothing; its exit tells."""
        sent = asyncio.ensure_future(self._socket.send_multipart([identity.encode(), encode(message)]))
        sent.add_done_callback(_log_failure)

    async def close(self) -> None:
        """Closes the socket and removes its directory."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._context.destroy(linger=0)
        self.remove_directory()

    def remove_directory(self) -> None:
        """Removes the socket's directory; for a process that is about to end without ``close``."""
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            identity = frames[0].decode("utf-8", "replace")
            try:
                report = decode_report(b"".join(frames[1:]))
            except msgspec.DecodeError as error:
                logger.warning("dropped %d bytes that are no message: %s", sum(map(len, frames[1:])), error)
                continue
            try:
                known = self._receive(identity, report)
            except Exception:
                # One report that goes wrong must not end the reading of all others.
                logger.exception("a %s from worker %s could not be handled", type(report).__name__, identity)
                continue
            if not known:
                logger.warning("dropped a %s from %r, which is no live worker", type(report).__name__, identity)


def _log_failure(sent: asyncio.Future[Any]) -> None:
    if not sent.cancelled() and (error := sent.exception()) is not None:
        logger.error("a command could not be sent: %s", error)
