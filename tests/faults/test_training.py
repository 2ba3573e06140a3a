"""Training runs and the adapters they publish, through lost workers, drains and full disks."""

from __future__ import annotations

import asyncio
import random
import resource
import shutil
import signal
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from engine.errors import NotFoundError
from engine.jobs import (
    JobEvent,
    JobFailed,
    JobWarning,
    LoRAParams,
    TokenizedExample,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainParams,
    TrainSpec,
    TrainStarted,
    TrainStep,
)
from engine.training.dataset import read_dataset, write_dataset
from server.workers.jobs import MAX_FRUITLESS_RESTARTS
from server.workers.pool import WorkerPool
from tests.faults.workers import MODEL, generate, pid_of, request, running_pool, signal_worker, until

STEPS = 60  # many after the checkpoint at which a worker is killed
CHECKPOINT_EVERY = 10


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random examples, some of them held out."""
    generator = random.Random(0)

    def example() -> TokenizedExample:
        length = generator.randrange(20, 60)
        return TokenizedExample(
            token_ids=[generator.randrange(3, 299) for _ in range(length)], loss_mask=[i > 4 for i in range(length)]
        )

    path = tmp_path_factory.mktemp("data") / "dataset.safetensors"
    write_dataset(path, [example() for _ in range(24)], [example() for _ in range(4)])
    return path


def spec(dataset: Path, run_dir: Path, adapter: str = "tone", **params: Any) -> TrainSpec:
    values = {"max_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": 30, "learning_rate": 1e-2}
    return TrainSpec(
        job_id=run_dir.name,
        model=MODEL,
        adapter=adapter,
        lora=LoRAParams(rank=4, alpha=8.0, dropout=0.1),
        params=TrainParams(**(values | params)),
        dataset_path=str(dataset),
        run_dir=str(run_dir),
    )


async def run(pool: WorkerPool, train: TrainSpec) -> list[JobEvent]:
    async with aclosing(pool.run_job(train)) as events:
        return [event async for event in events]


def losses(events: list[JobEvent]) -> dict[int, float]:
    """Loss of each step; where a step ran twice, both must have said the same."""
    found: dict[int, float] = {}
    for event in events:
        if isinstance(event, TrainStep):
            assert found.setdefault(event.step, event.loss) == event.loss
    return found


def evaluations(events: list[JobEvent]) -> dict[int, float]:
    return {event.step: event.nll for event in events if isinstance(event, TrainEvaluation)}


async def test_a_run_outlives_its_worker(tiny_llama: Path, dataset: Path, tmp_path: Path) -> None:
    """Killed in the middle, it resumes from its last checkpoint, says so, and ends as an undisturbed run does."""
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        undisturbed = await run(pool, spec(dataset, tmp_path / "runs" / "calm", "calm"))
        assert isinstance(undisturbed[-1], TrainFinished), undisturbed[-1]

        events: list[JobEvent] = []
        await pool.start_job(spec(dataset, tmp_path / "runs" / "rough", "rough"), events.append)
        await until(lambda: any(isinstance(event, TrainStep) and event.step >= 12 for event in events))
        signal_worker(pool, signal.SIGKILL)
        await until(lambda: events and isinstance(events[-1], (TrainFinished, JobFailed)))
        assert isinstance(events[-1], TrainFinished), events[-1]

        (warning,) = [event for event in events if isinstance(event, JobWarning)]
        assert warning.reason == "WORKER_RESTARTED"
        assert "SIGKILL" in warning.message
        first, second = [event for event in events if isinstance(event, TrainStarted)]
        assert first.resumed_from_step == 0
        assert 10 <= second.resumed_from_step < STEPS
        assert second.resumed_from_step % CHECKPOINT_EVERY == 0
        assert events.index(warning) < events.index(second)
        assert pool.snapshot()[0].restarts == 1

        assert losses(events) == losses(undisturbed)
        assert set(losses(events)) == set(range(STEPS + 1))
        assert evaluations(events) == evaluations(undisturbed)
        assert events[-1].final_nll == undisturbed[-1].final_nll
        # What was published before the kill is served after it, and both runs made the same adapter.
        calm, rough, base = [await generate(pool, request(40, adapter=name)) for name in ("calm", "rough", None)]
        assert calm == rough != base


async def test_a_drain_checkpoints_a_run_that_another_server_resumes(
    tiny_llama: Path, dataset: Path, tmp_path: Path
) -> None:
    train = spec(dataset, tmp_path / "runs" / "drained", checkpoint_every=0)
    events: list[JobEvent] = []
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        await pool.start_job(train, events.append)
        await until(lambda: any(isinstance(event, TrainStep) and event.step >= 7 for event in events))
        await pool.stop(drain_seconds=30)
    failed, checkpoint = events[-1], events[-2]
    assert isinstance(failed, JobFailed)
    assert failed.error_reason == "INTERRUPTED"
    assert isinstance(checkpoint, TrainCheckpoint)
    assert checkpoint.step >= 7
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        resumed = await run(pool, train)
        undisturbed = await run(pool, spec(dataset, tmp_path / "runs" / "calm", checkpoint_every=0))
    started = next(event for event in resumed if isinstance(event, TrainStarted))
    assert started.resumed_from_step == checkpoint.step
    assert losses(events + resumed) == losses(undisturbed)


async def test_a_run_that_waits_for_a_worker_can_be_cancelled(tiny_llama: Path, dataset: Path, tmp_path: Path) -> None:
    async with running_pool({MODEL: tiny_llama}, tmp_path, restart_backoff_seconds=60.0) as pool:
        train = spec(dataset, tmp_path / "runs" / "waiting", max_steps=100_000)
        events: list[JobEvent] = []
        await pool.start_job(train, events.append)
        await until(lambda: events)
        signal_worker(pool, signal.SIGKILL)
        await until(lambda: pool.snapshot()[0].state == "restarting")
        await asyncio.sleep(0.1)
        await pool.cancel_job(train.job_id)
        await until(lambda: isinstance(events[-1], JobFailed))
        last = events[-1]
        assert isinstance(last, JobFailed)
        assert last.error_code == "cancelled"


async def test_a_run_that_kills_every_worker_is_given_up(tiny_llama: Path, dataset: Path, tmp_path: Path) -> None:
    """Without a checkpoint between the deaths, there is no hope in one more."""
    # Held-out examples would bring a checkpoint of the base, whenever its evaluation is done.
    nothing_held_out = tmp_path / "dataset.safetensors"
    write_dataset(nothing_held_out, read_dataset(dataset).train)
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        train = spec(
            nothing_held_out, tmp_path / "runs" / "poison", max_steps=100_000, checkpoint_every=0, eval_every=0
        )
        events: list[JobEvent] = []
        await pool.start_job(train, events.append)
        for deaths in range(1, MAX_FRUITLESS_RESTARTS + 2):
            await until(lambda n=deaths: sum(isinstance(event, TrainStarted) for event in events) == n)
            signal_worker(pool, signal.SIGKILL)
        await until(lambda: isinstance(events[-1], JobFailed))
        last = events[-1]
        assert isinstance(last, JobFailed)
        assert (last.error_code, last.error_reason) == ("unavailable", "WORKER_LOST")
        assert len(await generate(pool, request(8))) == 8


def limit_files(pid: int, num_bytes: int) -> None:
    """Makes writes of a process fail beyond so many bytes of a file, as they would on a full disk."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


