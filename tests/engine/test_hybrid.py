"""What only models with recurrent layers have: slots, checkpoints of states, adapters over both kinds of layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.cache.hybrid import HybridManager
from engine.context import packed_context
from engine.core.chunked import serving_logits
from engine.core.memory import plan_cache
from engine.engine import Engine
from engine.errors import OutOfMemoryError
from engine.jobs import (
    JobEvent,
    JobFailed,
    JobSpec,
    PerplexityFinished,
    PerplexitySpec,
    QuantizeFinished,
    QuantizeSpec,
    TrainFinished,
)
from engine.lora.adapter import Adapter, LoRABatch
from engine.request import Request
from tests.engine.test_generate import CONFIG, GREEDY, collect, make_engine, prompt, tokens
from tests.training_runs import make_spec, random_examples

pytestmark = pytest.mark.usefixtures("one_thread")


def request_of(name: str, ids: list[int], **changes: object) -> Request:
    sampling = dataclasses.replace(GREEDY, max_tokens=8)
    return dataclasses.replace(
        Request(request_id=name, model="tiny", prompt_token_ids=ids, sampling=sampling),
        **changes,  # type: ignore[arg-type]
    )


def one(engine: Engine, asked: Request) -> tuple[list[int], int]:
    """Tokens of a request that runs alone, and how many prompt tokens were cached."""
    outputs = collect(engine, [asked])[asked.request_id]
    return tokens(outputs), outputs[-1].num_cached_tokens


@pytest.mark.parametrize("budget", [7, 64, 2048])
def test_a_prefix_hit_in_both_kinds_of_layer_changes_no_token(tiny_hybrid: Path, budget: int) -> None:
    """Requests that share all, most or some of an earlier prompt, or go on from its completion, resume from the deepest
    checkpoint, wherever the cuts of chunked prefill fell; each gives what it gives on a fresh engine."""
    ids = prompt(20, 100)
    engine = make_engine(tiny_hybrid, max_batch_tokens=budget, state_checkpoint_interval=5, num_threads=1)
    first, cached = one(engine, request_of("first", ids))
    assert cached == 0
    follow_ups = [
        ("same", ids, 96),  # the checkpoint at the end of the prompt
        ("longer", ids + prompt(21, 9), 100),  # the one in its completion's course, every 5 blocks of 4
        ("turn", ids + first + prompt(22, 5), 104),  # the last boundary of the completion
        ("half", ids[:50] + prompt(23, 40), 40),
        ("short", ids[:21], 20),
        ("little", ids[:19] + prompt(24, 3), 0),
    ]
    for name, follow_up, expected in follow_ups:
        got, cached = one(engine, request_of(name, follow_up))
        assert cached == expected, name
        fresh, _ = one(
            make_engine(tiny_hybrid, enable_prefix_caching=False, num_threads=1), request_of(name, follow_up)
        )
        assert got == fresh, name


@pytest.mark.parametrize("kind", ["tiny_hybrid", "tiny_moe"])
def test_the_next_turn_of_a_chat_reuses_the_one_before(kind: str, request: pytest.FixtureRequest) -> None:
    """Each turn is the one before, its completion and new text: all but a part of a block is found, though checkpoints
    on the way are off, and tokens are those of an engine without caching. Of each completion one checkpoint is kept."""
    path: Path = request.getfixturevalue(kind)
    engine = make_engine(path, state_checkpoint_interval=0, num_threads=1)
    manager = engine._models["tiny"].runner._manager  # type: ignore[union-attr]
    assert isinstance(manager, HybridManager)
    talk, before = prompt(25, 22), 1
    for turn in range(3):
        sampling = dataclasses.replace(GREEDY, max_tokens=29 + turn)
        asked = request_of(f"turn{turn}", talk, sampling=sampling)
        got, cached = one(engine, asked)
        uncached = make_engine(path, enable_prefix_caching=False, num_threads=1)
        assert got == one(uncached, asked)[0]
        assert cached == (before - 1) // 4 * 4
        before = len(talk) + len(got)  # of which the last was never computed
        talk = talk + got + prompt(26 + turn, 7)
        assert manager.slots.num_checkpoints <= 2 * (turn + 1)


@pytest.mark.parametrize("kind", ["tiny_hybrid", "tiny_moe"])
def test_adapters_over_both_kinds_of_layer_hit_as_they_miss(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Whatever the cuts of chunked prefill, and with as few slots as two sequences and their checkpoints need: an
    adapter's tokens are those of an engine that caches nothing and computes whole prompts."""
    path: Path = request.getfixturevalue(kind)
    plain = make_engine(path, enable_prefix_caching=False, num_threads=1, state_dir=str(tmp_path / "plain"))
    plain._models["tiny"].adapters.publish(random_adapter(plain, "tone", 3))
    for budget in (3, 11, 29):
        engine = make_engine(
            path, max_batch_tokens=budget, max_running_requests=2, num_threads=1, state_dir=str(tmp_path / str(budget))
        )
        engine._models["tiny"].adapters.publish(random_adapter(engine, "tone", 3))
        ids = prompt(budget, 45)
        for number, (asked, hit) in enumerate([(ids, 0), (ids, 44), (ids[:30] + prompt(1, 9), 0), ([*ids, 5, 6], 44)]):
            each = request_of(f"{budget}-{number}", asked, adapter="tone")
            got, cached = one(engine, each)
            assert cached == hit
            assert got == one(plain, each)[0]


