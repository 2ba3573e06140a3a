"""The archive of training runs: configuration, events and outcome, in SQLite below the state directory.

What is archived outlives the call that began the run, the worker that computes it, and the server. Events are kept as
JSON, so that ``sqlite3 runs.sqlite`` shows them to people.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from engine.jobs import (
    JobEvent,
    JobFailed,
    JobWarning,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainPublished,
    TrainSpec,
    TrainStarted,
    TrainStep,
)

RunState = Literal["queued", "running", "finished", "failed", "cancelled", "interrupted"]
RunKind = Literal["train", "adapt"]
ACTIVE_STATES: tuple[RunState, ...] = ("queued", "running")

TrainEvent = (
    TrainStarted
    | TrainStep
    | TrainEvaluation
    | TrainCheckpoint
    | TrainPublished
    | JobWarning
    | TrainFinished
    | JobFailed
)
_EVENT_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in TrainEvent.__args__}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    request_id TEXT UNIQUE,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    adapter TEXT NOT NULL,
    state TEXT NOT NULL,
    config TEXT NOT NULL,
    dataset TEXT NOT NULL,
    spec TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    step INTEGER NOT NULL DEFAULT 0,
    total_steps INTEGER,
    loss REAL,
    base_nll REAL,
    final_nll REAL,
    best_nll REAL,
    best_step INTEGER,
    version INTEGER,
    error_code TEXT,
    error_reason TEXT,
    error_message TEXT
);
CREATE INDEX IF NOT EXISTS runs_by_state ON runs (state);
CREATE TABLE IF NOT EXISTS events (
    run_id TEXT NOT NULL REFERENCES runs (run_id) ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    created REAL NOT NULL,
    step INTEGER,
    kind TEXT NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (run_id, sequence)
) WITHOUT ROWID;
"""
_USER_VERSION = 1


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """One row of the archive.

    Attributes:
        number: order of creation, ascending.
        request_id: idempotency key of the call that began it; None if it had none.
        config: what was asked for, defaults resolved, as JSON.
        dataset: what became of the examples, as JSON.
        spec: the TrainSpec, as JSON; a resumed run is started with it again.
        created, started, ended: seconds since the epoch.
        step: last completed step.
        loss: of that step, nats.
        error_code: of engine.errors, in state "failed".
    """

    number: int
    run_id: str
    request_id: str | None
    kind: RunKind
    model: str
    adapter: str
    state: RunState
    config: str
    dataset: str
    spec: str
    created: float
    started: float | None
    ended: float | None
    step: int
    total_steps: int | None
    loss: float | None
    base_nll: float | None
    final_nll: float | None
    best_nll: float | None
    best_step: int | None
    version: int | None
    error_code: str | None
    error_reason: str | None
    error_message: str | None

    def train_spec(self) -> TrainSpec:
        """What the run was started with."""
        return msgspec.json.decode(self.spec, type=TrainSpec)


@dataclass(slots=True, kw_only=True)
class EventRecord:
    """One event of a run. Attributes: sequence: from 0, without gaps; created: seconds since the epoch."""

    run_id: str
    sequence: int
    created: float
    event: TrainEvent


