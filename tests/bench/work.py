"""Requests and jobs of the measures, and running them on an engine in this process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from engine.engine import Engine
from engine.jobs import TERMINAL_EVENTS, JobEvent, JobFailed, JobSpec
from engine.request import Request, SamplingParams


def random_tokens(count: int, seed: int | None = None) -> list[int]:
    """Token ids that every vocabulary here has; without a seed, ids that no prefix cache has seen."""
    generator = random.Random(seed)
    return [generator.randrange(3, 250) for _ in range(count)]


def request(number: int | str, prompt: list[int], max_tokens: int, model: str) -> Request:
    """A greedy request of exactly so many tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=str(number), model=model, prompt_token_ids=prompt, sampling=sampling)


def run_job(engine: Engine, spec: JobSpec) -> list[JobEvent]:
    """Runs a job to its end.

    Raises:
        SystemExit: it failed.
    """
    engine.start_job(spec)
    events: list[JobEvent] = []
    while engine.has_jobs():
        events.extend(engine.advance_jobs())
    last = events[-1]
    assert isinstance(last, TERMINAL_EVENTS)
    if isinstance(last, JobFailed):
        raise SystemExit(f"the job failed: {last.error_message}")
    return events


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a call takes."""
    began = clock()
    work()
    return clock() - began
