"""How fast the 0.8B hybrid's shape runs on a GPU, beside transformers and beside what the GPU can do, in one run.

python -m tests.gpu.speed [--device cuda] [--tiny]

Random weights in bfloat16. Limits are measured first: copying memory, and a product of large matrices. A floor is the
time that the work takes if it does nothing but read its bytes, or nothing but multiply, at these rates. Nothing here
fails because of a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.jobs import LoRAParams, TokenizedExample, TrainParams, TrainSpec, TrainStep
from engine.training.dataset import write_dataset
from tests.bench.hybrid_model import save_hybrid
from tests.bench.work import random_tokens, request, run_job
from tests.tiny import save_tiny_hybrid

TARGETS = ["q_proj", "v_proj"]
RANK = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of each work is done."""

    new_tokens: int = 256
    streams: int = 128
    prompt: int = 8192
    batch: int = 8
    length: int = 1024
    copy_bytes: int = 4 << 30
    matrix: int = 8192


TINY = Sizes(new_tokens=4, streams=3, prompt=40, batch=2, length=16, copy_bytes=1 << 20, matrix=128)


@dataclass(slots=True)
class Row:
    """Of the table. ratio: of ours to ``beside``."""

    work: str
    rate: float
    floor: float | None = None
    beside: str = ""
    ratio: float | None = None
    aim: str = ""


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def limits(device: torch.device, sizes: Sizes) -> tuple[float, float]:
    """Bytes per second of a copy, read and written ones together; operations per second of a bfloat16 product."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    matrix = torch.randn(sizes.matrix, sizes.matrix, dtype=torch.bfloat16, device=device)
    product = seconds(lambda: matrix @ matrix, device)
    return 2 * sizes.copy_bytes / copy, 2 * sizes.matrix**3 / product


def decode(engine: Engine, streams: int, new_tokens: int) -> float:
    """Tokens per second of all streams together while all of them decode."""
    for number in range(streams):
        engine.add_request(request(number, random_tokens(32), new_tokens, "model"))
    began, tokens = 0.0, 0
    while engine.has_requests():
        outputs = engine.step()
        if began:
            tokens += sum(len(output.token_ids) for output in outputs)
            ended = time.perf_counter()
        elif len(outputs) == streams and all(output.num_completion_tokens >= 2 for output in outputs):
            began = time.perf_counter()
    return tokens / (ended - began)


def prefill(engine: Engine, length: int) -> float:
    """Prompt tokens per second until the first token."""
    engine.add_request(request("prompt", random_tokens(length), 1, "model"))
    began = time.perf_counter()
    while engine.has_requests():
        engine.step()
    return length / (time.perf_counter() - began)


def train(engine: Engine, folder: Path, sizes: Sizes, steps: int = 6) -> float:
    """Tokens per second of LoRA steps, the first left out."""
    mask = [False] + [True] * (sizes.length - 1)
    rows = [random_tokens(sizes.length) for _ in range(steps * sizes.batch)]
    write_dataset(folder / "dataset.safetensors", [TokenizedExample(token_ids=r, loss_mask=mask) for r in rows])
    spec = TrainSpec(
        job_id="speed",
        model="model",
        adapter="speed",
        lora=LoRAParams(rank=RANK, alpha=16.0, target_modules=TARGETS),
        params=TrainParams(batch_size=sizes.batch, max_steps=steps, max_seq_len=sizes.length, shuffle=False),
        dataset_path=str(folder / "dataset.safetensors"),
        run_dir=str(folder),
    )
    events = [event for event in run_job(engine, spec) if isinstance(event, TrainStep) and event.step > 0]
    return statistics.median(e.num_tokens / e.step_seconds for e in events[1:] if e.step_seconds)


def transformers_rates(path: Path, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Its decode of one stream, and its LoRA step by peft if that is installed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    rates = {}
    count = min(sizes.new_tokens, 64)
    prompt = torch.tensor([random_tokens(32)], device=device)
    took = [
        seconds(lambda n=n: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False), device, 3)  # type: ignore[misc]
        for n in (1, count + 1)
    ]
    rates["decode"] = count / (took[1] - took[0])
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config).train()
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        ids = torch.tensor([random_tokens(sizes.length) for _ in range(sizes.batch)], device=device)

        def step() -> None:
            wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        rates["train"] = ids.numel() / seconds(step, device, 4)
    return rates


def measure(device: torch.device, path: Path, folder: Path, sizes: Sizes) -> list[Row]:
    """The rows of the table."""
    copy, products = limits(device, sizes)
    peers = transformers_rates(path, device, sizes)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    engine = Engine(
        EngineConfig(
            device=str(device),
            dtype="bfloat16",
            max_batch_tokens=max(sizes.prompt, 2 * sizes.streams),
            max_running_requests=sizes.streams,
            max_model_len=2 * sizes.prompt,
            kv_cache_bytes=(24 << 30) if device.type == "cuda" else (16 << 20),
            state_dir=str(folder / "state"),
        )
    )
    engine.load_model("model", path)
    model = engine._models["model"].model
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    layers = sum(p.numel() for p in model.parameters()) - head
    rates = {}
    for streams in (1, sizes.streams):
        decode(engine, streams, sizes.new_tokens)  # compiles, and captures graphs
        rates[streams] = statistics.median(decode(engine, streams, sizes.new_tokens) for _ in range(3))
    prefill(engine, sizes.prompt)
    prompts = statistics.median(prefill(engine, sizes.prompt) for _ in range(3))
    trained = train(engine, folder, sizes)
    one, many = rates[1], rates[sizes.streams]
    # A prompt's head is computed at one position, a training step's at all; frozen weights have no gradient.
    rows = [
        Row("decode, 1 stream", one, copy / weight_bytes, "transformers", one / peers["decode"], ">= 60% of floor"),
        Row(f"decode, {sizes.streams} streams", many, None, "1 stream", many / one, ">= 20 x one stream"),
        Row(f"prefill {sizes.prompt}", prompts, products / (2 * layers), "", None, ">= 40% of floor"),
        Row(f"LoRA {sizes.batch} x {sizes.length}", trained, products / (4 * (layers + head)), "", None, ">= 35%, 2 x"),
    ]
    if "train" in peers:
        rows[-1].beside, rows[-1].ratio = "transformers + peft", trained / peers["train"]
    print(
        f"copy {copy / 1e12:.2f} TB/s, bfloat16 products {products / 1e12:.0f} TFLOP/s, "
        f"weights {weight_bytes / 1e9:.2f} GB"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.speed", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that this runs, and no more")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="whet-speed-") as name:
        folder = Path(name)
        path = save_tiny_hybrid(folder / "model") if args.tiny else save_hybrid(folder / "model", 24)
        rows = measure(torch.device(args.device), path, folder, TINY if args.tiny else Sizes())
    print(f"\n{'work':<20} {'tokens/s':>10} {'of floor':>9}  {'beside':<20} {'ratio':>6}  aim")
    for row in rows:
        floor = "" if row.floor is None else f"{row.rate / row.floor:.0%}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        print(f"{row.work:<20} {row.rate:>10,.0f} {floor:>9}  {row.beside:<20} {ratio:>6}  {row.aim}")


if __name__ == "__main__":
    main()
