"""Workers that die or hang take only their own work with them, and come back with what they held."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from contextlib import aclosing
from pathlib import Path

import pytest

from engine.errors import EngineError, UnavailableError
from engine.jobs import JobFailed, PerplexitySpec
from server.workers.pool import MAX_ATTEMPTS, WorkerPool
from tests.faults.workers import (
    MODEL,
    alive,
    generate,
    on_shared_loop,
    pid_of,
    request,
    running_pool,
    signal_worker,
    until,
)


def restarted(pool: WorkerPool, times: int, worker: int = 0) -> bool:
    """Whether a worker is up again after so many restarts."""
    snapshot = pool.snapshot()[worker]
    return snapshot.restarts >= times and snapshot.state == "up"


def queried(pool: WorkerPool, worker: int = 0) -> set[str]:
    """Models whose prompts a worker has looked up in its cache."""
    return {model.model for model in pool.snapshot()[worker].stats.models if model.prefix_cache_queries_tokens}


async def test_a_kill_ends_the_streams_of_that_worker_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """The other worker's stream gives what it gives alone; the dead one comes back with every model."""
    async with running_pool({MODEL: tiny_llama}, tmp_path, workers=2) as pool:
        await pool.load_model("second", tiny_llama)
        alone = await generate(pool, request(1500))
        doomed_tokens: list[int] = []
        safe_tokens: list[int] = []
        doomed = asyncio.create_task(generate(pool, request(4000), doomed_tokens))
        await until(lambda: doomed_tokens)
        safe = asyncio.create_task(generate(pool, request(1500), safe_tokens))
        await until(lambda: safe_tokens)
        assert [snapshot.num_streams for snapshot in pool.snapshot()] == [1, 1]

        signal_worker(pool, signal.SIGKILL, worker=0)
        with pytest.raises(UnavailableError, match="SIGKILL") as lost:
            await doomed
        assert lost.value.reason == "WORKER_LOST"
        assert doomed_tokens[:1500] == alone[: len(doomed_tokens)]
        assert not pool.healthy
        assert await safe == alone

        await until(lambda: restarted(pool, 1))
        assert pool.healthy
        first, second = pool.snapshot()
        assert (first.restarts, second.restarts) == (1, 0)
        assert first.models == second.models == ["second", MODEL]
        # Both are idle, so the first one takes this.
        assert await generate(pool, request(1500, model="second")) == alone
        await until(lambda: "second" in queried(pool))


async def test_a_request_without_output_starts_over_when_its_worker_dies(pool: WorkerPool) -> None:
    """With one worker, it waits for the restart; its caller sees nothing of it."""
    alone = await generate(pool, request(50))
    signal_worker(pool, signal.SIGSTOP)  # so that no output can come
    stream = asyncio.create_task(generate(pool, request(50)))
    await until(lambda: pool.num_streams)
    signal_worker(pool, signal.SIGKILL)
    assert await stream == alone
    assert pool.snapshot()[0].restarts == 1