async def test_a_full_disk_fails_the_run_and_nothing_else(pool: WorkerPool, dataset: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be written ends the run with an error that says why; the next run works."""
    limit_files(pid_of(pool), 4096)
    run_dir = tmp_path / "runs" / "full"
    stream = asyncio.create_task(generate(pool, request(1000)))
    events = await run(pool, spec(dataset, run_dir))
    last = events[-1]
    assert isinstance(last, JobFailed), last
    assert "File too large" in last.error_message
    assert (last.error_code, last.error_reason) == ("resource_exhausted", "DISK_FULL")
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert len(await stream) == 1000

    limit_files(pid_of(pool), resource.RLIM_INFINITY)
    events = await run(pool, spec(dataset, run_dir))
    assert isinstance(events[-1], TrainFinished), events[-1]
    assert pool.snapshot()[0].restarts == 0


async def test_adapters_are_the_same_on_every_worker(tiny_llama: Path, dataset: Path, tmp_path: Path) -> None:
    """Published, imported, switched, unloaded or deleted through one worker, and so on all of them; also on one that
    was restarted."""
    async with running_pool({MODEL: tiny_llama}, tmp_path, workers=2) as pool:

        async def everywhere(version: int | None = None, adapter: str | None = "tone") -> list[list[int]]:
            """What each worker makes of the same request: of two at once, each takes one."""
            asked = [request(30, adapter=adapter, adapter_version=version) for _ in range(2)]
            streams = [pool.generate(one) for one in asked]
            try:
                begun = await asyncio.gather(*map(anext, streams))
                assert [snapshot.num_streams for snapshot in pool.snapshot()] == [1, 1]
                return [
                    [
                        token
                        for batch in [first] + [more async for more in stream]
                        for out in batch
                        for token in out.token_ids
                    ]
                    for first, stream in zip(begun, streams, strict=True)
                ]
            finally:
                for stream in streams:
                    await stream.aclose()

        def live(infos: list[Any]) -> list[int]:
            return [info.version for info in infos if info.live]

        base = (await everywhere(adapter=None))[0]
        assert isinstance((await run(pool, spec(dataset, tmp_path / "runs" / "one")))[-1], TrainFinished)
        first = await everywhere()
        assert first[0] == first[1] != base

        assert isinstance((await run(pool, spec(dataset, tmp_path / "runs" / "two", seed=1)))[-1], TrainFinished)
        second = await everywhere()
        assert second[0] == second[1] != first[0]
        assert await everywhere(version=1) == first

        staged = tmp_path / "staged"
        shutil.copytree(await pool.adapter_path(MODEL, "tone", 1), staged)
        imported = await pool.import_adapter(MODEL, "tone", staged)
        assert (imported.version, imported.live) == (3, True)
        assert await everywhere() == first
        assert (await pool.load_adapter_version(MODEL, "tone", 2)).version == 2
        assert await everywhere() == second

        signal_worker(pool, signal.SIGKILL, worker=0)
        await until(lambda: pool.snapshot()[0].restarts == 1 and pool.healthy and pool.snapshot()[0].state == "up")
        assert await everywhere() == second

        await pool.delete_adapter(MODEL, "tone", 2)
        assert live(await pool.adapters(MODEL)) == [3]
        assert await everywhere() == first
        await pool.unload_adapter(MODEL, "tone")
        refusals = await asyncio.gather(
            *(generate(pool, request(8, adapter="tone")) for _ in range(2)), return_exceptions=True
        )
        assert [type(refusal) for refusal in refusals] == [NotFoundError, NotFoundError]
        await pool.load_adapter_version(MODEL, "tone", None)
        await pool.delete_adapter(MODEL, "tone")
        assert await pool.adapters(MODEL) == []
