"""Generation through the Engine: batched = alone, chunked = whole, prefix hit = miss, preempted = uninterrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.core import model_loader
from engine.core.memory import plan_cache
from engine.engine import LULL_SECONDS, Engine
from engine.errors import (
    AlreadyExistsError,
    FormatError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    OverloadedError,
)
from engine.jobs import PerplexitySpec
from engine.request import Request, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
CONFIG = EngineConfig(device="cpu", kv_cache_bytes=4 << 20, block_size=4)


def make_engine(path: Path, **overrides: object) -> Engine:
    engine = Engine(dataclasses.replace(CONFIG, **overrides))  # type: ignore[arg-type]
    engine.load_model("tiny", path)
    return engine


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def collect(engine: Engine, requests: Iterable[Request]) -> dict[str, list[RequestOutput]]:
    """Runs requests to their end; all outputs by request id."""
    for request in requests:
        engine.add_request(request)
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_requests():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


MIXED = [
    Request(request_id="greedy", model="tiny", prompt_token_ids=prompt(0, 9), sampling=GREEDY),
    Request(
        request_id="seeded",
        model="tiny",
        prompt_token_ids=prompt(1, 30),
        sampling=SamplingParams(seed=5, temperature=0.8, top_k=40, max_tokens=20, ignore_eos=True),
    ),
    Request(
        request_id="nucleus",
        model="tiny",
        prompt_token_ids=prompt(2, 3),
        sampling=SamplingParams(seed=6, top_p=0.7, max_tokens=30, ignore_eos=True),
    ),
    Request(
        request_id="penalised",
        model="tiny",
        prompt_token_ids=prompt(3, 17),
        sampling=SamplingParams(
            temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=20, ignore_eos=True
        ),
    ),
    Request(
        request_id="biased",
        model="tiny",
        prompt_token_ids=prompt(4, 12),
        sampling=SamplingParams(temperature=0.0, logit_bias={7: 100.0}, max_tokens=8, ignore_eos=True),
    ),
]


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> dict[str, list[int]]:
    """What each of the mixed requests gives on a fresh engine of its own."""
    return {
        request.request_id: tokens(collect(make_engine(tiny_model), [request])[request.request_id]) for request in MIXED
    }


@pytest.mark.parametrize("max_batch_tokens", [4, 16, 2048])
def test_batch_gives_what_each_gives_alone(
    tiny_model: Path, alone: dict[str, list[int]], max_batch_tokens: int
) -> None:
    """Neither company nor chunked prefill changes a completion, sampled or greedy."""
    outputs = collect(make_engine(tiny_model, max_batch_tokens=max_batch_tokens), MIXED)
    assert {name: tokens(o) for name, o in outputs.items()} == alone
    assert tokens(outputs["biased"]) == [7] * 8


def test_preemption_changes_no_token(
    tiny_model: Path, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache too small for all, sequences lose their blocks and are recomputed; the tokens stay the same."""
    # Blocks for half of them; recurrent states would take their half of a budget in bytes.
    monkeypatch.setattr(model_loader, "plan_cache", lambda *args: dataclasses.replace(plan_cache(*args), num_blocks=24))
    engine = make_engine(tiny_model)
    outputs = collect(engine, MIXED)
    assert {name: tokens(o) for name, o in outputs.items()} == alone
    assert engine.stats().models[0].preemptions > 0


def test_prefix_hit_equals_miss(tiny_model: Path, alone: dict[str, list[int]]) -> None:
    """A second request with the same prompt skips its cached blocks, says so, and gives the same tokens."""
    engine = make_engine(tiny_model)
    collect(engine, [MIXED[1]])
    outputs = collect(engine, [dataclasses.replace(MIXED[1], request_id="again")])["again"]
    assert tokens(outputs) == alone["seeded"]
    assert outputs[-1].num_cached_tokens == 28
    salted = dataclasses.replace(MIXED[1], request_id="salted", cache_salt="tenant")
    assert collect(engine, [salted])["salted"][-1].num_cached_tokens == 0


