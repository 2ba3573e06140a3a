"""A queue that is full in the engine is a rejection like one at the door."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from tests.rpc.calls import LASTING, TIMEOUT, generate, request
from tests.rpc.harness import ServerProcess, Stubs, fails


def test_a_full_queue_of_the_engine_is_refused_and_counted(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-running-requests", "1", "--max-waiting-requests", "8")
    stubs = Stubs(server.address)
    running = stubs.generation.Generate(request(**LASTING | {"n": 8}), timeout=TIMEOUT)  # one runs, seven wait
    next(iter(running))
    assert server.metric("whet_admission_rejections_total", reason="queue_full") is None
    with fails(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL") as caught:
        generate(stubs, n=8)
    assert "RetryInfo" in caught[0].details
    assert server.metric("whet_admission_rejections_total", reason="queue_full") == 1.0
    running.cancel()
    stubs.close()
