"""The pool when nothing fails but requests: what is refused, aborted, loaded and drained."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import (
    AlreadyExistsError,
    EngineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from engine.jobs import (
    JobFailed,
    PerplexityFinished,
    PerplexityProgress,
    PerplexitySpec,
    QuantizeFinished,
    QuantizeSpec,
)
from engine.request import RequestOutput, SamplingParams
from server.workers.pool import WorkerPool
from tests.faults.workers import MODEL, generate, on_shared_loop, request, running_pool, signal_worker, until


def perplexity(num_tokens: int, job_id: str = "ppl") -> PerplexitySpec:
    return PerplexitySpec(
        job_id=job_id, model=MODEL, token_ids=[i % 250 for i in range(num_tokens)], window=64, stride=32
    )


@on_shared_loop
async def test_requests_and_jobs_are_answered_and_faults_of_one_are_its_own(shared_pool: WorkerPool) -> None:
    """Refusals arrive as the engine's errors, with their field, while a stream beside them is not disturbed."""
    alone = await generate(shared_pool, request(200))
    beside = asyncio.create_task(generate(shared_pool, request(200)))
    with pytest.raises(InvalidArgumentError) as refused:
        await generate(shared_pool, request(prompt=[1, 999_999]))
    assert refused.value.field == "prompt"
    with pytest.raises(InvalidArgumentError, match="top_p"):
        await generate(shared_pool, request(sampling=SamplingParams(top_p=2.0)))
    with pytest.raises(NotFoundError) as missing:
        await generate(shared_pool, request(model="nobody"))
    assert missing.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(NotFoundError):
        await generate(shared_pool, request(adapter="nobody"))
    with pytest.raises(NotFoundError):
        await shared_pool.cancel_job("nobody")
    assert await beside == alone
    assert len(alone) == 200


@on_shared_loop
async def test_n_completions_all_come_to_their_end(shared_pool: WorkerPool) -> None:
    ends: list[int] = []
    async with aclosing(shared_pool.generate(request(5, n=3))) as batches:
        async for batch in batches:
            ends.extend(output.index for output in batch if output.finish_reason == "length")
    assert sorted(ends) == [0, 1, 2]


@on_shared_loop
async def test_a_client_that_goes_away_frees_its_blocks(shared_pool: WorkerPool) -> None:
    """Closing the iterator, or cancelling its task, ends the request in the engine."""

    def usage() -> float:
        return shared_pool.snapshot()[0].stats.models[0].kv_cache_usage_ratio

    def running() -> int:
        return shared_pool.snapshot()[0].stats.models[0].requests_running

    batches = shared_pool.generate(request(4000))
    await anext(batches)
    tokens: list[int] = []
    task = asyncio.create_task(generate(shared_pool, request(4000, prompt=[5] * 100), tokens))
    await until(lambda: tokens and running() == 2)
    assert usage() > 0
    await batches.aclose()
    task.cancel()
    await until(lambda: running() == 0 and usage() == 0)
    assert shared_pool.num_streams == 0


@on_shared_loop
async def test_a_job_reports_and_ends_and_can_be_cancelled_either_way(shared_pool: WorkerPool) -> None:
    async with aclosing(shared_pool.run_job(perplexity(300))) as events:
        seen = [event async for event in events]
    assert isinstance(seen[-1], PerplexityFinished)
    assert all(isinstance(event, PerplexityProgress) for event in seen[:-1])

    async with aclosing(shared_pool.run_job(perplexity(200_000))) as events:
        await anext(events)
    await until(lambda: shared_pool.snapshot()[0].num_jobs == 0)
    with pytest.raises(NotFoundError):
        await shared_pool.cancel_job("ppl")

    told: list[object] = []
    await shared_pool.start_job(perplexity(200_000), told.append)
    with pytest.raises(AlreadyExistsError):
        await shared_pool.start_job(perplexity(100), told.append)
    await shared_pool.cancel_job("ppl")
    await until(lambda: told and isinstance(told[-1], JobFailed))
    last = told[-1]
    assert isinstance(last, JobFailed)
    assert last.error_code == "cancelled"
    refused = PerplexitySpec(job_id="bad", model=MODEL, token_ids=[1, 2, 3], stride=0)
    with pytest.raises(InvalidArgumentError, match="stride"):
        await shared_pool.start_job(refused, told.append)
    with pytest.raises(InvalidArgumentError, match="stride"):
        await anext(shared_pool.run_job(refused))


@on_shared_loop
async def test_models_come_and_go_on_every_worker(shared_pair: WorkerPool, tiny_llama: Path, tmp_path: Path) -> None:
    info = await shared_pair.load_model("second", tiny_llama)
    assert info.name == "second"
    assert await shared_pair.load_model("second", tiny_llama) == info
    assert all(snapshot.models == ["second", MODEL] for snapshot in shared_pair.snapshot())
    with pytest.raises(AlreadyExistsError):
        await shared_pair.load_model("second", tmp_path)
    with pytest.raises(EngineError):
        await shared_pair.load_model("third", tmp_path / "nothing")
    assert set(shared_pair.models()) == {"second", MODEL}

    batches = shared_pair.generate(request(4000, model="second"))
    await anext(batches)
    with pytest.raises(FailedPreconditionError) as busy:
        await shared_pair.unload_model("second")
    assert busy.value.reason == "MODEL_BUSY"
    await batches.aclose()
    await until(lambda: shared_pair.num_streams == 0)
    await shared_pair.unload_model("second")
    assert all(snapshot.models == [MODEL] for snapshot in shared_pair.snapshot())
    with pytest.raises(NotFoundError):
        await generate(shared_pair, request(model="second"))
    assert len(await generate(shared_pair, request())) == 8


