"""Embed jobs through the Engine: encoders and causal models, adapters, order, slices, bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaForCausalLM, LlamaModel, RobertaConfig, RobertaModel

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, InvalidArgumentError, NotFoundError, OutOfRangeError
from engine.jobs import EmbedFinished, EmbedSpec, JobEvent, JobFailed
from engine.request import Request, SamplingParams
from tests.parity.loading import randomize

CONFIG = EngineConfig(device="cpu", dtype="float32", num_threads=2, kv_cache_bytes=1 << 20)
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random BERT of transformers, and its directory."""
    path = tmp_path_factory.mktemp("bert")
    reference = randomize(BertModel(BertConfig(**SIZES)), 1)
    reference.save_pretrained(path)
    return reference, path


def inputs(lengths: Sequence[int], vocab_size: int = 101) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def finish(engine: Engine, **spec: Any) -> list[JobEvent]:
    """Runs one Embed job to its end."""
    engine.start_job(EmbedSpec(job_id="e", model="m", **spec))
    events: list[JobEvent] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    return events


def vectors(engine: Engine, **spec: Any) -> Tensor:
    (event,) = finish(engine, **spec)
    assert isinstance(event, EmbedFinished), event
    flat = torch.frombuffer(bytearray(event.vectors), dtype=torch.float32)
    assert flat.numel() == len(spec["inputs"]) * event.dimensions
    assert event.num_tokens == sum(map(len, spec["inputs"]))
    return flat.view(len(spec["inputs"]), event.dimensions)


def make_engine(path: Path, **overrides: Any) -> Engine:
    engine = Engine(dataclasses.replace(CONFIG, **overrides))
    engine.load_model("m", path)
    return engine


@torch.no_grad()
def expected(reference: Any, texts: list[list[int]], pooling: str) -> Tensor:
    """Pooled hidden states of transformers, one input a forward."""
    rows = []
    for ids in texts:
        hidden = reference(input_ids=torch.tensor([ids])).last_hidden_state[0]
        rows.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("max_batch_tokens", [8, 70, 4096])
def test_order_and_values_whatever_the_batches(encoder: tuple[Any, Path], pooling: str, max_batch_tokens: int) -> None:
    """Inputs of all lengths come back in their order, also where one is longer than a whole batch."""
    reference, path = encoder
    texts = inputs([5, 64, 1, 33, 5, 2, 17, 64, 3])
    rows = vectors(make_engine(path, max_batch_tokens=max_batch_tokens), inputs=texts, pooling=pooling, normalize=False)
    assert (rows - expected(reference, texts, pooling)).abs().max() < 1e-4


def test_defaults_normalisation_and_dimensions(encoder: tuple[Any, Path]) -> None:
    """Unset pooling is the model's own; vectors have length 1; truncation comes before that."""
    reference, path = encoder
    engine, texts = make_engine(path), inputs([5, 20, 9])
    plain = expected(reference, texts, "mean")
    normalized = torch.nn.functional.normalize
    assert torch.allclose(vectors(engine, inputs=texts), normalized(plain), atol=1e-5)
    short = vectors(engine, inputs=texts, dimensions=7)
    assert short.shape == (3, 7)
    assert torch.allclose(short, normalized(plain[:, :7]), atol=1e-5)
    own = vectors(engine, inputs=texts, normalize=None)
    assert torch.allclose(own, normalized(plain), atol=1e-5)


