"""SmolLM2-135M-Instruct from GGUF, against transformers' own load of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "My favourite recipe for bread begins with",
    "The quick brown fox",
    "In 1969, the first people",
    "Question: What is photosynthesis?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to",
    "一二三四五",
]
NEW_TOKENS = 64


def test_greedy_tokens_and_logits(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    """Ten prompts decoded together give, token by token, the argmax of transformers on what came before; and the
    log-probabilities of prompt and completion agree within 1e-3."""
    model, tokenizer = smollm2_reference
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=256 << 20))
    engine.load_model("smollm2", smollm2_gguf)
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    for number, prompt in enumerate(ids):
        engine.add_request(Request(request_id=str(number), model="smollm2", prompt_token_ids=prompt, sampling=sampling))
    tokens: list[list[int]] = [[] for _ in ids]
    logprobs: list[list[float]] = [[] for _ in ids]
    while engine.has_requests():
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
            logprobs[int(output.request_id)] += [entry.logprob for entry in output.logprobs or []]
    for prompt, completion, scores in zip(ids, tokens, logprobs, strict=True):
        assert len(completion) == NEW_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == completion
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-3, rtol=0)


def test_logits_of_the_serving_path(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    """Every logit at every position, through the block cache in chunks, is within 1e-3 of transformers'."""
    from engine.core.chunked import serving_logits

    model, tokenizer = smollm2_reference
    engine = Engine(EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=64 << 20, max_batch_tokens=48))
    engine.load_model("smollm2", smollm2_gguf)
    ids = [tokenizer(text * 5)["input_ids"] for text in PROMPTS[:3]]
    ours = serving_logits(engine._models["smollm2"], ids)
    for sequence, logits in zip(ids, ours, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([sequence])).logits[0]
        assert (logits - expected).abs().max().item() < 1e-3
