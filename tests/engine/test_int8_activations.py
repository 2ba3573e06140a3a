"""Serving, scoring and training round activations where the configuration allows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.core.chunked import chunked_hidden, serving_logits
from engine.core.loaded import LoadedModel
from engine.engine import Engine
from engine.errors import TrainingError
from engine.evaluation.perplexity import perplexity
from engine.jobs import EmbedSpec, LoRAParams, PerplexityFinished, PerplexitySpec, TrainFinished
from engine.ops import cpu, quantized
from engine.ops.cpu import PackedWeight, gemm
from engine.request import Request, SamplingParams
from engine.training import loss_slices
from engine.training.forward import TrainingForward
from engine.training.lora_init import new_adapter
from engine.verification.forwards import micro_batch
from tests.engine.test_gguf_weights import IDS, write
from tests.training_runs import events_of, make_spec, random_examples

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")


def make(path: Path, quantization: str, dtype: str = "auto", state_dir: Path | str = "") -> Engine:
    config = EngineConfig(
        device="cpu",
        dtype=dtype,  # type: ignore[arg-type]
        activation_quantization=quantization,  # type: ignore[arg-type]
        max_batch_tokens=64,
        num_threads=1,
        kv_cache_bytes=1 << 22,
        state_dir=str(state_dir),
    )
    engine = Engine(config)
    engine.load_model("m", path)
    return engine


def load(*args: object, **kwargs: object) -> LoadedModel:
    return make(*args, **kwargs)._models["m"]  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product by integers."""
    rows: list[int] = []
    linear = PackedWeight.linear

    def counted(packed: PackedWeight, x: Tensor, *, rounds: bool = False) -> Tensor:
        if rounds:
            rows.append(x.numel() // packed.inputs)
        return linear(packed, x, rounds=rounds)

    monkeypatch.setattr(PackedWeight, "linear", counted)
    return rows


def reference(packed: PackedWeight, x: Tensor, *, rounds: bool = False) -> Tensor:
    assert rounds
    return (gemm.rounded(x) @ packed.widen(0, packed.outputs).double().T).float()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_logits_are_those_of_rounded_activations(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, kind)
    loaded = load(path, "auto")
    (ours,) = serving_logits(loaded, [IDS])
    (exact,) = serving_logits(load(path, "off"), [IDS])
    with monkeypatch.context() as patched:
        patched.setattr(PackedWeight, "linear", reference)
        (expected,) = serving_logits(loaded, [IDS])
    largest = expected.abs().max()
    assert (ours - expected).abs().max() <= 1e-2 * largest  # a last bit may turn a rounding, and that turns others
    assert (ours - expected).abs().median() <= 1e-6 * largest
    # With random weights as large as these, some rows of attention turn to other tokens; the most do not.
    assert 1e-5 * largest < (ours - exact).abs().median() < 0.05 * largest


def test_float32_and_off_are_exact(tmp_path: Path, calls: list[int]) -> None:
    path = write(tmp_path, "Q8_0")
    results = [
        serving_logits(load(path, *how), [IDS])[0] for how in (("off",), ("auto", "float32"), ("off", "float32"))
    ]
    assert calls == []
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [1, 16])
def test_chunks_of_a_prompt_give_what_the_whole_gives(tmp_path: Path, calls: list[int], size: int) -> None:
    """39 tokens at once, and few at a time; only attention sums in another order."""
    loaded = load(write(tmp_path, "Q4_1"), "auto")
    (whole,) = serving_logits(loaded, [IDS])
    assert set(calls) == {len(IDS)}
    calls.clear()
    model = loaded.causal_lm()
    with gemm.int8_activations(True):
        parts = [part for states in chunked_hidden(model, [IDS], max_tokens=size) for _, part in states]
        chunked = torch.cat([model.compute_logits(part) for part in parts])
    assert set(calls) == {size, len(IDS) % size or size}
    assert (whole - chunked).abs().max() <= 1e-2 * whole.abs().max()
    assert (whole - chunked).abs().median() <= 1e-6 * whole.abs().max()