async def test_a_request_without_output_moves_to_another_worker(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_pool({MODEL: tiny_llama}, tmp_path, workers=2, restart_backoff_seconds=60.0) as pool:
        signal_worker(pool, signal.SIGSTOP, worker=0)
        stream = asyncio.create_task(generate(pool, request(50)))
        await until(lambda: pool.num_streams)
        assert pool.snapshot()[0].num_streams == 1
        signal_worker(pool, signal.SIGKILL, worker=0)
        assert len(await stream) == 50
        assert pool.snapshot()[0].state == "restarting"


async def test_a_request_that_waits_for_a_restart_can_be_cancelled(tiny_llama: Path, tmp_path: Path) -> None:
    """A caller's deadline bounds the wait."""
    async with running_pool({MODEL: tiny_llama}, tmp_path, restart_backoff_seconds=60.0) as pool:
        signal_worker(pool, signal.SIGKILL)
        await until(lambda: not pool.serves(MODEL))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(generate(pool, request(8)), 0.2)
        assert pool.num_streams == 0


async def test_a_request_that_kills_every_worker_it_meets_is_given_up(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        # A prompt so long that the worker is dead before the first token is due.
        poison = asyncio.create_task(generate(pool, request(8, prompt=[7] * 4000, n=16)))
        for attempt in range(1, MAX_ATTEMPTS + 1):
            await until(lambda: pool.num_streams)
            signal_worker(pool, signal.SIGKILL)
            await until(lambda n=attempt: pool.snapshot()[0].restarts == n)
        with pytest.raises(UnavailableError, match="SIGKILL"):
            await poison


async def test_a_job_is_told_that_its_worker_died(pool: WorkerPool) -> None:
    spec = PerplexitySpec(job_id="j", model=MODEL, token_ids=[1] * 200_000, window=64, stride=32)
    async with aclosing(pool.run_job(spec)) as events:
        await anext(events)
        signal_worker(pool, signal.SIGKILL)
        last = [event async for event in events][-1]
    assert isinstance(last, JobFailed)
    assert (last.error_code, last.error_reason) == ("unavailable", "WORKER_LOST")
    with pytest.raises(UnavailableError):
        await pool._router.replicas[0].call(type(None), lambda call: pytest.fail("nothing is sent to a dead worker"))


async def test_a_hung_worker_is_seen_and_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    """Stopped in the middle of a stream, it looks unwell at once, and is killed after the timeout."""
    async with running_pool({MODEL: tiny_llama}, tmp_path, heartbeat_timeout_seconds=2.0, stale_seconds=1.0) as pool:
        tokens: list[int] = []
        stream = asyncio.create_task(generate(pool, request(4000), tokens))
        await until(lambda: tokens)
        pid = signal_worker(pool, signal.SIGSTOP)
        await until(lambda: not pool.healthy)
        assert alive(pid)
        assert not pool.serves(MODEL)
        with pytest.raises(UnavailableError, match="no heartbeat"):
            await stream
        await until(lambda: restarted(pool, 1))
        assert not alive(pid)
        assert pool.healthy
        assert len(await generate(pool, request(8))) == 8


async def test_a_long_load_is_not_taken_for_a_hang(tiny_llama: Path, tmp_path: Path) -> None:
    """A worker that announced that it is loading is well, however long its loop stands still."""
    slow = tmp_path / "slow.gguf"
    os.mkfifo(slow)  # whoever opens it to read waits until somebody writes
    async with running_pool({MODEL: tiny_llama}, tmp_path, step_timeout_seconds=1.0, stale_seconds=1.0) as pool:
        loading = asyncio.create_task(pool.load_model("second", slow))
        await until(lambda: pool.snapshot()[0].busy == "loading model second")
        await until(lambda: (pool.snapshot()[0].heartbeat_age_seconds or 0.0) > 2.0)
        assert pool.snapshot()[0].up
        with contextlib.suppress(BrokenPipeError):  # the worker has looked at it, and has closed it again
            await asyncio.to_thread(slow.write_bytes, b"no model")
        with pytest.raises(EngineError):
            await loading
        await until(lambda: pool.snapshot()[0].busy == "")
        assert pool.snapshot()[0].restarts == 0


async def test_a_worker_that_keeps_dying_stays_down_and_health_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_pool({MODEL: tiny_llama}, tmp_path, max_restarts=1) as pool:
        for deaths in (1, 2):
            await until(lambda n=deaths: restarted(pool, n - 1))
            signal_worker(pool, signal.SIGKILL)
            await until(lambda: pool.snapshot()[0].state != "up")
        await until(lambda: pool.snapshot()[0].state == "failed")
        assert not pool.healthy
        assert not pool.serves(MODEL)
        with pytest.raises(UnavailableError) as down:
            await generate(pool, request(8))
        assert down.value.reason == "WORKERS_DOWN"
        with pytest.raises(UnavailableError):
            await pool.load_model("second", tiny_llama)


@on_shared_loop
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_group_are_the_parents_affair(shared_pool: WorkerPool, number: signal.Signals) -> None:
    """Ctrl-C, systemd and timeout(1) signal the whole process group: a worker must not drop its streams at that."""
    tokens: list[int] = []
    stream = asyncio.create_task(generate(shared_pool, request(1000), tokens))
    await until(lambda: tokens)
    before = signal_worker(shared_pool, number)
    assert len(await stream) == 1000
    assert len(await generate(shared_pool, request(8))) == 8
    assert pid_of(shared_pool) == before
    assert shared_pool.snapshot()[0].restarts == 0
