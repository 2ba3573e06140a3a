"""The run archive: what it keeps, across restarts, and what it says about runs."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest

from engine.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from engine.jobs import (
    JobFailed,
    JobWarning,
    LoRAParams,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainParams,
    TrainPublished,
    TrainSpec,
    TrainStarted,
    TrainStep,
)
from server.runs import RunArchive, RunRecord, TrainEvent


def spec(run_id: str, model: str = "m", adapter: str = "a") -> TrainSpec:
    return TrainSpec(
        job_id=run_id,
        model=model,
        adapter=adapter,
        lora=LoRAParams(rank=4, target_modules=["q_proj"]),
        params=TrainParams(max_steps=3, betas=(0.9, 0.95)),
        dataset_path="/d",
        run_dir="/r",
    )


def create(archive: RunArchive, run_id: str, request_id: str | None = None, **names: str) -> RunRecord:
    return archive.create(spec=spec(run_id, **names), kind="train", request_id=request_id, config="{}", dataset="{}")


def started(total_steps: int = 3) -> TrainStarted:
    return TrainStarted(
        job_id="r",
        num_trainable_parameters=10,
        num_examples=2,
        num_eval_examples=1,
        num_tokens=20,
        num_loss_tokens=10,
        target_modules=["q_proj"],
        total_steps=total_steps,
        resumed_from_step=0,
        forward_difference=1e-6,
    )


def step(number: int, loss: float = 1.0) -> TrainStep:
    return TrainStep(
        job_id="r",
        step=number,
        epoch=0.5,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=None,
        num_tokens=8,
        num_loss_tokens=4,
        tokens_per_second=None,
        step_seconds=None,
        eta_seconds=None,
        peak_memory_bytes=None,
    )


def finished() -> TrainFinished:
    return TrainFinished(
        job_id="r",
        step=3,
        stop_reason="max_steps",
        base_nll=2.0,
        final_nll=1.5,
        best_nll=1.4,
        best_step=2,
        version=7,
        adapter_path="/a",
        checkpoint_path="/c",
        seconds=1.0,
        num_tokens=24,
    )


@pytest.fixture
def archive(tmp_path: Path) -> RunArchive:
    return RunArchive(tmp_path / "runs.sqlite")


def test_a_run_goes_through_its_states(archive: RunArchive) -> None:
    assert create(archive, "r").state == "queued"
    archive.append("r", started())
    assert archive.get("r").state == "running"
    archive.append("r", step(1, 0.5))
    archive.append("r", TrainEvaluation(job_id="r", step=2, nll=1.4, num_loss_tokens=3, is_best=True, seconds=0.1))
    archive.append("r", TrainPublished(job_id="r", step=2, adapter="a", version=7))
    run = archive.get("r")
    assert (run.step, run.loss, run.best_nll, run.best_step, run.version, run.total_steps) == (1, 0.5, 1.4, 2, 7, 3)
    archive.append("r", finished())
    run = archive.get("r")
    assert (run.state, run.step, run.base_nll, run.final_nll) == ("finished", 3, 2.0, 1.5)
    assert run.ended is not None


@pytest.mark.parametrize(("code", "state"), [("cancelled", "cancelled"), ("failed_precondition", "failed")])
def test_a_failure_tells_its_outcome(archive: RunArchive, code: str, state: str) -> None:
    create(archive, "r")
    archive.append("r", JobFailed(job_id="r", error_code=code, error_message="why", error_reason="WHY"))
    run = archive.get("r")
    assert run.state == state
    assert run.error_message == ("why" if state == "failed" else None)


def test_events_come_back_as_they_were(archive: RunArchive) -> None:
    create(archive, "r")
    events: list[TrainEvent] = [
        started(),
        step(0),
        step(1, math.nan),
        step(2, math.inf),
        JobWarning(job_id="r", step=1, reason="NON_FINITE", message="naïve ☃"),
        TrainCheckpoint(job_id="r", step=2, path="/c", is_best=False, seconds=0.5),
        finished(),
    ]
    for event in events:
        archive.append("r", event)
    read = archive.events("r")
    assert [record.sequence for record in read] == list(range(len(events)))
    assert repr([record.event for record in read]) == repr(events)  # NaN is not equal to itself


def test_events_page_without_gaps_and_filter_by_step(archive: RunArchive) -> None:
    create(archive, "r")
    archive.append("r", started())
    for number in range(10):
        archive.append("r", step(number))
    seen: list[int] = []
    after = -1
    while batch := archive.events("r", after=after, limit=3):
        seen += [record.sequence for record in batch]
        after = batch[-1].sequence
    assert seen == list(range(11))
    late = archive.events("r", from_step=8)
    assert isinstance(late[0].event, TrainStarted)
    assert [record.event.step for record in late[1:] if isinstance(record.event, TrainStep)] == [8, 9]


def test_the_spec_comes_back(archive: RunArchive) -> None:
    assert create(archive, "r").train_spec() == spec("r")


def test_a_request_id_begins_one_run(archive: RunArchive) -> None:
    create(archive, "r", "key")
    with pytest.raises(AlreadyExistsError):
        create(archive, "s", "key")
    create(archive, "t")
    create(archive, "u")  # runs without a key do not clash
    found = archive.find_request("key")
    assert found is not None
    assert found.run_id == "r"
    assert archive.find_request("other") is None


def test_pages_are_newest_first_and_filtered(archive: RunArchive) -> None:
    for number in range(5):
        create(archive, f"r{number}", model="m" if number % 2 else "n")
    first = archive.page(limit=2)
    assert [run.run_id for run in first] == ["r4", "r3"]
    rest = archive.page(limit=10, before=first[-1].number)
    assert [run.run_id for run in rest] == ["r2", "r1", "r0"]
    assert [run.run_id for run in archive.page(limit=10, model="m")] == ["r3", "r1"]
    archive.set_state("r1", "cancelled")
    assert [run.run_id for run in archive.page(limit=10, state="cancelled")] == ["r1"]


def test_a_crash_leaves_runs_interrupted_and_resumable(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    archive = RunArchive(path)
    create(archive, "r")
    archive.append("r", started())
    create(archive, "done")
    archive.append("done", finished())
    again = RunArchive(path)  # as after a crash: the first was never closed
    assert again.mark_interrupted() == ["r"]
    assert again.get("r").state == "interrupted"
    assert again.get("done").state == "finished"
    assert again.mark_interrupted() == []


def test_a_reopened_run_loses_its_terminal_event_alone(archive: RunArchive) -> None:
    create(archive, "r")
    archive.append("r", started())
    archive.append("r", JobFailed(job_id="r", error_code="cancelled", error_message="", error_reason="CANCELLED"))
    assert archive.reopen("r") == 0
    run = archive.get("r")
    assert (run.state, run.ended) == ("queued", None)
    assert archive.append("r", step(1)).sequence == 1


def test_unknown_runs_are_not_found(archive: RunArchive) -> None:
    with pytest.raises(NotFoundError, match="nope"):
        archive.get("nope")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    path.write_bytes(b"not a database, but long enough to be read as one" * 10)
    with pytest.raises(InvalidArgumentError, match="run archive"):
        RunArchive(path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    RunArchive(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(InvalidArgumentError, match="newer"):
        RunArchive(path)
