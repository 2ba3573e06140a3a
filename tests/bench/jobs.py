"""Training, embedding and scoring."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.engine import Engine
from engine.jobs import EmbedFinished, EmbedSpec, PerplexitySpec
from tests.bench.models import EMBEDDER, EMBEDDER_Q8, GENERATOR, HYBRID, HYBRID_Q8
from tests.bench.peers import EMBEDDERS, llama_cpp
from tests.bench.peers.process import PeerProcess
from tests.bench.serving import Sides, llama_files
from tests.bench.setup import OURS, Bench
from tests.bench.work import random_tokens, run_job, seconds

_numbers = itertools.count()
ATTENTION_TARGETS = ["q_proj", "v_proj"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DELTA_NET_TARGETS = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
RANK = 8
PEFT = "transformers + peft"


def _train(
    bench: Bench, measure: str, name: str, targets: list[str], batch: int, tokens: int, reference: str | None = None
) -> None:
    """Speed and peak memory, each side in a process of its own; a peer has the model ``reference``, or the same."""
    scale = bench.scale

    def side(which: str) -> Callable[[], dict[str, Any]]:
        path = bench.models.path(name) if which == OURS else bench.models.reference_path(reference or name)
        command = [sys.executable, "-m", "tests.bench.peers.lora_process", which, str(path), str(bench.work_dir)]
        numbers = (RANK, batch, tokens, scale.train_steps, bench.threads)
        command += [",".join(targets), *map(str, numbers)]
        return lambda: bench.process(f"lora {which}", command).ask()

    sides = {OURS: side(OURS)}
    if bench.peers.has_module("transformers", "peft"):
        sides[PEFT] = side("transformers")
    taken = bench.samples(sides, rounds=scale.train_rounds, warm_up=0)
    work = bench.counts(name).lora_step(batch * tokens, context=tokens / 2)
    more = {"batch": batch, "seq_len": tokens, "rank": RANK, "targets": targets}
    rates = {which: [answer["rate"] for answer in answers] for which, answers in taken.items()}
    bench.report(measure, "tokens/s", name, rates, floor=lambda limits: batch * tokens / work.seconds(limits), **more)
    peaks = {which: [float(answer["peak_bytes"]) for answer in answers] for which, answers in taken.items()}
    bench.report(f"{measure}_memory", "bytes", name, peaks, **more)


def train(bench: Bench) -> None:
    """Tokens per second, and peak memory, of a LoRA run on all linear layers."""
    _train(bench, "train", GENERATOR, TARGETS, bench.scale.train_batch, bench.scale.train_tokens)


def train_qv(bench: Bench) -> None:
    """The same on q_proj and v_proj."""
    _train(bench, "train_qv", GENERATOR, ATTENTION_TARGETS, bench.scale.train_batch, bench.scale.train_tokens)


def hybrid_train_qv(bench: Bench) -> None:
    """The same on q_proj and v_proj of the hybrid, one example a step."""
    _train(bench, "hybrid_train_qv", HYBRID, ATTENTION_TARGETS, 1, bench.scale.hybrid_train_tokens)


def hybrid_train_qv_q8(bench: Bench) -> None:
    """The same over the hybrid in 8 bits, by integer products forward and float ones back; the peer's is float32."""
    tokens = bench.scale.hybrid_train_tokens
    _train(bench, "hybrid_train_qv_q8", HYBRID_Q8, ATTENTION_TARGETS, 1, tokens, reference=HYBRID)


def hybrid_train_all(bench: Bench) -> None:
    """The same on all linear layers of the hybrid, one example a step."""
    targets = TARGETS + DELTA_NET_TARGETS
    _train(bench, "hybrid_train_all", HYBRID, targets, 1, bench.scale.hybrid_train_tokens)


def embed(bench: Bench) -> None:
    """Short texts of different lengths per second, mean-pooled, as token ids, in batches."""
    _embed(bench, "embed", EMBEDDER)


def embed_q8(bench: Bench) -> None:
    """The same with the linear layers in our own 8-bit format, and activations rounded to int8; the peers' are of
    float32. A line has the least cosine of a vector of theirs and ours."""
    _embed(bench, "embed_q8", EMBEDDER_Q8)


