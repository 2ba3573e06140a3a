"""A long step is not a hang, and a hang is not a long step: by the worker's own account of what its loop is at."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from engine.errors import NotFoundError, UnavailableError
from server.workers.pool import WorkerPool
from tests.faults.workers import MODEL, generate, pid_of, request, running_pool, until


def make_slow_adapter(state_dir: Path) -> Path:
    """A stored adapter version whose reading stands still until somebody writes to the returned FIFO."""
    directory = state_dir / "adapters" / MODEL / "slow" / "1"
    directory.mkdir(parents=True)
    os.mkfifo(directory / "lineage.json")
    return directory / "lineage.json"


def stands(pool: WorkerPool, seconds: float) -> bool:
    """Whether the worker's loop has not gone round for so long."""
    age = pool.snapshot()[0].heartbeat_age_seconds
    return age is not None and age > seconds


async def test_a_step_longer_than_the_heartbeat_timeout_costs_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """Meanwhile the worker does not look well; afterwards the streams beside it go on where they were."""
    async with running_pool({MODEL: tiny_llama}, tmp_path, heartbeat_timeout_seconds=1.5, stale_seconds=1.0) as pool:
        alone = await generate(pool, request(1000))
        pid = pid_of(pool)
        fifo = make_slow_adapter(tmp_path)
        tokens: list[int] = []
        stream = asyncio.create_task(generate(pool, request(1000), tokens))
        await until(lambda: tokens)
        call = asyncio.create_task(pool.load_adapter_version(MODEL, "slow", 1))
        await until(lambda: not pool.healthy)
        assert not pool.serves(MODEL)
        await until(lambda: stands(pool, 3.0))
        assert not pool.healthy
        assert not stream.done()
        await asyncio.to_thread(fifo.write_text, "{}")
        with pytest.raises(NotFoundError):
            await call
        assert await stream == alone
        await until(lambda: pool.healthy)
        assert pid_of(pool) == pid
        assert pool.snapshot()[0].restarts == 0


async def test_a_loop_that_stands_beyond_the_step_timeout_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    """Though its process is alive and beats all the while."""
    async with running_pool({MODEL: tiny_llama}, tmp_path, step_timeout_seconds=5.0, stale_seconds=1.0) as pool:
        fifo = make_slow_adapter(tmp_path)
        call = asyncio.create_task(pool.load_adapter_version(MODEL, "slow", 1))
        await until(lambda: not pool.healthy)
        with pytest.raises(UnavailableError, match=r"stood for .* s at LoadAdapterVersion"):
            await asyncio.wait_for(call, 60)
        fifo.unlink()
        await until(lambda: pool.healthy and pool.snapshot()[0].state == "up")
        assert pool.snapshot()[0].restarts == 1
        assert len(await generate(pool, request(8))) == 8