def test_slots_limit_what_runs_and_are_reported(tiny_hybrid: Path) -> None:
    """With memory for few states, the others wait; slots and bytes are told, and every slot comes back."""
    info = make_engine(tiny_hybrid, num_threads=1).models()[0]
    slot_bytes = info.state_bytes // info.num_slots
    assert slot_bytes == 3 * (3 * (2 * 2 * 16 + 4 * 16) + 4 * 16 * 16) * 4
    engine = make_engine(tiny_hybrid, kv_cache_bytes=10 * slot_bytes, num_threads=1)
    info = engine.models()[0]
    assert (info.num_slots, info.state_bytes) == (5, 5 * slot_bytes)
    requests = [request_of(str(i), prompt(30 + i, 12)) for i in range(6)]
    for asked in requests:
        engine.add_request(asked)
    used = set()
    outputs: dict[str, list[int]] = {}
    while engine.has_requests():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        used.add(engine.stats().models[0].state_slots_used)
    assert max(used) == 2
    assert engine.stats().models[0].state_slots_used == 0
    for asked in requests:
        assert outputs[asked.request_id] == one(make_engine(tiny_hybrid, num_threads=1), asked)[0]


def test_a_cache_too_small_is_refused(tiny_hybrid: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="two slots"):
        make_engine(tiny_hybrid, kv_cache_bytes=20000)


@pytest.mark.parametrize("layer_types", [["linear_attention"] * 2, ["full_attention"] * 2], ids=["linear", "full"])
def test_one_kind_of_layer_alone(tmp_path: Path, layer_types: list[str]) -> None:
    """A model without attention layers has blocks that cost nothing, one without recurrent ones has no slots."""
    from tests.tiny import save_tiny_hybrid

    path = save_tiny_hybrid(tmp_path / "one", layer_types=layer_types, num_hidden_layers=2)
    engine = make_engine(path, max_batch_tokens=8, num_threads=1)
    info = engine.models()[0]
    assert (info.kv_cache_bytes == 0) == (layer_types[0] == "linear_attention")
    assert (info.num_slots == 0) == (layer_types[0] == "full_attention")
    asked = request_of("a", prompt(40, 30))
    first, _ = one(engine, asked)
    again, cached = one(engine, dataclasses.replace(asked, request_id="b"))
    assert first == again
    assert cached == 28
    loaded = engine._models["tiny"]
    logits = serving_logits(loaded, [asked.prompt_token_ids])[0]
    assert int(logits[-1].argmax()) == first[0]


def test_plan_shares_memory(tiny_hybrid: Path) -> None:
    """States take at most half of it, and no more than running sequences and as many checkpoints need."""
    from engine.loading import open_checkpoint

    config = open_checkpoint(tiny_hybrid).config
    device = torch.device("cpu")

    def plan(**changes: object) -> tuple[int, int, int]:
        engine_config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
        made = plan_cache(config, engine_config, 1, 3, 256, device, torch.float32)
        return made.num_blocks, made.num_slots, made.max_sequences

    assert plan(kv_cache_bytes=1 << 30, max_running_requests=8) == (8 * 64 + 1, 17, 8)
    assert plan(kv_cache_bytes=1 << 30, max_running_requests=8, enable_prefix_caching=False)[1:] == (9, 8)
    blocks, slots, running = plan(kv_cache_bytes=200 * 16896, max_running_requests=300)
    assert (slots, running) == (100, 50)
    assert blocks * 1024 <= 200 * 16896 - slots * 16896


