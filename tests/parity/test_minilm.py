"""all-MiniLM-L6-v2, real weights: embeddings against recorded reference vectors and against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from engine.config import ActivationQuantization, EngineConfig
from engine.context import packed_context
from engine.engine import Engine
from engine.evaluation.embedding_config import read_embedding_config
from engine.jobs import EmbedFinished, EmbedSpec, QuantizeSpec
from engine.layers.pooling import finish, pool
from engine.models.base import Model
from tests.bench.work import run_job
from tests.parity.loading import load

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "Perplexity is the exponential of the mean negative log-likelihood. " * 12,
    "naïve café – 東京 🙂",
    "How do I reset my password?",
]
MIN_COSINE = 0.99999


@pytest.fixture(scope="module")
def minilm(minilm_dir: Path) -> Model:
    return load(minilm_dir)


@torch.no_grad()
def embeddings(model: Model, path: Path, sequences: list[list[int]]) -> Tensor:
    """Vectors of packed sequences, pooled as the model's own files say."""
    own = read_embedding_config(path, causal=False)
    assert (own.pooling, own.normalize) == ("mean", True)
    ctx = packed_context([len(sequence) for sequence in sequences], causal=False)
    hidden = model(torch.tensor([token for sequence in sequences for token in sequence]), ctx)
    return finish(pool(hidden, ctx.cu_seqlens, own.pooling), dimensions=None, normalize=own.normalize)


def test_recorded_vectors(minilm: Model, minilm_dir: Path, shared: Path) -> None:
    """Cosine to the vectors of sentence-transformers, recorded elsewhere, for the recorded token ids."""
    goldens = json.loads((shared / "goldens" / "all_minilm_l6_v2.json").read_text())
    vectors = embeddings(minilm, minilm_dir, [golden["input_ids"] for golden in goldens])
    expected = torch.tensor([golden["embedding"] for golden in goldens])
    cosines = torch.cosine_similarity(vectors, expected)
    assert cosines.min() >= MIN_COSINE, cosines
    assert (vectors - torch.nn.functional.normalize(expected, dim=-1)).abs().max() < 1e-4


@torch.no_grad()
def test_transformers_with_mean_pooling(minilm: Model, minilm_dir: Path) -> None:
    """Cosine to transformers' hidden states under a padded batch with a mask, mean-pooled and normalised."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    reference = BertModel.from_pretrained(minilm_dir, dtype=torch.float32).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None].float()
    hidden = reference(**batch).last_hidden_state
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    vectors = embeddings(minilm, minilm_dir, [tokenizer(text)["input_ids"] for text in TEXTS])
    assert torch.cosine_similarity(vectors, expected).min() >= MIN_COSINE
    assert (vectors - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("activations", "mean", "least"), [("off", 0.9993, 0.999), ("auto", 0.999, 0.998)])
def test_eight_bits(
    minilm: Model,
    minilm_dir: Path,
    tmp_path: Path,
    activations: ActivationQuantization,
    mean: float,
    least: float,
) -> None:
    """Cosine of the vectors with linear layers of 8 bits to those of the weights as they are, with products of floats
    and with activations rounded to int8."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    inputs = [tokenizer(text)["input_ids"] for text in TEXTS]
    state = str(tmp_path / "state")
    engine = Engine(EngineConfig(device="cpu", num_threads=1, state_dir=state, activation_quantization=activations))
    engine.load_model("wide", minilm_dir)
    output = str(tmp_path / "narrow")
    run_job(engine, QuantizeSpec(job_id="q", model="wide", scheme="q8", output_dir=output, output_name="narrow"))
    last = run_job(engine, EmbedSpec(job_id="e", model="narrow", inputs=inputs, pooling="mean", normalize=True))[-1]
    assert isinstance(last, EmbedFinished)
    vectors = torch.frombuffer(bytearray(last.vectors), dtype=torch.float32).view(len(inputs), -1)
    cosines = torch.cosine_similarity(vectors, embeddings(minilm, minilm_dir, inputs))
    assert cosines.mean() >= mean, cosines
    assert cosines.min() >= least, cosines
