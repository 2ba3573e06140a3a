"""Runs whose caller leaves, or that are cancelled, while no worker has accepted them yet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CancelledError, NotFoundError
from engine.jobs import JobEvent, JobFailed, LoRAParams, TrainParams, TrainSpec
from server.metrics import Metrics
from server.run_manager import RunManager
from server.runs import RunArchive


class Pool:
    """Accepts a job once it is let; a cancelled job ends.

    Attributes: asked: a job is being started; accepts: lets it.
    """

    def __init__(self) -> None:
        self.asked, self.accepts = asyncio.Event(), asyncio.Event()
        self.jobs: dict[str, Callable[[JobEvent], None]] = {}

    async def start_job(self, spec: TrainSpec, on_event: Callable[[JobEvent], None]) -> None:
        self.asked.set()
        await self.accepts.wait()
        self.jobs[spec.job_id] = on_event

    async def cancel_job(self, job_id: str) -> None:
        if job_id not in self.jobs:
            raise NotFoundError(f"there is no running job {job_id!r}")
        self.jobs.pop(job_id)(
            JobFailed(job_id=job_id, error_code="cancelled", error_message="cancelled", error_reason="CANCELLED")
        )


def spec(tmp_path: Path) -> TrainSpec:
    return TrainSpec(
        job_id="r", model="m", adapter="a", lora=LoRAParams(), params=TrainParams(max_steps=1),
        dataset_path=str(tmp_path), run_dir=str(tmp_path),
    )  # fmt: skip


def start(runs: RunManager, tmp_path: Path, *, cancel_with_caller: bool) -> asyncio.Task[Any]:
    return asyncio.create_task(
        runs.start(
            spec(tmp_path), kind="adapt", request_id=None, config="{}", dataset="{}",
            cancel_with_caller=cancel_with_caller,
        )
    )  # fmt: skip


async def ended(runs: RunManager) -> None:
    """Waits for the end of the run."""
    async with asyncio.timeout(60):
        while runs.is_live("r"):
            await asyncio.sleep(0.005)


async def left_while_starting(tmp_path: Path, *, cancel_with_caller: bool) -> str:
    """State of a run whose caller leaves before a worker has accepted it."""
    pool = Pool()
    runs = RunManager(RunArchive(tmp_path / "runs.sqlite"), pool, Metrics("0"), 4)  # type: ignore[arg-type]
    task = start(runs, tmp_path, cancel_with_caller=cancel_with_caller)
    await pool.asked.wait()
    task.cancel()
    await asyncio.sleep(0)
    pool.accepts.set()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if cancel_with_caller:
        await ended(runs)
    else:
        await asyncio.sleep(0.2)
    state = (await runs.get("r")).state
    await runs.close(1.0)
    return state


@pytest.mark.parametrize(("cancel_with_caller", "state"), [(True, "cancelled"), (False, "queued")])
def test_a_caller_that_leaves_while_its_run_starts(tmp_path: Path, cancel_with_caller: bool, state: str) -> None:
    """Takes the run with it, or leaves it to go on, as it was asked for."""
    assert asyncio.run(left_while_starting(tmp_path, cancel_with_caller=cancel_with_caller)) == state


def test_a_run_is_cancelled_before_a_worker_has_it(tmp_path: Path) -> None:
    """CancelRun of a run that is archived and not yet handed over: it is not run."""

    async def scenario() -> tuple[str, list[str]]:
        pool = Pool()
        pool.accepts.set()
        runs = RunManager(RunArchive(tmp_path / "runs.sqlite"), pool, Metrics("0"), 4)  # type: ignore[arg-type]
        task = start(runs, tmp_path, cancel_with_caller=False)
        archived = None
        while archived is None:
            with contextlib.suppress(NotFoundError):
                archived = await runs.get("r")
        await runs.cancel("r")
        with contextlib.suppress(CancelledError):
            await task
        await ended(runs)
        state = (await runs.get("r")).state
        await runs.close(1.0)
        return state, list(pool.jobs)

    assert asyncio.run(scenario()) == ("cancelled", [])
