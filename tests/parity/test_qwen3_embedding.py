"""The layout of Qwen3-Embedding end to end, against transformers as its model card uses it: a left-padded batch, the
last token's hidden state, length one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import FailedPreconditionError, FormatError
from engine.evaluation.embedding_config import read_embedding_config
from engine.jobs import EmbedFinished, EmbedSpec, QuantizeFinished, QuantizeSpec
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer
from tests.parity.test_gguf_loading import converted
from tests.tiny_embedder import PROMPTS, save_tiny_embedder
from tests.unit.loading_files import write_gguf

TOLERANCE = 1e-5
CONFIG = EngineConfig(device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=1 << 20)
TEXTS = [
    "What is the capital of China?",
    "",
    "naïve café – 東京 🙂 \u200b",
    "Gravity is a force that attracts two bodies towards each other. " * 4,
    "a",
    PROMPTS["query"] + "what is gravity?",
]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory."""
    return save_tiny_embedder(tmp_path_factory.mktemp("embedder") / "model")


def make_engine(path: Path, **overrides: Any) -> Engine:
    engine = Engine(dataclasses.replace(CONFIG, **overrides))
    engine.load_model("m", path)
    return engine


def vectors(engine: Engine, inputs: list[list[int]], **spec: Any) -> Tensor:
    """Of one job; pooling and length are the model's own."""
    engine.start_job(EmbedSpec(job_id="e", model="m", inputs=inputs, **({"normalize": None} | spec)))
    events = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    (event,) = events
    assert isinstance(event, EmbedFinished), event
    return torch.frombuffer(bytearray(event.vectors), dtype=torch.float32).view(len(inputs), event.dimensions)


@torch.no_grad()
def reference(path: Path, texts: list[str]) -> Tensor:
    """Last hidden states of the last tokens of a left-padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert bool((batch["attention_mask"][:, -1] == 1).all()), "padding is on the left"
    hidden: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden[:, -1]


def test_vectors_are_those_of_transformers(embedder: Path) -> None:
    """Unequal lengths, an empty text (its end token alone), Unicode and the query prompt; token ids are equal, too."""
    with safe_open(str(embedder / "model.safetensors"), framework="pt") as file:
        assert "embed_tokens.weight" in file.keys()  # noqa: SIM118 - not a mapping
    theirs, ours = AutoTokenizer.from_pretrained(embedder), Tokenizer.from_path(embedder)
    inputs = [ours.encode(text) for text in TEXTS]
    assert inputs == [theirs(text)["input_ids"] for text in TEXTS]
    assert inputs[1] == [ours.token_to_id("<|endoftext|>")] == [ours.pad_token_id]
    expected = F.normalize(reference(embedder, TEXTS), dim=-1)
    engine = make_engine(embedder)
    rows = vectors(engine, inputs)
    assert (rows - expected).abs().max() < TOLERANCE
    alone = torch.cat([vectors(engine, [ids]) for ids in inputs])
    assert (rows - alone).abs().max() < TOLERANCE


def test_matryoshka_truncates_and_then_normalises(embedder: Path) -> None:
    ours = Tokenizer.from_path(embedder)
    whole = reference(embedder, TEXTS)
    for dimensions in (1, 32, 64):
        rows = vectors(make_engine(embedder), [ours.encode(text) for text in TEXTS], dimensions=dimensions)
        assert (rows - F.normalize(whole[:, :dimensions], dim=-1)).abs().max() < TOLERANCE


def test_a_long_text_in_chunks_is_the_whole(embedder: Path) -> None:
    """Longer than a forward may be, and about as long as the context."""
    ours = Tokenizer.from_path(embedder)
    text = "the passage that answers the query " * 40
    ids = ours.encode(text)
    assert 200 < len(ids) <= 512
    expected = F.normalize(reference(embedder, [text, "a"]), dim=-1)
    for budget in (7, 64, 1024):
        rows = vectors(make_engine(embedder, max_batch_tokens=budget), [ids, ours.encode("a")])
        assert (rows - expected).abs().max() < TOLERANCE, budget


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Mistral", "Qwen2"])
def test_bare_names_of_causal_families_embed_and_generate(family: str, tmp_path: Path) -> None:
    """Saved from the base class without its head, tied: hidden states and greedy tokens are those of transformers."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(97, (2, 13))
    with torch.no_grad():
        expected = F.normalize(model(ids).last_hidden_state[:, -1], dim=-1)
    engine = make_engine(tmp_path)
    assert (vectors(engine, ids.tolist()) - expected).abs().max() < TOLERANCE
    head = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    greedy = head.generate(ids[:1], max_new_tokens=8, do_sample=False)[0, 13:].tolist()
    engine.add_request(
        Request(
            request_id="r",
            model="m",
            prompt_token_ids=ids[0].tolist(),
            sampling=SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
        )
    )
    tokens: list[int] = []
    while engine.has_requests():
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == greedy