def test_completions_of_one_prompt_are_as_seeded_and_share_it(tiny_model: Path) -> None:
    request = dataclasses.replace(MIXED[1], request_id="n", n=3)
    outputs = collect(make_engine(tiny_model), [request])["n"]
    texts = [tokens(outputs, index) for index in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    again = collect(make_engine(tiny_model), [request])["n"]
    assert texts == [tokens(again, index) for index in range(3)]
    assert [o.num_cached_tokens for o in outputs if o.finish_reason and o.index] == [28, 28]


def test_logprobs_are_those_of_transformers(tiny_model: Path) -> None:
    """Prompt and completion logprobs, ranks and alternatives, chunked or not, equal transformers' log-softmax."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = prompt(9, 21)
    request = Request(
        request_id="p",
        model="tiny",
        prompt_token_ids=ids,
        sampling=SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=3),
    )
    for budget in (5, 2048):
        outputs = collect(make_engine(tiny_model, max_batch_tokens=budget), [request])["p"]
        scored = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)
        completion = tokens(outputs)
        with torch.inference_mode():
            expected = reference(torch.tensor([ids + completion])).logits[0].log_softmax(-1)
        assert scored[0] is None
        entries = [*scored[1:], *(e for o in outputs for e in o.logprobs or [])]
        assert len(entries) == len(ids) - 1 + 5
        for position, entry in enumerate(entries):
            assert entry is not None
            row = expected[position]
            assert entry.token_id == (ids + completion)[position + 1]
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
            top = row.topk(len(entry.top))
            assert [t for t, _ in entry.top] == top.indices.tolist()
        assert [len(e.top) for e in scored[1:] if e] == [3] * 20


def test_endings(tiny_model: Path, alone: dict[str, list[int]]) -> None:
    """A stop token ends with "stop" and is named; max_tokens and the context end with "length"."""
    engine = make_engine(tiny_model)
    stop = alone["greedy"][4]
    first = alone["greedy"].index(stop)
    sampling = dataclasses.replace(GREEDY, stop_token_ids=[stop])
    outputs = collect(engine, [dataclasses.replace(MIXED[0], sampling=sampling)])["greedy"]
    assert tokens(outputs) == alone["greedy"][: first + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", stop)
    sampling = dataclasses.replace(GREEDY, max_tokens=None)
    outputs = collect(engine, [dataclasses.replace(MIXED[0], sampling=sampling)])["greedy"]
    assert len(tokens(outputs)) == 256 - 9
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].timings is not None


def test_abort_frees_blocks_at_once(tiny_model: Path) -> None:
    engine = make_engine(tiny_model)
    for request in MIXED:
        engine.add_request(request)
    engine.step()
    assert engine.stats().models[0].kv_cache_usage_ratio > 0
    for request in MIXED:
        engine.abort(request.request_id)
    assert not engine.has_requests()
    assert engine.stats().models[0].kv_cache_usage_ratio == 0
    engine.abort("unknown")


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"prompt_token_ids": []}, InvalidArgumentError, "prompt"),
        ({"prompt_token_ids": [300]}, InvalidArgumentError, "prompt"),
        ({"prompt_token_ids": [-1]}, InvalidArgumentError, "prompt"),
        ({"prompt_token_ids": [5] * 256}, OutOfRangeError, "prompt"),
        ({"n": 0}, InvalidArgumentError, "n"),
        ({"n": 65}, InvalidArgumentError, "n"),
        ({"model": "other"}, NotFoundError, "model"),
        ({"adapter": "none"}, NotFoundError, "adapter"),
        ({"adapter_version": 3}, InvalidArgumentError, "adapter_version"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, InvalidArgumentError, "temperature"),
        ({"sampling": SamplingParams(max_tokens=-1)}, InvalidArgumentError, "max_tokens"),
        ({"sampling": SamplingParams(top_p=0.0)}, InvalidArgumentError, "top_p"),
        ({"sampling": SamplingParams(logit_bias={1: float("inf")})}, InvalidArgumentError, "logit_bias"),
        ({"sampling": SamplingParams(stop_token_ids=[300])}, InvalidArgumentError, "stop_token_ids"),
        ({"sampling": SamplingParams(seed=-1)}, InvalidArgumentError, "seed"),
    ],
)
def test_bad_requests_name_the_field_and_leave_nothing(
    tiny_llama: Path, change: dict[str, object], error: type[Exception], field: str
) -> None:
    engine = make_engine(tiny_llama)
    with pytest.raises(error) as raised:
        engine.add_request(dataclasses.replace(MIXED[0], **change))  # type: ignore[arg-type]
    assert raised.value.field == field  # type: ignore[attr-defined]
    assert not engine.has_requests()
    engine.add_request(MIXED[0])
    with pytest.raises(AlreadyExistsError):
        engine.add_request(MIXED[0])


def test_a_full_queue_refuses_politely(tiny_llama: Path) -> None:
    engine = make_engine(tiny_llama, max_waiting_requests=1, max_running_requests=1)
    engine.add_request(MIXED[0])
    engine.add_request(MIXED[1])
    with pytest.raises(OverloadedError) as raised:
        engine.add_request(MIXED[2])
    assert raised.value.retry_after_seconds is not None


def test_non_finite_weights_end_their_own_request_alone(tiny_model: Path) -> None:
    """A step that fails reports an error, and what it wrote reaches nobody who gets its blocks next."""
    engine = make_engine(tiny_model)
    expected = tokens(collect(engine, [MIXED[0]])["greedy"])
    embedding = engine._models["tiny"].model.model.embed_tokens.weight  # type: ignore[union-attr]
    embedding.data = embedding.data.clone()
    kept = embedding.data[5].clone()
    embedding.data[5] = float("nan")
    bad = dataclasses.replace(MIXED[0], request_id="bad", prompt_token_ids=[5] * 11)
    outputs = collect(engine, [bad])["bad"]
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error_code == "internal"
    embedding.data[5] = kept
    again = collect(engine, [dataclasses.replace(MIXED[0], request_id=f"r{i}", cache_salt=str(i)) for i in range(4)])
    assert all(tokens(o) == expected for o in again.values())


def test_models_come_and_go(tiny_llama: Path, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama)
    assert engine.load_model("tiny", tiny_llama).name == "tiny"
    with pytest.raises(AlreadyExistsError):
        engine.load_model("tiny", tmp_path)
    with pytest.raises((FormatError, NotFoundError)):
        engine.load_model("nothing", tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError):
        engine.load_model("../up", tiny_llama)
    engine.unload_model("tiny")
    with pytest.raises(NotFoundError):
        engine.unload_model("tiny")


def test_jobs_go_on_in_small_pieces_in_a_lull(tiny_llama: Path) -> None:
    """Jobs are told that requests are served while there are some, and for LULL_SECONDS after the last step with one;
    an engine that stands idle forgets them."""
    now = 100.0
    engine = Engine(CONFIG, clock=lambda: now)
    engine.load_model("tiny", tiny_llama)
    loaded = engine._models["tiny"]
    assert not loaded.is_serving()
    engine.add_request(MIXED[0])
    assert loaded.is_serving()
    while engine.has_requests():
        engine.step()
    now += 0.9 * LULL_SECONDS
    engine.step()  # of nothing
    assert loaded.is_serving()
    now += 0.2 * LULL_SECONDS
    assert not loaded.is_serving()


def test_an_engine_tells_whether_all_that_comes_next_are_decodes(tiny_llama: Path, tmp_path: Path) -> None:
    """Not while a prompt is computed or waits for room, nor beside a job."""
    engine = make_engine(tiny_llama, max_batch_tokens=32, max_running_requests=1, state_dir=str(tmp_path))
    assert engine.only_decodes()
    told = []
    engine.add_request(Request(request_id="long", model="tiny", prompt_token_ids=prompt(0, 70), sampling=GREEDY))
    for _ in range(5):
        told.append(engine.only_decodes())
        engine.step()
    assert told == [False, False, False, True, True]  # 70 tokens are three chunks of at most 32
    engine.add_request(Request(request_id="next", model="tiny", prompt_token_ids=[1, 2, 3], sampling=GREEDY))
    assert not engine.only_decodes()
    engine.abort("next")
    assert engine.only_decodes()
    engine.start_job(PerplexitySpec(job_id="ppl", model="tiny", token_ids=prompt(1, 40), window=16, stride=8))
    assert not engine.only_decodes()
    engine.cancel_job("ppl")
    assert engine.only_decodes()