def random_adapter(engine: Engine, name: str = "a", seed: int = 0) -> Adapter:
    """An adapter over every linear, with B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, linear in engine._models["tiny"].model.linears().items():
        a = torch.randn(3, linear.in_features, generator=generator) * 0.2
        modules[module] = (a, torch.randn(linear.out_features, 3, generator=generator) * 0.2)
    return Adapter(name=name, version=1, rank=3, alpha=6.0, modules=modules)


@pytest.mark.parametrize("kind", ["tiny_hybrid", "tiny_moe"])
@torch.no_grad()
def test_training_forward_is_serving_forward(kind: str, request: pytest.FixtureRequest) -> None:
    """Packed without a cache, and through slots and blocks in chunks of 9 tokens: the same logits, with an adapter over
    the linears of both kinds of layer."""
    engine = make_engine(request.getfixturevalue(kind), max_batch_tokens=9, num_threads=1)
    loaded = engine._models["tiny"]
    adapter = random_adapter(engine)
    sequences = [prompt(50, 40), prompt(51, 1), prompt(52, 17)]
    lengths = [len(s) for s in sequences]
    ctx = packed_context(lengths, lora=LoRABatch([(adapter, 0, sum(lengths))], sum(lengths)))
    model = loaded.causal_lm()
    packed = model.compute_logits(model(torch.tensor([i for s in sequences for i in s]), ctx)).split(lengths)
    plain = serving_logits(loaded, sequences)
    for ours, served, base in zip(packed, serving_logits(loaded, sequences, adapter), plain, strict=True):
        torch.testing.assert_close(ours, served, atol=1e-4, rtol=1e-4)
        assert (served - base).abs().max() > 0.1, "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("kind", ["tiny_hybrid", "tiny_moe"])
def test_jobs_run_on_hybrids(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A perplexity, a training run whose adapter then answers, and a quantized copy that is served."""
    engine = make_engine(request.getfixturevalue(kind), num_threads=1, state_dir=str(tmp_path / "state"))

    def finished(spec: JobSpec) -> JobEvent:
        engine.start_job(spec)
        events: list[JobEvent] = []
        while engine.has_jobs():
            events += engine.advance_jobs()
        assert not isinstance(events[-1], JobFailed), events[-1]
        return events[-1]

    scored = finished(PerplexitySpec(job_id="p", model="tiny", token_ids=prompt(60, 120), window=50, stride=20))
    assert isinstance(scored, PerplexityFinished)
    with torch.no_grad():
        logits = serving_logits(engine._models["tiny"], [prompt(60, 120)[:50]])[0].log_softmax(-1)
    first_window = -logits[:-1].gather(1, torch.tensor(prompt(60, 120)[1:50])[:, None]).sum().item()
    assert 0 < first_window < scored.nll * scored.num_tokens
    trained = finished(make_spec(tmp_path, random_examples([10, 40, 20, 33]), learning_rate=2e-2, max_steps=8))
    assert isinstance(trained, TrainFinished)
    asked = Request(request_id="base", model="tiny", prompt_token_ids=prompt(61, 20), sampling=GREEDY)
    plain, _ = one(engine, asked)
    tuned, cached = one(engine, dataclasses.replace(asked, request_id="tuned", adapter="tone"))
    assert cached == 0, "the base's states are no prefix of the adapter's"
    assert tuned != plain
    spec = QuantizeSpec(
        job_id="q",
        model="tiny",
        scheme="q8",
        output_dir=str(tmp_path / "q8"),
        output_name="small",
        eval_token_ids=prompt(62, 60),
    )
    report = finished(spec)
    assert isinstance(report, QuantizeFinished)
    assert engine.models()[-1].name == "small"
    assert len(one(engine, dataclasses.replace(asked, request_id="small", model="small"))[0]) == 24


def test_bfloat16(tiny_hybrid: Path) -> None:
    """States stay in float32 beside a narrow model, and a batch gives what each request gives alone."""
    engine = make_engine(tiny_hybrid, dtype="bfloat16", num_threads=1)
    states = engine._models["tiny"].runner._states  # type: ignore[union-attr]
    assert states is not None
    assert {t.dtype for t in (*states.windows, *states.matrices)} == {torch.float32}
    requests = [request_of(f"r{i}", prompt(70 + i, 15 + i)) for i in range(3)]
    outputs = collect(engine, requests)
    for asked in requests:
        alone = one(make_engine(tiny_hybrid, dtype="bfloat16", num_threads=1), asked)[0]
        assert tokens(outputs[asked.request_id])[:2] == alone[:2], "later ones may part, where two logits round alike"