def test_without_a_head_a_model_only_embeds(tmp_path: Path) -> None:
    """An untied model saved bare has no head to generate with: it embeds, says so, and refuses the rest; quantized, it
    stays what it is. With ``model.`` before the names, a missing head is a fault."""
    path = save_tiny_embedder(tmp_path / "headless", tie_word_embeddings=False)
    ours = Tokenizer.from_path(path)
    engine = make_engine(path)
    info = engine.models()[0]
    assert (info.task, info.num_blocks) == ("embed", 0)
    rows = vectors(engine, [ours.encode(text) for text in TEXTS])
    assert (rows - F.normalize(reference(path, TEXTS), dim=-1)).abs().max() < TOLERANCE
    with pytest.raises(FailedPreconditionError, match="has no head") as raised:
        engine.add_request(Request(request_id="r", model="m", prompt_token_ids=[1], sampling=SamplingParams()))
    assert raised.value.reason == "NOT_GENERATIVE"

    output = tmp_path / "q8"
    engine.start_job(
        QuantizeSpec(job_id="q", model="m", scheme="q8", output_dir=str(output), output_name="small", load=False)
    )
    events = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    assert isinstance(events[-1], QuantizeFinished), events[-1]
    small = make_engine(output)
    assert small.models()[0].task == "embed"
    assert read_embedding_config(output, causal=True).prompts.prefixes == PROMPTS
    similar = F.cosine_similarity(vectors(small, [ours.encode(text) for text in TEXTS]), rows)
    assert similar.min() > 0.99

    named = {f"model.{name}": value for name, value in load_file(path / "model.safetensors").items()}
    save_file(named, path / "model.safetensors")
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        make_engine(path)


def test_a_gguf_file_pools_the_last_token(embedder: Path, tmp_path: Path) -> None:
    """llama.cpp's pooling_type 3, and the end token that the file asks for."""
    backend = Tokenizer.from_path(embedder)
    content = AutoTokenizer.from_pretrained(embedder).backend_tokenizer
    vocabulary = sorted(content.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads((embedder / "tokenizer.json").read_text())["model"]["merges"]
    config = json.loads((embedder / "config.json").read_text())
    size = config["vocab_size"]
    tokens = [token for token, _ in vocabulary] + [f"[PAD{i}]" for i in range(size - len(vocabulary))]
    state = {f"model.{name}": value for name, value in load_file(embedder / "model.safetensors").items()}
    metadata: dict[str, Any] = {
        "qwen3.block_count": 2,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen3.attention.key_length": 24,
        "qwen3.attention.value_length": 24,
        "qwen3.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "qwen3.pooling_type": 3,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(vocabulary) - 1) + [5] * (size - len(vocabulary)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    path = write_gguf(tmp_path / "e.gguf", converted("qwen3", state), "qwen3", metadata)
    ours = Tokenizer.from_path(path)
    inputs = [ours.encode(text) for text in TEXTS]
    assert inputs == [backend.encode(text) for text in TEXTS]
    rows = vectors(make_engine(path), inputs)
    assert (rows - F.normalize(reference(embedder, TEXTS), dim=-1)).abs().max() < TOLERANCE
