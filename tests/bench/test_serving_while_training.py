"""Serving while training: both sides see streams of the same lengths, and at full load a run never finds the engine
idle."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from engine.jobs import JobEvent, TrainStep
from engine.request import Request, RequestOutput
from tests.bench import serving_while_training
from tests.bench.serving_while_training import PROMPT_TOKENS, Clock, Loop, Side


class FakeEngine:
    """Gives each request a token a step; a run's step takes as many advances.

    Args:
        advances: None: there is no run.
    """

    def __init__(self, advances: int | None) -> None:
        self._advances = advances
        self._left: dict[str, int] = {}
        self.contexts: set[int] = set()
        self.idle_advances = 0
        self._advanced = 0

    def add_request(self, request: Request) -> None:
        assert request.sampling.max_tokens is not None
        self._left[request.request_id] = request.sampling.max_tokens
        self.contexts.add(len(request.prompt_token_ids) + request.sampling.max_tokens)

    def has_requests(self) -> bool:
        return bool(self._left)

    def step(self) -> list[RequestOutput]:
        outputs = [RequestOutput(request_id=name, index=0, token_ids=[1]) for name in self._left]
        self._left = {name: left - 1 for name, left in self._left.items() if left > 1}
        return outputs

    def has_jobs(self) -> bool:
        return self._advances is not None

    def advance_jobs(self) -> list[JobEvent]:
        self._advanced += 1
        self.idle_advances += not self._left
        if self._advances is None or self._advanced % self._advances:
            return []
        step = self._advanced // self._advances
        unused = dict.fromkeys(TrainStep.__dataclass_fields__, 0.0)
        return [TrainStep(**unused | {"job_id": "run", "step": step, "num_tokens": 8})]  # type: ignore[arg-type]


@pytest.mark.parametrize("advances", [None, 50], ids=["without a run", "with a run"])
def test_at_full_load_bursts_of_one_length_follow_each_other(advances: int | None) -> None:
    engine, side = FakeEngine(advances), Side()
    loop = Loop(engine, Clock("wall"), streams=4, burst_tokens=10)  # type: ignore[arg-type]
    loop.run(side, seconds=0.0 if advances else 0.01, steps=2 if advances else 0)
    assert engine.contexts == {PROMPT_TOKENS + 10}
    assert engine.idle_advances == 0
    assert side.latencies
    assert bool(side.rates) == (advances is not None)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_quick_run_prints_a_table_or_lines(restored_threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--threads", "1", "--streams", "1", "--rounds", "1", "--seconds", "0.2", "--steps", "1"]
    serving_while_training.main([*arguments, "--train-tokens", "16"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["streams"], line["load"]) for line in lines] == [(0, 1.0), (1, 1.0), (1, 0.5)]
    assert all(line["train_tokens_per_second"] > 0 for line in lines)
    rows = [serving_while_training.row(line) for line in lines]
    assert {len(row) for row in rows} == {len(serving_while_training.HEAD)}
    assert rows[0][-1].startswith("100%")
    assert rows[1][:2] == ("1", "100%")
