"""The worker's sign of life: a thread beside the loop, which tells what the loop is at and for how long.

One forward of a large model on a CPU may take minutes, and so may a hang; no loop can beat in the middle of either. So
this thread beats, and leaves the judgement to the front end: a process that is silent is dead or stopped, and a loop
that has stood at one thing for too long is taken for hung.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from server.workers.messages import Heartbeat, encode

HEARTBEAT_SUFFIX = "/heartbeat"
"""What a worker's identity ends in on the socket of this thread: sockets are not to be shared between threads."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What the loop is at. Attributes: announced: said beforehand to take minutes; since: time.monotonic()."""

    doing: str
    announced: bool = False
    since: float = field(default_factory=time.monotonic)


class HeartbeatThread:
    """Beats at every interval until it is stopped, and at once when long work begins or ends.

    Args:
        identity: of the worker.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: str, interval: float) -> None:
        self._context = context
        self._endpoint = endpoint
        self._identity = identity
        self._interval = interval
        self._activity = Activity("")
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; its socket is closed on return."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def turn(self, doing: str) -> None:
        """The loop goes on, with this."""
        # One assignment, so that the thread reads either the old activity or the new one whole.
        self._activity = Activity(doing)

    @contextlib.contextmanager
    def announced(self, doing: str) -> Iterator[None]:
        """While the body runs, the loop is at work that honestly takes minutes."""
        self._activity = Activity(doing, announced=True)
        self._wake.set()
        try:
            yield
        finally:
            self._activity = Activity("")
            self._wake.set()

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, (self._identity + HEARTBEAT_SUFFIX).encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._endpoint)
        try:
            while not self._stopping:
                self._wake.clear()
                now = self._activity
                beat = Heartbeat(
                    doing=now.doing, announced=now.announced, seconds=max(0.0, time.monotonic() - now.since)
                )
                with contextlib.suppress(zmq.Again):  # a front end that reads none for so long needs no more of them
                    socket.send(encode(beat), zmq.NOBLOCK)
                self._wake.wait(self._interval)
        finally:
            socket.close()