def _embed(bench: Bench, measure: str, name: str) -> None:
    scale = bench.scale
    engine = bench.load(name)
    spread = scale.embed_tokens // 4
    lengths = [scale.embed_tokens - spread + number % (2 * spread + 1) for number in range(scale.embed_texts)]

    def inputs() -> list[list[int]]:
        return [random_tokens(length) for length in lengths]

    def ours() -> float:
        texts = inputs()

        def run() -> None:
            for start in range(0, len(texts), scale.embed_batch):
                batch = texts[start : start + scale.embed_batch]
                run_job(
                    engine,
                    EmbedSpec(job_id=f"embed-{next(_numbers)}", model=name, inputs=batch, pooling="mean"),
                )

        return len(texts) / seconds(run)

    def transformers() -> float:
        model = bench.reference(EMBEDDER)
        texts = inputs()

        @torch.inference_mode()
        def run() -> None:
            for start in range(0, len(texts), scale.embed_batch):
                batch = texts[start : start + scale.embed_batch]
                width = max(map(len, batch))
                ids = torch.tensor([text + [0] * (width - len(text)) for text in batch])
                mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in batch])
                hidden = model(ids, attention_mask=mask).last_hidden_state * mask[..., None]
                pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
                torch.nn.functional.normalize(pooled, dim=-1).tolist()

        return len(texts) / seconds(run)

    sides: Sides = {OURS: ours}
    cosines: list[float] = []
    if bench.quick:
        if bench.peers.has_module("transformers"):
            sides["transformers"] = transformers
    elif (python := bench.peers.python(EMBEDDERS)) is not None:
        for peer in ("onnxruntime", "sentence-transformers"):
            script = Path(__file__).parent / "peers" / "embedding_process.py"
            command = [str(python), str(script), peer, str(bench.models.path(EMBEDDER)), str(bench.work_dir)]
            process = bench.process(peer, [*command, str(bench.threads)])
            bench.know_version(peer, process.ready["version"])
            cosines.append(_check_vectors(engine, name, process, inputs()[: scale.embed_batch], peer))
            sides[peer] = lambda process=process: (  # type: ignore[misc]
                len(lengths) / process.ask(inputs=inputs(), batch_size=scale.embed_batch)["seconds"]
            )
    mean = statistics.mean(lengths)
    work = bench.counts(EMBEDDER).forward(sum(lengths), context=mean, heads=0)
    more: dict[str, Any] = {"texts": len(lengths), "batch": scale.embed_batch, "tokens_per_text": mean}
    if name == EMBEDDER_Q8:
        more["floor_int8"] = lambda limits: len(lengths) / work.seconds(limits, int8=True)
    if cosines:
        more["least_cosine"] = round(min(cosines), 5)
    bench.compared(measure, "texts/s", name, sides, floor=lambda limits: len(lengths) / work.seconds(limits), **more)


def _check_vectors(engine: Engine, name: str, process: PeerProcess, texts: list[list[int]], peer: str) -> float:
    """Both do the same work: their vectors agree. Returns the least cosine of two of them.

    Raises:
        SystemExit: they do not.
    """
    spec = EmbedSpec(job_id=f"embed-{next(_numbers)}", model=name, inputs=texts, pooling="mean", normalize=True)
    last = run_job(engine, spec)[-1]
    assert isinstance(last, EmbedFinished)
    theirs = process.ask(inputs=texts, batch_size=len(texts), vectors=True)["vectors"]
    ours = torch.frombuffer(bytearray(last.vectors), dtype=torch.float32).view(len(texts), -1)
    cosine = torch.nn.functional.cosine_similarity(ours, torch.tensor(theirs)).min().item()
    if cosine < 0.99:
        raise SystemExit(f"{peer} computes something else: the cosine of its vectors and ours is {cosine:.4f}")
    return cosine


def perplexity(bench: Bench) -> None:
    """Scored tokens per second, with windows that overlap by half."""
    scale = bench.scale
    engine = bench.load(GENERATOR)
    window, stride = scale.perplexity_window, scale.perplexity_window // 2
    token_ids = random_tokens(scale.perplexity_tokens, seed=0)
    num_scored = len(token_ids) - 1

    def ours() -> float:
        spec = PerplexitySpec(
            job_id=f"perplexity-{next(_numbers)}", model=GENERATOR, token_ids=token_ids, window=window, stride=stride
        )
        return num_scored / seconds(lambda: run_job(engine, spec))

    @torch.inference_mode()
    def run_reference() -> None:
        model = bench.reference(GENERATOR)
        scored = 1
        for start in range(0, len(token_ids), stride):
            ids = torch.tensor([token_ids[start : start + window]])
            end = start + ids.shape[1]
            new = end - scored
            logits = model(ids, use_cache=False, logits_to_keep=new + 1).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), ids[0, -new:], reduction="sum").item()
            scored = end
            if end == len(token_ids):
                break

    sides: Sides = {OURS: ours}
    if bench.peers.has_module("transformers"):
        sides["transformers"] = lambda: num_scored / seconds(run_reference)
    sides |= _llama_perplexity(bench, window, scale.perplexity_tokens)
    # Each window but the first scores its latter half.
    share = bench.counts(GENERATOR).forward(window, context=window / 2, heads=stride)
    bench.compared(
        "perplexity",
        "tokens/s",
        GENERATOR,
        sides,
        floor=lambda limits: stride / share.seconds(limits),
        floor_int8=lambda limits: stride / share.seconds(limits, int8=True),
        window=window,
        stride=stride,
    )


def _llama_perplexity(bench: Bench, window: int, tokens: int) -> Sides:
    """llama-perplexity: windows side by side, of each the latter half scored, which is the same work for a token."""
    files = llama_files(bench, GENERATOR)
    binary = bench.peers.binary("llama-perplexity") if files else None
    if binary is None:
        return {}
    bench.know_version("llama.cpp", llama_cpp.version(binary))
    wide = bench.models.gguf("F16")
    assert wide is not None
    chunks = max(2, tokens // window)
    text = bench.work_dir / "perplexity.txt"
    text.write_text(" ".join(map(str, range(chunks * window))), encoding="utf-8")  # a token each, or more
    return {
        f"llama.cpp {label}": lambda path=path: (  # type: ignore[misc]
            chunks
            * (window // 2)
            / llama_cpp.perplexity_seconds(binary, path, bench.threads, text, context=window, chunks=chunks)
        )
        for label, path in (files | {"F16": wide}).items()
    }