class RunArchive:
    """Reads and writes the archive. Safe to call from several threads; each call is one transaction.

    Args:
        path: of the SQLite file, made if it is not there.
    Raises:
        InvalidArgumentError: the file is no archive, or one of a newer release.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise InvalidArgumentError(f"{path} is no run archive: {error}", field="state_dir") from None
        if version > _USER_VERSION:
            raise InvalidArgumentError(
                f"{path} was written by a newer release (schema {version}; this one reads up to {_USER_VERSION})",
                field="state_dir",
            )
        with self._transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_USER_VERSION}")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def create(
        self,
        *,
        spec: TrainSpec,
        kind: RunKind,
        request_id: str | None,
        config: str,
        dataset: str,
    ) -> RunRecord:
        """Enters a run in state "queued".

        Raises:
            AlreadyExistsError: a run with this request_id is archived.
        """
        with self._transaction() as db:
            try:
                db.execute(
                    "INSERT INTO runs (run_id, request_id, kind, model, adapter, state, config, dataset, spec, created)"
                    " VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?)",
                    (
                        spec.job_id,
                        request_id,
                        kind,
                        spec.model,
                        spec.adapter,
                        config,
                        dataset,
                        msgspec.json.encode(spec).decode(),
                        time.time(),
                    ),
                )
            except sqlite3.IntegrityError:
                raise AlreadyExistsError(f"a run with request_id {request_id!r} exists", field="request_id") from None
            return self._get(db, spec.job_id)

    def get(self, run_id: str) -> RunRecord:
        """The run of that id.

        Raises:
            NotFoundError: there is none.
        """
        with self._transaction() as db:
            return self._get(db, run_id)

    @staticmethod
    def _get(db: sqlite3.Connection, run_id: str) -> RunRecord:
        row = db.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no run {run_id[:80]!r}", field="run_id", reason="RUN_NOT_FOUND")
        return RunRecord(**dict(row))

    def find_request(self, request_id: str) -> RunRecord | None:
        """The run that a call with this idempotency key began, if any."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM runs WHERE request_id = ?", (request_id,)).fetchone()
        return RunRecord(**dict(row)) if row is not None else None

    def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        model: str = "",
        adapter: str = "",
        state: RunState | None = None,
    ) -> list[RunRecord]:
        """Runs, newest first, of number less than ``before``."""
        wanted = {"model": model or None, "adapter": adapter or None, "state": state}
        chosen = {column: value for column, value in wanted.items() if value is not None}
        conditions = [f"{column} = :{column}" for column in chosen] + ["number < :before"]
        values = {**chosen, "before": before if before is not None else 1 << 62, "limit": limit}
        query = f"SELECT * FROM runs WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT :limit"
        with self._transaction() as db:
            rows = db.execute(query, values).fetchall()
        return [RunRecord(**dict(row)) for row in rows]

    def unfinished(self, model: str) -> list[RunRecord]:
        """The runs of a model that are active or may be resumed."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM runs WHERE model = ? AND state IN ('queued', 'running', 'interrupted', 'cancelled')",
                (model,),
            ).fetchall()
        return [RunRecord(**dict(row)) for row in rows]

    def mark_interrupted(self) -> list[str]:
        """Marks the runs that a crash left active; returns their ids. For start-up, before any run begins."""
        with self._transaction() as db:
            rows = db.execute("SELECT run_id FROM runs WHERE state IN ('queued', 'running')").fetchall()
            db.execute(
                "UPDATE runs SET state = 'interrupted', ended = ? WHERE state IN ('queued', 'running')", (time.time(),)
            )
        return [row["run_id"] for row in rows]

    def set_state(self, run_id: str, state: RunState) -> RunRecord:
        """Moves a run to a state that no event of the engine tells of."""
        ended = None if state in ACTIVE_STATES else time.time()
        with self._transaction() as db:
            db.execute("UPDATE runs SET state = ?, ended = ? WHERE run_id = ?", (state, ended, run_id))
            return self._get(db, run_id)

    def reopen(self, run_id: str) -> int:
        """Takes a run back to state "queued": the terminal event with which it had ended is no more.

        Returns: sequence number of the last event that is left; -1 if there is none.
        """
        with self._transaction() as db:
            db.execute(
                "DELETE FROM events WHERE run_id = ? AND kind IN ('TrainFinished', 'JobFailed')"
                " AND sequence = (SELECT MAX(sequence) FROM events WHERE run_id = ?)",
                (run_id, run_id),
            )
            db.execute(
                "UPDATE runs SET state = 'queued', ended = NULL, error_code = NULL, error_reason = NULL,"
                " error_message = NULL WHERE run_id = ?",
                (run_id,),
            )
            last: int = db.execute(
                "SELECT COALESCE(MAX(sequence), -1) FROM events WHERE run_id = ?", (run_id,)
            ).fetchone()[0]
            return last

    def append(self, run_id: str, event: TrainEvent) -> EventRecord:
        """Archives an event, and what it says about its run."""
        now = time.time()
        payload = json.dumps(dataclasses.asdict(event))  # unlike msgspec, keeps NaN and infinity
        with self._transaction() as db:
            sequence = db.execute(
                "SELECT COALESCE(MAX(sequence) + 1, 0) FROM events WHERE run_id = ?", (run_id,)
            ).fetchone()[0]
            db.execute(
                "INSERT INTO events (run_id, sequence, created, step, kind, payload) VALUES (?, ?, ?, ?, ?, ?)",
                (run_id, sequence, now, _step(event), type(event).__name__, payload),
            )
            changes = _changes(event, now)
            if changes:
                assignments = ", ".join(f"{column} = :{column}" for column in changes)
                db.execute(f"UPDATE runs SET {assignments} WHERE run_id = :run_id", {**changes, "run_id": run_id})
        return EventRecord(run_id=run_id, sequence=sequence, created=now, event=event)

    def events(self, run_id: str, *, after: int = -1, from_step: int = 0, limit: int = 500) -> list[EventRecord]:
        """Events of sequence greater than ``after``, in order, at most ``limit``.

        Args:
            from_step: leave out events of earlier steps; those of no step (start, end, warnings) always come.
        """
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM events WHERE run_id = ? AND sequence > ? AND (step IS NULL OR step >= ?)"
                " ORDER BY sequence LIMIT ?",
                (run_id, after, from_step, limit),
            ).fetchall()
        return [
            EventRecord(
                run_id=run_id,
                sequence=row["sequence"],
                created=row["created"],
                event=msgspec.convert(json.loads(row["payload"]), _EVENT_TYPES[row["kind"]]),
            )
            for row in rows
        ]


def is_train_event(event: JobEvent) -> bool:
    """Whether a run's archive takes this event."""
    return isinstance(event, tuple(_EVENT_TYPES.values()))


def _step(event: TrainEvent) -> int | None:
    """The step that from_step filters on; None for what every watcher sees."""
    if isinstance(event, (TrainStep, TrainEvaluation, TrainCheckpoint, TrainPublished)):
        return event.step
    return event.step if isinstance(event, JobWarning) else None


def _changes(event: TrainEvent, now: float) -> dict[str, Any]:
    """The columns of its run that an event changes."""
    match event:
        case TrainStarted():
            return {"state": "running", "started": now, "total_steps": event.total_steps, "ended": None}
        case TrainStep():
            return {"step": event.step, "loss": event.loss}
        case TrainEvaluation():
            return {"best_nll": event.nll, "best_step": event.step} if event.is_best else {}
        case TrainPublished():
            return {"version": event.version}
        case TrainFinished():
            changes: dict[str, Any] = {"state": "finished", "ended": now, "step": event.step}
            for name in ("base_nll", "final_nll", "best_nll", "best_step", "version"):
                if getattr(event, name) is not None:
                    changes[name] = getattr(event, name)
            return changes
        case JobFailed(error_code="cancelled"):
            return {"state": "cancelled", "ended": now}
        case JobFailed():
            return {
                "state": "failed",
                "ended": now,
                "error_code": event.error_code,
                "error_reason": event.error_reason,
                "error_message": event.error_message,
            }
        case _:
            return {}
