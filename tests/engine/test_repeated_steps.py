"""Steps that repeat the last one's batch give what whole steps give, and nothing is repeated that must not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.core.decode_graphs import DecodeGraphs
from engine.core.repeated import RepeatedSteps
from engine.engine import Engine
from engine.ops import cpu
from engine.request import Request, RequestOutput, SamplingParams

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each step that was repeated."""
    found: list[int] = []
    run = RepeatedSteps.run

    def counted(self: RepeatedSteps) -> Any:
        found.append(len(self._sequences))
        return run(self)

    monkeypatch.setattr(RepeatedSteps, "run", counted)
    return found


def start(path: Path, *, blocks: int = 64, **options: Any) -> Engine:
    per_block = 2 * 2 * 4 * 2 * 16 * 4  # tests.tiny's Llama: keys and values, layers, block size, heads, width, bytes
    config = EngineConfig(
        device="cpu", dtype="float32", num_threads=1, block_size=4, kv_cache_bytes=blocks * per_block, **options
    )
    made = Engine(config)
    made.load_model("tiny", path)
    return made


def add(engine: Engine, name: str, prompt: list[int], max_tokens: int, **sampling: Any) -> None:
    params = SamplingParams(max_tokens=max_tokens, **(GREEDY | sampling))
    engine.add_request(Request(request_id=name, model="tiny", prompt_token_ids=prompt, sampling=params))


def steps(engine: Engine, count: int | None = None) -> list[RequestOutput]:
    """The outputs of so many steps; None: to the end."""
    outputs: list[RequestOutput] = []
    while engine.has_requests() and count != 0:
        outputs += engine.step()
        count = None if count is None else count - 1
    return outputs


def tokens(outputs: list[RequestOutput]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in outputs:
        assert output.finish_reason != "error", output.error_message
        found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def scene(engine: Engine) -> dict[str, list[int]]:
    """Requests that come, go, end and share blocks while others decode."""
    add(engine, "a", [5, 6, 7], 60)
    seen = steps(engine, 9)
    add(engine, "b", list(range(3, 20)), 12)
    add(engine, "c", [9], 41)
    seen += steps(engine, 8)
    engine.abort("c")
    seen += steps(engine, 3)
    add(engine, "d", [5, 6, 7], 30)
    seen += steps(engine)
    for name in "ef":  # prompts of one token, which have no past as decoded tokens have
        add(engine, name, [4], 9)
    return tokens(seen + steps(engine))


def test_the_same_tokens(tiny_llama: Path, repeats: list[int]) -> None:
    wanted = scene(start(tiny_llama, enable_decode_graphs=False))
    assert not repeats
    assert scene(start(tiny_llama)) == wanted
    assert {1, 2, 3} <= set(repeats)
    assert len(repeats) > 45


def test_the_same_tokens_where_blocks_run_out(tiny_llama: Path, repeats: list[int]) -> None:
    """A step that finds no block for one of its sequences preempts as any does."""
    found = []
    for options in ({"enable_decode_graphs": False}, {}):
        engine = start(tiny_llama, blocks=16, **options)
        for number in range(3):
            add(engine, str(number), [5 + number, 6, 7], 30)
        found.append(tokens(steps(engine)))
        assert engine.stats().models[0].preemptions > 0
    assert found[0] == found[1]
    assert repeats


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 2},
    {"temperature": 1.3, "top_p": 0.8, "seed": 3},
    {"temperature": 0.0},
]
PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.3, "logprobs": 2},
    {"logit_bias": {5: 3.0}, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 5, "min_tokens": 12, "stop_token_ids": list(range(60))},
]
"""What the plain sampler alone can do."""


@pytest.mark.parametrize("asked", [SAMPLED, SAMPLED + PLAIN], ids=["kernel", "plain"])
def test_the_same_draws(tiny_llama: Path, repeats: list[int], asked: list[dict[str, Any]]) -> None:
    """Sampled together they get what each gets in steps that are not repeated, with log-probabilities."""
    found = []
    for graphs in (False, True):
        engine = start(tiny_llama, blocks=128, enable_decode_graphs=graphs)
        for number, sampling in enumerate(asked):
            add(engine, str(number), [3 + number, 4], 30, **sampling)
        outputs = steps(engine)
        logprobs = [o.logprobs for o in outputs if asked[int(o.request_id)].get("logprobs")]
        found.append((tokens(outputs), [e[0].token_id for e in logprobs if e]))
    assert found[0] == found[1]
    assert len(found[1][1]) == (30 if len(asked) > len(SAMPLED) else 0)
    assert len(repeats) > 20
    assert repeats[0] == len(asked)


def test_a_row_that_the_kernel_leaves_is_the_samplers(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {}
    for leave in (False, True):
        engine = start(tiny_llama)
        for number, sampling in enumerate(SAMPLED):
            add(engine, str(number), [3 + number, 4], 12, **sampling)
        steps(engine, 5)
        run = DecodeGraphs.next_tokens

        def leaving(self: DecodeGraphs, *args: Any, run: Any = run) -> Any:
            chosen, logits = run(self, *args)
            return [-1 if row % 2 else token for row, token in enumerate(chosen)], logits

        with monkeypatch.context() as patch:
            if leave:
                patch.setattr(DecodeGraphs, "next_tokens", leaving)
            wanted[leave] = tokens(steps(engine))
    assert wanted[True] == wanted[False]


def test_logits_that_are_not_finite_end_their_sequence_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(tiny_llama)
    add(engine, "good", [3, 4], 12)
    add(engine, "bad", [7, 8], 12)
    steps(engine, 4)
    run = DecodeGraphs.next_tokens

    def broken(self: DecodeGraphs, *args: Any) -> Any:
        chosen, logits = run(self, *args)
        logits = logits.clone()
        logits[1, 7] = torch.nan
        return [chosen[0], -1], logits

    with monkeypatch.context() as patch:
        patch.setattr(DecodeGraphs, "next_tokens", broken)
        ended = {output.request_id: output for output in engine.step()}
    assert ended["good"].finish_reason is None
    assert (ended["bad"].finish_reason, ended["bad"].error_reason) == ("error", "NON_FINITE_LOGITS")
    assert sum(len(output.token_ids) for output in steps(engine)) == 12 - 5
