"""Generation on the engine in this process: first token, prefill, and decoding of one stream and of several."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.machine import Limits, Work
from tests.bench.models import GENERATOR, GENERATOR_FLOAT, GENERATOR_HALF, GENERATOR_Q8, HYBRID, HYBRID_Q8, file_type
from tests.bench.peers import OPENVINO, llama_cpp
from tests.bench.setup import OURS, Bench
from tests.bench.work import random_tokens, request, seconds

_numbers = itertools.count()

Sides = dict[str, Callable[[], float]]


# ------------------------------------------------------------------------------------------------------------- peers


def llama_files(bench: Bench, name: str) -> dict[str, Path]:
    """GGUF files that llama.cpp is measured on, by their label: the same file; of float32 weights, the same
    numbers as F32."""
    if bench.models.gguf() is None or name in (HYBRID, HYBRID_Q8) or bench.quick:
        return {}
    path = bench.models.path(name)
    if name == GENERATOR_FLOAT and (wide := bench.models.gguf("F32")) is not None:
        path = wide
    return {file_type(path): path}


def llama_bench(bench: Bench, files: dict[str, Path], *, prompt: int = 0, new: int = 0, depth: int = 0) -> Sides:
    """llama-bench over some files."""
    binary = bench.peers.binary("llama-bench") if files else None
    if binary is None:
        return {}
    bench.know_version("llama.cpp", llama_cpp.version(binary))
    return {
        f"llama.cpp {label}": lambda path=path: llama_cpp.bench_rate(  # type: ignore[misc]
            binary, path, bench.threads, prompt=prompt, new=new, depth=depth
        )
        for label, path in files.items()
    }


def openvino(bench: Bench, name: str, prompts: Callable[[], list[list[int]]], new_tokens: int, key: str) -> Sides:
    """OpenVINO GenAI over the same GGUF file.

    Args:
        new_tokens: 1 asks for the first token alone.
        key: "seconds" of the whole, or "decode_seconds" from the first token to the last.
    """
    if not llama_files(bench, name) or name in (GENERATOR_HALF, GENERATOR_FLOAT):
        return {}
    python = bench.peers.python(OPENVINO)
    if python is None:
        return {}
    script = Path(__file__).parent / "peers" / "openvino_process.py"
    command = [str(python), str(script), str(bench.models.path(name)), str(bench.threads)]

    def measure() -> float:
        process = bench.process(f"openvino {name}", command)
        bench.know_version("openvino-genai", process.ready["version"])
        do = "first" if new_tokens == 1 else "generate"
        return float(process.ask(do=do, prompts=prompts(), new_tokens=new_tokens)[key])

    return {"openvino-genai": measure}


def _has_reference(bench: Bench) -> bool:
    return bench.peers.has_module("transformers")


# ----------------------------------------------------------------------------------------------------- first token


def first_token_seconds(bench: Bench, name: str, num_tokens: int) -> float:
    """From the arrival of a prompt that no cache knows to its first token."""
    engine = bench.load(name)
    asked = request(f"first-{next(_numbers)}", random_tokens(num_tokens), 1, name)

    def run() -> None:
        engine.add_request(asked)
        while engine.has_requests():
            engine.step()

    return seconds(run, bench.clock)


def _reference_first_token_seconds(bench: Bench, name: str, num_tokens: int) -> float:
    model = bench.reference(name)
    prompt = torch.tensor([random_tokens(num_tokens)])

    @torch.inference_mode()
    def run() -> None:
        int(model(prompt, logits_to_keep=1, use_cache=True).logits[0, -1].argmax())

    return seconds(run)


def _prompt_work(bench: Bench, name: str, count: int) -> Work:
    return bench.counts(name).forward(count, context=count / 2, heads=1)


def time_to_first_token(bench: Bench) -> None:
    """Seconds from arrival to the first token of a short prompt, with nothing else to do."""
    count = bench.scale.prompt_tokens
    sides: Sides = {OURS: lambda: first_token_seconds(bench, GENERATOR, count)}
    if _has_reference(bench):
        sides["transformers"] = lambda: _reference_first_token_seconds(bench, GENERATOR, count)
    work = _prompt_work(bench, GENERATOR, count)
    bench.compared("time_to_first_token", "seconds", GENERATOR, sides, floor=work.seconds, prompt_tokens=count)


def _prefill(bench: Bench, measure: str, name: str, reference: str | None = None) -> None:
    count = bench.scale.prefill_tokens
    sides: Sides = {OURS: lambda: count / first_token_seconds(bench, name, count)}
    if _has_reference(bench):
        sides["transformers"] = lambda: count / _reference_first_token_seconds(bench, reference or name, count)
    files = llama_files(bench, name)
    if files and (wide := bench.models.gguf("F16")) is not None:
        files |= {"F16": wide}  # its fastest
    sides |= llama_bench(bench, files, prompt=count)
    for peer, whole in openvino(bench, name, lambda: [random_tokens(count)], 1, "seconds").items():
        sides[peer] = lambda whole=whole: count / whole()  # type: ignore[misc]
    work = _prompt_work(bench, name, count)
    bench.compared(
        measure,
        "tokens/s",
        name,
        sides,
        floor=lambda limits: count / work.seconds(limits),
        floor_int8=lambda limits: count / work.seconds(limits, int8=True),
        prompt_tokens=count,
    )


def prefill(bench: Bench) -> None:
    """Prompt tokens per second of a long prompt."""
    _prefill(bench, "prefill", GENERATOR)


def prefill_q8(bench: Bench) -> None:
    """The same of 8-bit weights."""
    _prefill(bench, "prefill_q8", GENERATOR_Q8, reference=GENERATOR)


def hybrid_prefill(bench: Bench) -> None:
    """The same of the hybrid, at the published shape of Qwen3.5-0.8B with random weights."""
    _prefill(bench, "hybrid_prefill", HYBRID)


def hybrid_prefill_q8(bench: Bench) -> None:
    """The same of the hybrid with 8-bit weights, against transformers in float32."""
    _prefill(bench, "hybrid_prefill_q8", HYBRID_Q8, reference=HYBRID)


# ---------------------------------------------------------------------------------------------------------- decoding


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
    began = bench.clock()
    while engine.has_requests():
        tokens += sum(len(output.token_ids) for output in engine.step())
    return tokens / (bench.clock() - began)


@torch.inference_mode()
def _reference_seconds(bench: Bench, name: str, streams: int, prompt_tokens: int, steps: int) -> tuple[float, float]:
    """Seconds of the prompts, and of so many steps after them."""
    model = bench.reference(name)
    prompts = torch.tensor([random_tokens(prompt_tokens) for _ in range(streams)])
    began = time.perf_counter()
    output = model(prompts, logits_to_keep=1, use_cache=True)
    tokens = output.logits[:, -1].argmax(-1, keepdim=True)
    prefilled = time.perf_counter()
    for _ in range(steps):
        output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
        tokens = output.logits[:, -1].argmax(-1, keepdim=True)
    return prefilled - began, time.perf_counter() - prefilled


def _decode(bench: Bench, measure: str, name: str, streams: int, reference: str | None = None) -> None:
    """Args: reference: the model of whose weights transformers takes; None: transformers has no turn."""
    scale = bench.scale
    steps = scale.new_tokens - 1
    sides: Sides = {OURS: lambda: decode_rate(bench, name, streams)}
    if reference is not None and _has_reference(bench):
        sides["transformers"] = lambda: (
            streams * steps / _reference_seconds(bench, reference, streams, scale.prompt_tokens, steps)[1]
        )
    if streams == 1:
        sides |= llama_bench(bench, llama_files(bench, name), new=steps, depth=scale.prompt_tokens)
        theirs = openvino(bench, name, lambda: [random_tokens(scale.prompt_tokens)], scale.new_tokens, "decode_seconds")
        for peer, whole in theirs.items():
            sides[peer] = lambda whole=whole: steps / whole()  # type: ignore[misc]
    work = bench.counts(name).decode(streams, scale.prompt_tokens + steps / 2)
    more = {"streams": streams, "prompt_tokens": scale.prompt_tokens, "new_tokens": scale.new_tokens}
    bench.compared(measure, "tokens/s", name, sides, floor=lambda limits: streams / work.seconds(limits), **more)


def decode_1(bench: Bench) -> None:
    """Tokens per second of one stream; weights as the file has them (4 bits)."""
    _decode(bench, "decode_1", GENERATOR, 1, GENERATOR)


def decode_1_q8(bench: Bench) -> None:
    """Tokens per second of one stream with 8-bit weights."""
    _decode(bench, "decode_1_q8", GENERATOR_Q8, 1)


def decode_1_float(bench: Bench) -> None:
    """Tokens per second of one stream with float16 weights."""
    _decode(bench, "decode_1_float", GENERATOR_HALF, 1, GENERATOR)


def decode_1_float32(bench: Bench) -> None:
    """Tokens per second of one stream with float32 weights."""
    _decode(bench, "decode_1_float32", GENERATOR_FLOAT, 1, GENERATOR)


def decode_8(bench: Bench) -> None:
    """Tokens per second of eight streams together."""
    _decode(bench, "decode_8", GENERATOR, 8, GENERATOR)


def hybrid_decode_1(bench: Bench) -> None:
    """Tokens per second of one stream of the hybrid."""
    _decode(bench, "hybrid_decode_1", HYBRID, 1, HYBRID)


def hybrid_decode_1_q8(bench: Bench) -> None:
    """Tokens per second of one stream of the hybrid with 8-bit weights, against transformers in float32."""
    _decode(bench, "hybrid_decode_1_q8", HYBRID_Q8, 1, HYBRID)


def hybrid_decode_8(bench: Bench) -> None:
    """Tokens per second of eight streams of the hybrid together."""
    _decode(bench, "hybrid_decode_8", HYBRID, 8, HYBRID)


# ---------------------------------------------------------------------------------------------------- several streams


def streams_8(bench: Bench) -> None:
    """New tokens per second of eight requests that arrive together, their prompts' time included."""
    scale = bench.scale
    streams, new_tokens = scale.streams, scale.new_tokens
    total = streams * new_tokens

    def prompts() -> list[list[int]]:
        return [random_tokens(scale.stream_prompt_tokens) for _ in range(streams)]

    engine = bench.load(GENERATOR)

    def ours() -> float:
        asked = [request(f"streams-{next(_numbers)}", prompt, new_tokens, GENERATOR) for prompt in prompts()]

        def run() -> None:
            for each in asked:
                engine.add_request(each)
            while engine.has_requests():
                engine.step()

        return total / seconds(run)

    sides: Sides = {OURS: ours}
    if _has_reference(bench):
        sides["transformers"] = lambda: (
            total / sum(_reference_seconds(bench, GENERATOR, streams, scale.stream_prompt_tokens, new_tokens - 1))
        )
    for label, path in (llama_files(bench, GENERATOR) | llama_files(bench, GENERATOR_Q8)).items():
        binary = bench.peers.binary("llama-server")
        if binary is None:
            break
        bench.know_version("llama-server", llama_cpp.version(binary))
        context = scale.stream_prompt_tokens + new_tokens + 32
        server = bench.stack.enter_context(
            llama_cpp.llama_server(binary, path, bench.threads, streams=streams, context=context)
        )
        sides[f"llama-server {label}"] = lambda server=server: (  # type: ignore[misc]
            total / server.complete_all(prompts(), new_tokens)
        )
    for peer, whole in openvino(bench, GENERATOR, prompts, new_tokens, "seconds").items():
        sides[peer] = lambda whole=whole: total / whole()  # type: ignore[misc]
    counts = bench.counts(GENERATOR)
    prompt_tokens = scale.stream_prompt_tokens
    prefill_work = counts.forward(streams * prompt_tokens, context=prompt_tokens / 2, heads=streams)
    decode_work = counts.decode(streams, prompt_tokens + new_tokens / 2)

    def floor(limits: Limits) -> float:
        return total / (prefill_work.seconds(limits) + (new_tokens - 1) * decode_work.seconds(limits))

    more = {"streams": streams, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    bench.compared("streams_8", "tokens/s", GENERATOR, sides, floor=floor, **more)
