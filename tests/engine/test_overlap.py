"""Decode steps that are launched before the tokens of the one before are known give what they give one by one.

As in test_cuda_graphs, a replay is the same step once more, which takes its tokens from where the last left them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.core import runner
from engine.core.cuda_graphs import CudaGraphs, LaunchedStep
from engine.engine import Engine
from engine.ops import cpu
from engine.request import Request, RequestOutput, SamplingParams
from engine.sampling import on_device
from tests.engine.test_cuda_graphs import LENGTHS, PROMPTS, adapter, run_again
from tests.engine.test_decode_graphs import MODELS, engine

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_k": 5, "temperature": 2.0},
    {"seed": 3, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0},
    {"seed": 4, "temperature": 0.7},
]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runners on the CPU get CudaGraphs. Filled with the sequences of each step that was launched ahead."""
    steps: list[int] = []

    class Counting(CudaGraphs):
        def launch(self, tokens: Any, *args: Any) -> LaunchedStep | None:
            launched = super().launch(tokens, *args)
            if launched is not None and args[-1]:
                steps.append(len(tokens))
            return launched

    def make(loaded: Any, model: Any, cache: Any, states: Any, max_sequences: int) -> Any:
        return Counting(model, cache, states, loaded.info.max_model_len, max_sequences, capture=run_again)

    monkeypatch.setattr(runner, "captured_steps", make)
    return steps


def requests(samplings: list[dict[str, Any]], **options: Any) -> list[Request]:
    """One for each prompt, which end at different steps."""
    made = []
    for number, (prompt, length, given) in enumerate(zip(PROMPTS, LENGTHS, samplings, strict=False)):
        sampling = SamplingParams(**{"max_tokens": length, "ignore_eos": True} | given | options)
        made.append(Request(request_id=str(number), model="tiny", prompt_token_ids=prompt, sampling=sampling))
    return made


def run(
    made: Engine, asked: list[Request], between: Callable[[int, dict[str, list[int]]], None] = lambda step, found: None
) -> dict[str, tuple[list[int], str | None, int | None]]:
    """Per request its tokens, why it ended, and the token that ended it. between: after each step."""
    tokens: dict[str, list[int]] = {}
    last: dict[str, RequestOutput] = {}
    for request in asked:
        made.add_request(request)
    step = 0
    while made.has_requests():
        for output in made.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            assert output.num_completion_tokens == len(tokens[output.request_id])
            assert last.get(output.request_id) is None or last[output.request_id].finish_reason is None
            last[output.request_id] = output
        step += 1
        between(step, tokens)
    return {name: (tokens[name], output.finish_reason, output.stop_token_id) for name, output in last.items()}


