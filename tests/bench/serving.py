"""Generation on the engine in this process: first token, prefill, and decoding with one and with eight streams."""

from __future__ import annotations

import itertools
import time

import torch

from tests.bench.setup import GENERATOR, HYBRID, Bench, random_tokens, request, seconds

_numbers = itertools.count()


def _first_token_seconds(bench: Bench, name: str, num_tokens: int) -> float:
    """From the arrival of a prompt that no cache knows to its first token."""
    engine = bench.load(name)
    asked = request(f"first-{next(_numbers)}", random_tokens(num_tokens), 1, name)

    def run() -> None:
        engine.add_request(asked)
        while engine.has_requests():
            engine.step()

    return seconds(run)


def _reference_first_token_seconds(bench: Bench, name: str, num_tokens: int) -> float:
    model = bench.reference(name)
    prompt = torch.tensor([random_tokens(num_tokens)])

    @torch.inference_mode()
    def run() -> None:
        int(model(prompt, logits_to_keep=1, use_cache=True).logits[0, -1].argmax())

    return seconds(run)


def time_to_first_token(bench: Bench) -> None:
    """Seconds from arrival to the first token of a short prompt, with nothing else to do."""
    count = bench.scale.prompt_tokens
    sides = {"whet": lambda: _first_token_seconds(bench, GENERATOR, count)}
    if bench.compare:
        sides["transformers"] = lambda: _reference_first_token_seconds(bench, GENERATOR, count)
    bench.report("time_to_first_token", "seconds", GENERATOR, bench.medians(sides), prompt_tokens=count)


def _prefill(bench: Bench, measure: str, name: str) -> None:
    count = bench.scale.prefill_tokens
    sides = {"whet": lambda: count / _first_token_seconds(bench, name, count)}
    if bench.compare:
        sides["transformers"] = lambda: count / _reference_first_token_seconds(bench, name, count)
    bench.report(measure, "tokens/s", name, bench.medians(sides), prompt_tokens=count)


def prefill(bench: Bench) -> None:
    """Prompt tokens per second of a long prompt."""
    _prefill(bench, "prefill", GENERATOR)


def hybrid_prefill(bench: Bench) -> None:
    """The same of the hybrid, at the published shape of Qwen3.5-0.8B with random weights."""
    _prefill(bench, "hybrid_prefill", HYBRID)


def decode_rate(bench: Bench, name: str, streams: int) -> float:
    """Tokens per second of all streams together, from the moment when each has its first token."""
    engine = bench.load(name)
    for _ in range(streams):
        prompt = random_tokens(bench.scale.prompt_tokens)
        engine.add_request(request(f"decode-{next(_numbers)}", prompt, bench.scale.new_tokens, name))
    begun: set[str] = set()
    while len(begun) < streams:
        begun.update(output.request_id for output in engine.step() if output.token_ids)
    tokens = 0
    began = time.perf_counter()
    while engine.has_requests():
        tokens += sum(len(output.token_ids) for output in engine.step())
    return tokens / (time.perf_counter() - began)


@torch.inference_mode()
def _reference_decode_rate(bench: Bench, name: str, streams: int) -> float:
    model = bench.reference(name)
    prompts = torch.tensor([random_tokens(bench.scale.prompt_tokens) for _ in range(streams)])
    output = model(prompts, logits_to_keep=1, use_cache=True)
    tokens = output.logits[:, -1].argmax(-1, keepdim=True)
    steps = bench.scale.new_tokens - 1
    began = time.perf_counter()
    for _ in range(steps):
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
    return streams * steps / (time.perf_counter() - began)


def _decode(bench: Bench, measure: str, name: str, streams: int) -> None:
    sides = {"whet": lambda: decode_rate(bench, name, streams)}
    if bench.compare:
        sides["transformers"] = lambda: _reference_decode_rate(bench, name, streams)
    bench.report(measure, "tokens/s", name, bench.medians(sides), streams=streams)


def decode_1(bench: Bench) -> None:
    """Tokens per second of one stream."""
    _decode(bench, "decode_1", GENERATOR, 1)


def decode_8(bench: Bench) -> None:
    """Tokens per second of eight streams together."""
    _decode(bench, "decode_8", GENERATOR, 8)


def hybrid_decode_1(bench: Bench) -> None:
    """Tokens per second of one stream of the hybrid."""
    _decode(bench, "hybrid_decode_1", HYBRID, 1)


def hybrid_decode_8(bench: Bench) -> None:
    """Tokens per second of eight streams of the hybrid together."""
    _decode(bench, "hybrid_decode_8", HYBRID, 8)
