"""Real workers on a tiny random Llama, and the check that they leave nothing behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from server.workers.pool import WorkerPool
from server.workers.replica import SupervisionConfig

MODEL = "tiny"
CONTEXT = 4096
on_shared_loop = pytest.mark.asyncio(loop_scope="module")
"""Of tests with the fixture ``shared_pool`` or ``shared_pair``."""

_ids = itertools.count()


@asynccontextmanager
async def running_pool(
    models: dict[str, Path], state_dir: Path, *, workers: int = 1, load: bool = True, **supervision: Any
) -> AsyncIterator[WorkerPool]:
    """A started pool. Afterwards none of its processes is alive and its socket's directory is gone."""
    config = EngineConfig(device="cpu", num_threads=1, kv_cache_bytes=1 << 24, state_dir=str(state_dir))
    pool = WorkerPool(
        config,
        devices=["cpu"] * workers,
        models=models,
        supervision=SupervisionConfig(**({"restart_backoff_seconds": 0.05} | supervision)),
    )
    await pool.start()
    assert pool._link is not None
    socket = Path(pool._link.endpoint.removeprefix("ipc://"))
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    pids = {snapshot.pid for snapshot in pool.snapshot()}
    try:
        if load:
            await pool.wait_loaded()
        yield pool
    finally:
        pids |= {snapshot.pid for snapshot in pool.snapshot()}
        await pool.stop()
        assert not [pid for pid in pids if pid is not None and alive(pid)]
        assert not socket.parent.exists()


def request(num_tokens: int = 8, prompt: list[int] | None = None, **fields: Any) -> Request:
    """A greedy request of exactly so many completion tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    values = {"model": MODEL, "prompt_token_ids": prompt or [1, 2, 3], "sampling": sampling}
    return Request(request_id=f"r{next(_ids)}", **(values | fields))


async def generate(pool: WorkerPool, asked: Request, into: list[int] | None = None) -> list[int]:
    """The completion; what came before an error is in ``into``."""
    tokens = [] if into is None else into
    async with aclosing(pool.generate(asked)) as batches:
        async for batch in batches:
            for output in batch:
                tokens.extend(output.token_ids)
    return tokens


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for a condition.

    Raises:
        AssertionError: it did not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pid_of(pool: WorkerPool, worker: int = 0) -> int:
    """The process id of a worker that is up."""
    pid = pool._router.replicas[worker].process
    assert pid is not None
    return pid.pid


def signal_worker(pool: WorkerPool, number: int, worker: int = 0) -> int:
    """Sends a signal to a worker; returns its process id."""
    pid = pid_of(pool, worker)
    os.kill(pid, number)
    return pid
