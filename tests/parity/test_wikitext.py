"""Perplexity against transformers' loop over the same windows: a tiny random Llama, and SmolLM2 on WikiText-2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.jobs import JobEvent, PerplexityFinished, PerplexitySpec
from tests.parity.loading import randomize, token_ids


@torch.no_grad()
def documented_loop(model: Any, ids: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """Mean NLL and scored tokens by the strided loop of transformers' documentation, one window a forward."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = ids[begin:end].clone()
        labels[: len(labels) - (end - previous_end)] = -100
        logits = model(input_ids=ids[None, begin:end], use_cache=False).logits[0].float()
        nll = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        total += nll.double().item()
        count += int((labels[1:] != -100).sum())
        previous_end = end
        if end == len(ids):
            break
    return total / count, count


def run(engine: Engine, spec: PerplexitySpec) -> PerplexityFinished:
    engine.start_job(spec)
    events: list[JobEvent] = []
    while engine.has_jobs():
        events += engine.advance_jobs()
    assert isinstance(events[-1], PerplexityFinished), events[-1]
    return events[-1]


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 1), (32, 31), (50, 7), (64, 33)])
def test_tiny_llama(tmp_path: Path, window: int, stride: int) -> None:
    """Mean NLL within 1e-5, the same number of scored tokens."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    reference = randomize(LlamaForCausalLM(config), 1)
    reference.save_pretrained(tmp_path)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", num_threads=2, kv_cache_bytes=1 << 20))
    engine.load_model("tiny", tmp_path)
    (ids,) = token_ids([131], 97)
    spec = PerplexitySpec(job_id="p", model="tiny", token_ids=ids.tolist(), window=window, stride=stride)
    finished = run(engine, spec)
    expected, count = documented_loop(reference, ids, window, stride)
    assert finished.num_tokens == count == 130
    assert finished.nll == pytest.approx(expected, abs=1e-5)
    assert finished.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def check_wikitext(
    shared: Path, gguf: Path, reference: tuple[Any, Any], *, num_tokens: int, window: int, stride: int
) -> None:
    model, tokenizer = reference
    text = (shared / "data" / "wikitext2-raw.test.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text[: 8 * num_tokens])["input_ids"][:num_tokens])
    assert len(ids) == num_tokens
    engine = Engine(EngineConfig(device="cpu", dtype="float32", num_threads=2, kv_cache_bytes=128 << 20))
    engine.load_model("smollm2", gguf)
    spec = PerplexitySpec(job_id="p", model="smollm2", token_ids=ids.tolist(), window=window, stride=stride)
    finished = run(engine, spec)
    expected, count = documented_loop(model, ids, window, stride)
    assert finished.num_tokens == count == num_tokens - 1
    assert finished.perplexity == pytest.approx(math.exp(expected), abs=0.02)
    assert 10 < finished.perplexity < 60, "a model that does not know English would prove little"


def test_smollm2_two_windows(shared: Path, smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    """WikiText-2 test, first 384 tokens, window 256, stride 128: perplexity within 0.02."""
    check_wikitext(shared, smollm2_gguf, smollm2_reference, num_tokens=384, window=256, stride=128)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2(shared: Path, smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    """The same over the first 4,096 tokens, in 15 windows of 512."""
    check_wikitext(shared, smollm2_gguf, smollm2_reference, num_tokens=4096, window=512, stride=256)