def test_serving_and_scoring_round(tmp_path: Path, calls: list[int]) -> None:
    engine = make(write(tmp_path, "Q8_0"), "auto")
    engine.add_request(
        Request(request_id="r", model="m", prompt_token_ids=IDS, sampling=SamplingParams(max_tokens=2, temperature=0.0))
    )
    while engine.has_requests():
        engine.step()
    assert len(IDS) in calls
    assert 1 in calls  # the decoded token: a lone row as one of many
    calls.clear()
    loaded = engine._models["m"]
    *_, last = perplexity(PerplexitySpec(job_id="p", model="m", token_ids=IDS, window=20, stride=10), loaded)
    assert isinstance(last, PerplexityFinished)
    assert calls
    calls.clear()
    engine.start_job(EmbedSpec(job_id="e", model="m", inputs=[IDS]))
    while engine.has_jobs():
        engine.advance_jobs()
    assert calls


def training_logits(loaded: LoadedModel, sequences: list[list[int]]) -> Tensor:
    """Of all tokens, through training's forward and its head in parts."""
    forward = TrainingForward(loaded, torch.float32)
    adapter = new_adapter("a", loaded.model.linears(), LoRAParams(rank=4), 0, "cpu")
    with torch.enable_grad():
        hidden = forward.hidden(micro_batch(sequences), adapter)
    vocab_size = loaded.config.vocab_size
    parts = [forward.logits_part(hidden, start, start + 8) for start in range(0, vocab_size, 8)]
    return torch.cat(parts, dim=-1).detach()


def test_training_computes_what_serving_does(tmp_path: Path, calls: list[int]) -> None:
    """The forward with gradients: by the same integers, and by floats where those are wanted."""
    path = write(tmp_path, "Q4_1")
    sequences = [IDS, IDS[7:20]]
    for how in (("auto",), ("off",), ("auto", "float32")):
        loaded = load(path, *how)
        served = torch.cat(serving_logits(loaded, sequences))
        rounds = bool(calls)
        calls.clear()
        trained = training_logits(loaded, sequences)
        assert bool(calls) == rounds == (how == ("auto",))
        calls.clear()
        assert (trained - served).abs().max() <= (1e-2 if rounds else 1e-5) * served.abs().max()
        assert (trained - served).abs().median() <= 1e-6 * served.abs().max()


def test_a_run_rounds_where_serving_does(tmp_path: Path, calls: list[int]) -> None:
    """To its end, its own proof of the forward included; what it learns is what it learns by floats."""
    path, examples = write(tmp_path, "Q8_0"), random_examples([30, 25], vocab_size=32)
    num_tokens = sum(len(example.token_ids) for example in examples)
    last = {}
    for quantization in ("auto", "off"):
        loaded = load(path, quantization, state_dir=tmp_path / f"state-{quantization}")
        spec = make_spec(tmp_path / quantization, examples, examples, max_steps=3, max_seq_len=32)
        finished = events_of(spec, loaded)[-1]
        assert isinstance(finished, TrainFinished)
        assert finished.final_nll is not None
        last[quantization] = finished.final_nll
        assert (num_tokens in calls) == (quantization == "auto")
        calls.clear()
    assert last["auto"] != last["off"]
    assert last["auto"] == pytest.approx(last["off"], rel=0.02)


@pytest.mark.parametrize("broken", ["a product by floats", "a part of the head"])
def test_a_product_that_differs_from_that_of_serving_is_refused(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the forwards agree where both multiply by floats."""
    loaded = load(write(tmp_path, "Q8_0"), "auto", state_dir=tmp_path / "state")
    if broken == "a product by floats":
        forward = quantized._forward
        monkeypatch.setattr(quantized, "_forward", lambda x, rows, out, packed: forward(x, rows, out, None))
        name = "q_proj"
    else:
        part = PackedWeight.part
        monkeypatch.setattr(PackedWeight, "part", lambda packed, start, end: part(packed, 0, end - start))
        monkeypatch.setattr(loss_slices, "HEAD_PIECE_PRODUCTS", 1)
        monkeypatch.setattr(loss_slices, "MIN_PART_ELEMENTS", 1)
        name = "lm_head|embed_tokens"
    with pytest.raises(TrainingError, match=f"multiply differently by .*({name})") as caught:
        events_of(make_spec(tmp_path / "run", random_examples([30, 25], vocab_size=32)), loaded)
    assert caught.value.reason == "FORWARD_MISMATCH"
