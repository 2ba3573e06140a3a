"""Ending one completion: the others go on, and each is reported and observed once."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestOutput, SamplingParams

CONFIG = EngineConfig(device="cpu", kv_cache_bytes=4 << 20, block_size=4)


def start(path: Path, n: int, max_tokens: int = 12) -> Engine:
    """An engine that runs one request, ``r``."""
    engine = Engine(CONFIG)
    engine.load_model("tiny", path)
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(Request(request_id="r", model="tiny", prompt_token_ids=[5, 6, 7], sampling=sampling, n=n))
    return engine


def rest(engine: Engine) -> list[RequestOutput]:
    """All that is still to come."""
    outputs: list[RequestOutput] = []
    while engine.has_requests():
        outputs.extend(engine.step())
    return outputs


def observed(engine: Engine, name: str = "request_generation_tokens") -> list[float]:
    return sorted(engine.stats().models[0].observations.get(name, []))


def usage(engine: Engine) -> float:
    return engine.stats().models[0].kv_cache_usage_ratio


def test_one_completion_stops_and_its_siblings_end_as_without_it(tiny_llama: Path) -> None:
    undisturbed = rest(start(tiny_llama, 3))
    engine = start(tiny_llama, 3)
    seen = [output for _ in range(5) for output in engine.step()]
    [last] = engine.abort("r", 1, "stop")
    assert (last.index, last.finish_reason, last.token_ids) == (1, "stop", [])
    made = sum(len(output.token_ids) for output in seen if output.index == 1)
    assert last.num_completion_tokens == made > 0
    assert last.num_prompt_tokens == 3
    assert last.timings is not None
    assert last.timings.prefill_seconds > 0
    assert last.timings.total_seconds >= last.timings.queue_seconds + last.timings.prefill_seconds
    assert engine.abort("r", 1, "stop") == []  # it has ended
    seen.extend(rest(engine))
    for index in (0, 2):
        assert [o.token_ids for o in seen if o.index == index] == [o.token_ids for o in undisturbed if o.index == index]
    assert observed(engine) == [made, 12, 12]
    assert engine.abort("r", 0, "stop") == []


def test_the_last_completion_to_stop_ends_the_request(tiny_llama: Path) -> None:
    """Its blocks are free at once, and its id may be used again."""
    engine = start(tiny_llama, 2)
    for _ in range(4):
        engine.step()
    assert usage(engine) > 0
    assert [output.index for output in engine.abort("r", None, "stop")] == [0, 1]
    assert not engine.has_requests()
    assert usage(engine) == 0
    sampling = SamplingParams(max_tokens=1)
    engine.add_request(Request(request_id="r", model="tiny", prompt_token_ids=[5], sampling=sampling))
    assert len(rest(engine)) == 1


def test_a_cancelled_completion_says_nothing_more_and_is_not_observed(tiny_llama: Path) -> None:
    engine = start(tiny_llama, 2)
    engine.step()
    assert engine.abort("r", 0) == []
    ends = [output.index for output in rest(engine) if output.finish_reason]
    assert ends == [1]
    assert observed(engine) == [12]


def test_a_stop_after_the_last_token_is_observed_once(tiny_llama: Path) -> None:
    engine = start(tiny_llama, 1, max_tokens=4)
    outputs = rest(engine)
    assert outputs[-1].finish_reason == "length"
    assert engine.abort("r", 0, "stop") == []
    assert observed(engine, "request_duration_seconds") == [outputs[-1].timings.total_seconds]  # type: ignore[union-attr]