def both(path: Path, folder: Path, ahead: list[int], **options: Any) -> tuple[Engine, Engine]:
    """Engines without and with overlap."""
    return (
        engine(path, folder / "one", enable_overlap=False, **options),
        engine(path, folder / "two", enable_overlap=True, **options),
    )


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_tokens(kind: str, tmp_path: Path, ahead: list[int]) -> None:
    """Greedy and drawn rows that end one by one; ends by a token are known a step late. A second turn finds the
    prefixes, and states, of the first."""
    one_by_one, overlapped = both(MODELS[kind](tmp_path / "model"), tmp_path, ahead, max_running_requests=6)
    wanted = run(one_by_one, requests(SAMPLINGS))
    assert not ahead
    assert run(overlapped, requests(SAMPLINGS)) == wanted
    assert len(ahead) > 30
    assert {6, 5, 4, 3, 2, 1} >= set(ahead) >= {5, 1}
    stops = {tokens[len(tokens) // 2] for tokens, _, _ in wanted.values()}
    stopped = run(one_by_one, requests(SAMPLINGS, stop_token_ids=sorted(stops)))
    assert {reason for _, reason, _ in stopped.values()} >= {"stop"}
    assert run(overlapped, requests(SAMPLINGS, stop_token_ids=sorted(stops))) == stopped
    turns = [
        replace(request, prompt_token_ids=[*request.prompt_token_ids, *stopped[request.request_id][0], 7, 8])
        for request in requests(SAMPLINGS)
    ]
    assert run(overlapped, turns) == run(one_by_one, turns)
    hits = [m.stats().models[0].prefix_cache_hits_tokens for m in (one_by_one, overlapped)]
    assert hits[0] == hits[1] > 0


@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_the_host_decides(
    kind: str, tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nuclei of more tokens than are sorted: the step launched meanwhile leaves their cache and state alone."""
    wide = [{"seed": i, "top_p": 0.97, "temperature": 0.05 * (1 + i)} for i in range(6)]
    one_by_one, overlapped = both(MODELS[kind](tmp_path / "model"), tmp_path, ahead)
    wanted = run(one_by_one, requests(wide))
    monkeypatch.setattr(on_device, "NUCLEUS_TOKENS", 4)
    left = 0
    settle = on_device.DeviceSampler.settle

    def counted(self: Any, token_ids: list[int], *args: Any) -> Any:
        nonlocal left
        left += sum(token < 0 for token in token_ids)
        return settle(self, token_ids, *args)

    monkeypatch.setattr(on_device.DeviceSampler, "settle", counted)
    assert run(overlapped, requests(wide)) == wanted
    assert left > 10
    assert len(ahead) > 10


def test_aborts_arrivals_and_stops_between_steps(tmp_path: Path, ahead: list[int]) -> None:
    """With a step under way: a request goes, one comes, and one ends by a stop string, which only its reader sees."""
    one_by_one, overlapped = both(MODELS["hybrid"](tmp_path / "model"), tmp_path, ahead, max_running_requests=4)
    found = []
    for made in (one_by_one, overlapped):
        told: list[RequestOutput] = []

        def between(step: int, tokens: dict[str, list[int]], made: Engine = made, told: Any = told) -> None:
            if step == 6:
                assert not made.abort("0")
            if step == 8:
                made.add_request(replace(requests(SAMPLINGS)[5], request_id="late"))
            if len(tokens.get("4", ())) >= 9 and not told:
                told += made.abort("4", reason="stop")

        got = run(made, requests(SAMPLINGS[:5]), between)
        assert [(o.request_id, o.finish_reason, o.num_completion_tokens, o.token_ids) for o in told] == [
            ("4", "stop", 9, [])
        ]
        del got["0"]  # how far it came is a matter of when it was aborted
        found.append(got)
        stats = made.stats().models[0]
        assert (stats.requests_running, stats.kv_cache_usage_ratio, stats.state_slots_used) == (0, 0.0, 0)
    assert found[0] == found[1]
    assert ahead


def test_preemption_and_priorities(tmp_path: Path, ahead: list[int]) -> None:
    """A cache that holds no two of the requests to their end, and queues behind few places: the same tokens, and the
    urgent go first."""
    path = MODELS["llama"](tmp_path / "model")
    one = engine(path, tmp_path / "probe", enable_overlap=False)
    block = one._models["tiny"].runner._cache.keys[0][0].nbytes * 2 * one._models["tiny"].config.num_hidden_layers  # type: ignore[union-attr]
    one_by_one, overlapped = both(path, tmp_path, ahead, kv_cache_bytes=9 * block, max_running_requests=3)
    found, preemptions = [], []
    for made in (one_by_one, overlapped):
        asked = [replace(request, priority=int(request.request_id) % 2) for request in requests(SAMPLINGS)]
        found.append(run(made, asked))
        preemptions.append(made.stats().models[0].preemptions)
    assert found[0] == found[1]
    assert all(preemptions)
    assert ahead


def test_adapters_and_what_cannot_be_launched(tmp_path: Path, ahead: list[int]) -> None:
    """Rows with an adapter; then one that asks for log-probabilities, beside which nothing is launched ahead."""
    found = []
    one_by_one, overlapped = both(MODELS["hybrid"](tmp_path / "model"), tmp_path, ahead)
    for made in (one_by_one, overlapped):
        made._models["tiny"].adapters.publish(adapter(made, "a", 3, "proj"))
        asked = requests(SAMPLINGS)
        asked[1:3] = [replace(request, adapter="a") for request in asked[1:3]]
        found.append(run(made, asked))
        before = len(ahead)
        found.append(run(made, requests([{**SAMPLINGS[0], "logprobs": 1}, SAMPLINGS[1]], max_tokens=5)))
        assert len(ahead) == before
    assert found[:2] == found[2:]
    assert ahead


def test_a_step_that_fails_under_way(tmp_path: Path, ahead: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that fails ends the sequences of that step, after the tokens of the one before; others go on."""
    _, made = both(MODELS["hybrid"](tmp_path / "model"), tmp_path, ahead, max_running_requests=4)
    wanted = run(made, requests(SAMPLINGS[:3]))
    launch = CudaGraphs.launch

    def broken(self: CudaGraphs, *args: Any) -> LaunchedStep | None:
        if args[-1] and len(ahead) > count + 3:
            raise RuntimeError("out of nothing")
        return launch(self, *args)

    count = len(ahead)
    monkeypatch.setattr(CudaGraphs, "launch", broken)
    failed = run(made, requests(SAMPLINGS[:3]))
    assert {reason for _, reason, _ in failed.values()} >= {"error"}
    for name, (tokens, reason, _) in failed.items():
        assert tokens == wanted[name][0][: len(tokens)]
        assert tokens
        assert reason == "error" or tokens == wanted[name][0]
    monkeypatch.setattr(CudaGraphs, "launch", launch)
    assert run(made, requests(SAMPLINGS[:3])) == wanted
