"""A LoRA run in a process of its own, so that its peak of memory is its own: ``python -m tests.bench.peers.lora_process
whet|transformers MODEL WORK_DIR TARGET,… RANK BATCH TOKENS STEPS THREADS``.

Each question runs STEPS optimizer steps and is answered with tokens per second, the first step left out, as it pays for
what later ones find ready, and with the peak of resident memory since the model was loaded.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the server's workers have it

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.jobs import LoRAParams, TokenizedExample, TrainParams, TrainSpec, TrainStep
from engine.training.dataset import write_dataset
from tests.bench.peers.answering import peak_bytes, reset_peak, serve
from tests.bench.work import random_tokens, run_job


def batches(batch: int, tokens: int, steps: int) -> list[list[list[int]]]:
    """Random ids, the same for both sides: [steps][batch][tokens]."""
    return [[random_tokens(tokens, step * batch + row) for row in range(batch)] for step in range(steps)]


def whet_run(
    model: Path, work_dir: Path, targets: list[str], rank: int, batch: int, tokens: int, steps: int, threads: int
) -> Callable[[], list[float]]:
    """The engine's training job; every call is a run of its own."""
    config = EngineConfig(
        device="cpu", num_threads=threads, state_dir=str(work_dir / "lora-state"), kv_cache_bytes=64 << 20
    )
    engine = Engine(config)
    engine.load_model("model", model)
    mask = [False] + [True] * (tokens - 1)
    rows = [row for step in batches(batch, tokens, steps) for row in step]
    numbers = iter(range(1 << 30))

    def run() -> list[float]:
        run_dir = work_dir / f"lora-{os.getpid()}-{next(numbers)}"
        write_dataset(
            run_dir / "dataset.safetensors", [TokenizedExample(token_ids=row, loss_mask=mask) for row in rows]
        )
        spec = TrainSpec(
            job_id=run_dir.name,
            model="model",
            adapter="bench",
            lora=LoRAParams(rank=rank, alpha=16.0, target_modules=targets),
            params=TrainParams(batch_size=batch, max_steps=steps, max_seq_len=tokens, shuffle=False),
            dataset_path=str(run_dir / "dataset.safetensors"),
            run_dir=str(run_dir),
        )
        events = [event for event in run_job(engine, spec) if isinstance(event, TrainStep) and event.step > 0]
        return [event.num_tokens / event.step_seconds for event in events if event.step_seconds]

    return run


def transformers_run(
    model: Path, work_dir: Path, targets: list[str], rank: int, batch: int, tokens: int, steps: int, threads: int
) -> Callable[[], list[float]]:
    """The same run by peft and transformers: the same rank, targets, optimizer and shapes."""
    from peft import LoraConfig, get_peft_model

    from tests.bench.models import load_reference

    torch.set_num_threads(threads)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = get_peft_model(load_reference(model), config).train()
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def run() -> list[float]:
        rates = []
        for rows in batches(batch, tokens, steps):
            ids = torch.tensor(rows)
            began = time.perf_counter()
            wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.append(ids.numel() / (time.perf_counter() - began))
        return rates

    return run


def main() -> None:
    side, model, work_dir, targets, *numbers = sys.argv[1:]
    rank, batch, tokens, steps, threads = map(int, numbers)
    make = whet_run if side == "whet" else transformers_run
    run = make(Path(model), Path(work_dir), targets.split(","), rank, batch, tokens, steps, threads)
    reset_peak()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        return {"rate": statistics.median(run()[1:]), "peak_bytes": peak_bytes()}

    packages = ("whet-server",) if side == "whet" else ("transformers", "peft")
    serve({package: version(package) for package in packages}, answer)


if __name__ == "__main__":
    main()
