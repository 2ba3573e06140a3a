"""The front end's end of the line to its workers: one ZeroMQ ROUTER in a private directory.

Workers connect DEALERs that bear the identity they were started with. Frames from any other identity, and bytes that
are no message, are logged and dropped: they can neither raise here nor reach a request.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from server.workers.messages import AnyReport, Command, decode_report, encode

logger = logging.getLogger(__name__)

READS_PER_TURN = 64
"""Messages that are read before the event loop goes round."""
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
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        # Unbounded: a ROUTER drops what exceeds its mark, and admission bounds what there can be.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.endpoint)
        # Not zmq.asyncio's: its futures and turns of the loop took a tenth of this process's time for a token.
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)
        self._loop.call_soon(self._read)

    def send(self, identity: str, message: Command) -> None:
        """Sends at once. A worker that is gone gets nothing; its exit tells."""
        try:
            self._socket.send_multipart([identity.encode(), encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.error("a message to a worker could not be sent: %s", error)
        # The descriptor tells of arrivals once, and sending takes note of them, too.
        self._loop.call_soon(self._read)

    async def close(self) -> None:
        """Closes the socket and removes its directory."""
        self._loop.remove_reader(self._socket)
        self._socket.close(linger=0)
        self._context.destroy(linger=0)
        self.remove_directory()

    def remove_directory(self) -> None:
        """Removes the socket's directory; for a process that is about to end without ``close``."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _read(self) -> None:
        """Takes all that has arrived; after some of it, others of this process have their turn first."""
        for _ in range(READS_PER_TURN):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frames)
        self._loop.call_soon(self._read)

    def _take(self, frames: list[bytes]) -> None:
        identity = frames[0].decode("utf-8", "replace")
        try:
            report = decode_report(b"".join(frames[1:]))
        except msgspec.DecodeError as error:
            logger.warning("dropped %d bytes that are no message: %s", sum(map(len, frames[1:])), error)
            return
        try:
            known = self._receive(identity, report)
        except Exception:
            # One report that goes wrong must not end the reading of all others.
            logger.exception("a %s from worker %s could not be handled", type(report).__name__, identity)
            return
        if not known:
            logger.warning("dropped a %s from %r, which is no live worker", type(report).__name__, identity)
