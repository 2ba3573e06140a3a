"""Bytes that are no message, on either end of the line between front end and worker, reach nobody."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from server.workers.messages import JobEvents, Ready, Reply, encode
from server.workers.pool import WorkerPool
from tests.faults.workers import MODEL, generate, on_shared_loop, request, running_pool, until


@on_shared_loop
async def test_strangers_on_the_front_ends_socket_are_ignored(
    shared_pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage, and well-formed messages from a peer that is no worker, are logged and dropped."""
    assert shared_pool._link is not None
    context = zmq.asyncio.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.IDENTITY, b"0-stranger")
    try:
        stranger.connect(shared_pool._link.endpoint)
        with caplog.at_level(logging.WARNING):
            for data in (b"", b"\x00", os.urandom(1000), b"\x81" * 5000):
                await stranger.send(data)
            await stranger.send_multipart([b"a", b"b", b"c"])
            for report in (Ready(device="cuda:7"), Reply(call_id=1), JobEvents(events=[])):
                await stranger.send(encode(report))
            await until(lambda: caplog.text.count("dropped") >= 8)
        assert "no live worker" in caplog.text
        assert "no message" in caplog.text
        assert shared_pool.snapshot()[0].device == "cpu"
        assert len(await generate(shared_pool, request(8))) == 8
    finally:
        context.destroy(linger=0)


@on_shared_loop
async def test_a_peer_that_speaks_another_protocol_is_ignored(shared_pool: WorkerPool) -> None:
    assert shared_pool._link is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(shared_pool._link.endpoint.removeprefix("ipc://"))
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: whet\r\n\r\n" + os.urandom(4096))
        assert len(await generate(shared_pool, request(8))) == 8


async def test_garbage_to_a_worker_is_ignored(
    capfd: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    """The worker logs it, and goes on with the same process."""
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        assert pool._link is not None
        before = pool.snapshot()[0].pid
        worker = pool._router.replicas[0].identity.encode()
        for data in (b"", b"\x00", os.urandom(1000), encode(Ready(device="cpu"))):
            pool._link._socket.send_multipart([worker, data])
        assert len(await generate(pool, request(8))) == 8
        after = pool.snapshot()[0]
        assert (after.pid, after.restarts) == (before, 0)
        assert capfd.readouterr().err.count("no command") == 4