@pytest.mark.parametrize("max_batch_tokens", [5, 2048])
def test_causal_model_takes_the_last_token(tiny_llama: Path, max_batch_tokens: int) -> None:
    """A causal model embeds by its last token's final hidden state, by default, and by the mean on request."""
    reference = LlamaModel.from_pretrained(tiny_llama).eval()
    engine, texts = (
        make_engine(tiny_llama, max_batch_tokens=max_batch_tokens),
        inputs([7, 30, 1], reference.config.vocab_size),
    )
    for pooling, name in ((None, "last"), ("mean", "mean")):
        rows = vectors(engine, inputs=texts, pooling=pooling, normalize=False)
        assert (rows - expected(reference, texts, name)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_adapter(encoder: tuple[Any, Path], tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """An adapter that peft wrote changes vectors as peft does; the base's stay as they were."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    if kind == "encoder":
        path = encoder[1]
        reference = BertModel.from_pretrained(path, add_pooling_layer=False)
        tuned = get_peft_model(reference, LoraConfig(target_modules=["query", "value", "dense"], **options))
    else:
        path = tiny_llama
        causal = LlamaForCausalLM.from_pretrained(path)
        tuned = get_peft_model(causal, LoraConfig(target_modules=["q_proj", "down_proj"], **options))
        reference = causal.model
    tuned.eval().save_pretrained(tmp_path)
    engine, texts = make_engine(path), inputs([7, 30, 1], reference.config.vocab_size)
    base = vectors(engine, inputs=texts, pooling="mean", normalize=False)
    engine.load_adapter("m", "tone", tmp_path)
    rows = vectors(engine, inputs=texts, pooling="mean", normalize=False, adapter="tone")
    assert (rows - expected(reference, texts, "mean")).abs().max() < 1e-4
    assert (rows - base).abs().max() > 1e-2
    assert torch.equal(vectors(engine, inputs=texts, pooling="mean", normalize=False), base)


def test_many_slices_and_cancellation(encoder: tuple[Any, Path]) -> None:
    """A long job gives way after each batch, and a cancel between two ends it at once."""
    engine = make_engine(encoder[1], max_batch_tokens=64, job_slice_seconds=1e-6)
    engine.start_job(EmbedSpec(job_id="e", model="m", inputs=inputs([60] * 20)))
    for _ in range(3):
        assert engine.advance_jobs() == []
    assert engine.has_jobs()
    assert engine.cancel_job("e").error_code == "cancelled"
    assert not engine.has_jobs()


def test_a_job_begins_with_slices_of_the_size_that_the_last_one_reached(encoder: tuple[Any, Path]) -> None:
    engine = make_engine(encoder[1], job_slice_seconds=3600.0)
    texts = inputs([60] * 12)  # a first slice of 128 tokens, twice as many in each one after it
    sizes: list[int] = []
    engine._models["m"].model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    first, second = vectors(engine, inputs=texts), vectors(engine, inputs=texts)
    assert sizes == [120, 240, 360, 720]
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_embedding_beside_generation(tiny_llama: Path) -> None:
    """Greedy tokens are those of an engine that does nothing else, and the vectors those of an idle one."""
    request = Request(
        request_id="r",
        model="m",
        prompt_token_ids=[5, 6, 7],
        sampling=SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    )

    def generate(engine: Engine) -> tuple[list[int], list[JobEvent]]:
        engine.add_request(request)
        tokens: list[int] = []
        events: list[JobEvent] = []
        while engine.has_requests() or engine.has_jobs():
            for output in engine.step():
                tokens += output.token_ids
            events += engine.advance_jobs()
        return tokens, events

    texts = inputs([40] * 12, 97)
    alone, _ = generate(make_engine(tiny_llama))
    idle = vectors(make_engine(tiny_llama), inputs=texts)
    busy = make_engine(tiny_llama, max_batch_tokens=64)
    busy.start_job(EmbedSpec(job_id="e", model="m", inputs=texts))
    tokens, events = generate(busy)
    assert tokens == alone
    assert isinstance(events[-1], EmbedFinished)
    rows = torch.frombuffer(bytearray(events[-1].vectors), dtype=torch.float32).view(idle.shape)
    assert torch.allclose(rows, idle, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "error", "field"),
    [
        ({"inputs": []}, InvalidArgumentError, "inputs"),
        ({"inputs": [[1], []]}, InvalidArgumentError, "inputs[1]"),
        ({"inputs": [[1], [2], [3] * 65]}, OutOfRangeError, "inputs[2]"),
        ({"inputs": [[1, 101]]}, InvalidArgumentError, "inputs[0]"),
        ({"inputs": [[-1]]}, InvalidArgumentError, "inputs[0]"),
        ({"inputs": [[1]], "dimensions": 0}, OutOfRangeError, "dimensions"),
        ({"inputs": [[1]], "dimensions": 49}, OutOfRangeError, "dimensions"),
        ({"inputs": [[1]], "pooling": "max"}, InvalidArgumentError, "pooling"),
        ({"inputs": [[1]], "adapter": "nobody"}, NotFoundError, "adapter"),
    ],
)
def test_bad_input_is_refused_at_the_start(
    encoder: tuple[Any, Path], spec: dict[str, Any], error: type[EngineError], field: str
) -> None:
    """The error comes from start_job and names the field; no job is left behind, and the engine goes on."""
    engine = make_engine(encoder[1])
    with pytest.raises(error) as raised:
        engine.start_job(EmbedSpec(job_id="e", model="m", **spec))
    assert raised.value.field == field
    assert not engine.has_jobs()
    assert vectors(engine, inputs=[[1, 2]]).shape == (1, 48)


def test_roberta_refuses_what_its_position_table_does_not_hold(tmp_path: Path) -> None:
    """64 rows of which two come before the first position: 62 tokens pass, 63 do not."""
    reference = randomize(RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)), 2)
    reference.save_pretrained(tmp_path)
    engine = make_engine(tmp_path)
    assert vectors(engine, inputs=[[7] * 62]).shape == (1, 48)
    with pytest.raises(OutOfRangeError, match="63 tokens; accepted: at most 62"):
        engine.start_job(EmbedSpec(job_id="e", model="m", inputs=[[7] * 63]))


def test_non_finite_weights_fail_the_job_alone(tmp_path: Path) -> None:
    """A model whose weights overflow ends the job with an error that names the input; nothing invented comes back."""
    reference = randomize(BertModel(BertConfig(**SIZES)), 1)
    with torch.no_grad():
        reference.embeddings.word_embeddings.weight[50] = float("nan")
    reference.save_pretrained(tmp_path)
    engine = make_engine(tmp_path)
    (failed,) = finish(engine, inputs=[[1, 2], [3, 50, 4], [5]])
    assert isinstance(failed, JobFailed)
    assert (failed.error_reason, failed.error_field) == ("NON_FINITE", "inputs[1]")
    assert torch.isfinite(vectors(engine, inputs=[[1, 2]])).all()