@on_shared_loop
async def test_a_quantized_model_is_served_by_every_worker(
    shared_pair: WorkerPool, tiny_llama: Path, tmp_path: Path
) -> None:
    """Quantize runs on one worker; when it reports its end, all of them hold the result."""
    spec = QuantizeSpec(
        job_id="q", model=MODEL, scheme="q8", output_dir=str(tmp_path / "models" / "small"), output_name="small"
    )
    async with aclosing(shared_pair.run_job(spec)) as events:
        last = [event async for event in events][-1]
    assert isinstance(last, QuantizeFinished), last
    assert all(snapshot.models == ["small", MODEL] for snapshot in shared_pair.snapshot())
    assert shared_pair.models()["small"].quantization == "q8"
    first, second = await asyncio.gather(*(generate(shared_pair, request(20, model="small")) for _ in range(2)))
    assert first == second
    await until(lambda: shared_pair.num_streams == 0)
    await shared_pair.unload_model("small")


@on_shared_loop
async def test_load_goes_to_the_least_loaded_worker(shared_pair: WorkerPool) -> None:
    streams = [shared_pair.generate(request(4000)) for _ in range(4)]
    for stream in streams:
        await anext(stream)
    assert [snapshot.num_streams for snapshot in shared_pair.snapshot()] == [2, 2]
    for stream in streams:
        await stream.aclose()
    await until(lambda: shared_pair.num_streams == 0)


async def test_a_drain_lets_streams_finish_and_refuses_new_ones(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        tokens: list[int] = []
        stream = asyncio.create_task(generate(pool, request(1500), tokens))
        await until(lambda: tokens)
        stopping = asyncio.create_task(pool.stop(drain_seconds=60))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as refused:
            await generate(pool, request())
        assert refused.value.reason == "DRAINING"
        assert not pool.serves(MODEL)
        assert len(await stream) == 1500
        await stopping


async def test_a_drain_waits_for_no_worker_beyond_its_time(tiny_llama: Path, tmp_path: Path) -> None:
    """One that stands still can neither checkpoint its jobs nor shut down; it is killed."""
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        events: list[object] = []
        await pool.start_job(perplexity(200_000), events.append)
        await until(lambda: events)
        signal_worker(pool, signal.SIGSTOP)
        await asyncio.wait_for(pool.stop(drain_seconds=0.5), 60)
        last = events[-1]
        assert isinstance(last, JobFailed)
        assert last.error_reason == "DRAINING"


async def test_one_completion_ends_at_a_stop_string_and_its_siblings_go_on(pool: WorkerPool) -> None:
    """The engine says when the stopped one ended; an end that has come already is not told twice."""
    asked = request(800, n=3)
    told: dict[int, list[RequestOutput]] = {0: [], 1: [], 2: []}
    async with aclosing(pool.generate(asked)) as batches:
        async for batch in batches:
            for output in batch:
                told[output.index].append(output)
                if output.index == 1 and output.num_completion_tokens in (5, 6):
                    pool.stop_completion(asked.request_id, 1)
    pool.stop_completion(asked.request_id, 2)
    assert [told[index][-1].finish_reason for index in range(3)] == ["length", "stop", "length"]
    assert [sum(output.finish_reason is not None for output in told[index]) for index in range(3)] == [1, 1, 1]
    stopped = told[1][-1]
    assert stopped.token_ids == []
    assert 5 <= stopped.num_completion_tokens < 800
    assert stopped.timings is not None
    assert stopped.timings.total_seconds >= stopped.timings.decode_seconds > 0
    assert told[0][-1].timings is not None
    assert stopped.timings.total_seconds < told[0][-1].timings.total_seconds

    observed: list[float] = []

    def completions_observed() -> int:
        for model in pool.snapshot()[0].stats.models:
            observed.extend(model.observations.get("request_generation_tokens", []))
        return len(observed)

    await until(lambda: completions_observed() >= 3)
    assert sorted(observed) == [stopped.num_completion_tokens, 800, 800]
    assert pool.num_streams == 0


async def test_a_drain_that_is_over_ends_what_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        tokens: list[int] = []
        stream = asyncio.create_task(generate(pool, request(4000), tokens))
        await until(lambda: tokens)
        await pool.stop(drain_seconds=0.1)
        with pytest.raises(UnavailableError) as ended:
            await stream
        assert ended.value.reason == "DRAINING"


async def test_an_impossible_device_is_refused_at_the_start(tmp_path: Path) -> None:
    pool = WorkerPool(EngineConfig(device="cuda:99", state_dir=str(tmp_path)), devices=["cuda:99"], models={})
    with pytest.raises(InvalidArgumentError, match="cuda:99"):
        await pool.start()
    assert pool.snapshot()[0].pid is None


async def test_a_configured_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    async with running_pool({"ghost": tmp_path / "nothing"}, tmp_path, load=False) as pool:
        with pytest.raises(EngineError, match="nothing"):
            await pool.wait_loaded()


def test_the_front_end_starts_without_torch() -> None:
    code = "import sys, server.workers.pool; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
