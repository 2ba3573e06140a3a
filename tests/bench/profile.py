"""``python -m tests.bench.profile [PIECE …]``: where each microsecond of a piece of work goes, beside its floor.

    decode     one step of one stream, weights as the file has them      decode_q8, decode_float   the same of others
    prefill    one chunk of a prompt                                     prefill_q8
    train      one optimizer step of LoRA on q_proj and v_proj           train_all   on all linear layers
    hybrid_decode, hybrid_prefill, hybrid_train                          of the hybrid, 8-bit weights for the first two

Prints a table in Markdown for each. The whole is timed without a profiler, the fastest of some rounds; see
tests.bench.attribution for the rest.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the server's workers have it

import torch

from engine.engine import Engine
from engine.jobs import LoRAParams, TokenizedExample, TrainParams, TrainSpec, TrainStep
from engine.training.dataset import write_dataset
from tests.bench.attribution import GROUPS, Attribution, attribute
from tests.bench.jobs import ATTENTION_TARGETS, DELTA_NET_TARGETS, RANK, TARGETS
from tests.bench.machine import machine_name
from tests.bench.models import GENERATOR, GENERATOR_HALF, GENERATOR_Q8, HYBRID, HYBRID_Q8
from tests.bench.serving import first_token_seconds
from tests.bench.setup import Bench
from tests.bench.work import random_tokens, request

_numbers = itertools.count()
STEPS, ROUNDS, TRAIN_ROUNDS = 10, 5, 3


def profile_decode(bench: Bench, name: str) -> tuple[str, Attribution, float]:
    """One decode step of one stream."""
    engine, scale = bench.load(name), bench.scale
    steps = 3 if bench.quick else STEPS
    new_tokens = 2 * ROUNDS * steps + 8
    engine.add_request(request(f"profile-{next(_numbers)}", random_tokens(scale.prompt_tokens), new_tokens, name))

    def run(count: int) -> None:
        for _ in range(count):
            engine.step()

    run(4)
    found = attribute(lambda: run(steps), repeats=steps, rounds=ROUNDS)
    bench.observe_limits()
    while engine.has_requests():
        engine.step()
    floor = bench.counts(name).decode(1, scale.prompt_tokens + new_tokens / 2).seconds(bench.limits)
    return f"One decode step, {bench.models.label(name)}", found, floor


def profile_prefill(bench: Bench, name: str) -> tuple[str, Attribution, float]:
    """One chunk of a prompt, from its arrival to its first token."""
    count = bench.scale.prefill_tokens
    first_token_seconds(bench, name, count)
    found = attribute(lambda: first_token_seconds(bench, name, count), rounds=ROUNDS)
    bench.observe_limits()
    floor = bench.counts(name).forward(count, context=count / 2, heads=1).seconds(bench.limits)
    return f"A prompt of {count} tokens, {bench.models.label(name)}", found, floor


def profile_train(
    bench: Bench, name: str, targets: list[str], batch: int, tokens: int
) -> tuple[str, Attribution, float]:
    """One optimizer step."""
    engine = bench.load(name)
    steps = _optimizer_steps(bench, engine, name, targets, batch, tokens, 2 * TRAIN_ROUNDS + 1)
    next(steps)  # pays for what later ones find ready
    found = attribute(lambda: next(steps), rounds=TRAIN_ROUNDS)
    bench.observe_limits()
    for _ in steps:
        pass
    floor = bench.counts(name).lora_step(batch * tokens, context=tokens / 2).seconds(bench.limits)
    what = "q and v" if targets == ATTENTION_TARGETS else "all linear layers"
    return f"One LoRA step of {batch} x {tokens} on {what}, {bench.models.label(name)}", found, floor


def _optimizer_steps(
    bench: Bench, engine: Engine, name: str, targets: list[str], batch: int, tokens: int, count: int
) -> Iterator[None]:
    """Yields after each optimizer step of a run."""
    run_dir = bench.work_dir / f"profile-{os.getpid()}-{next(_numbers)}"
    mask = [False] + [True] * (tokens - 1)
    rows = [TokenizedExample(token_ids=random_tokens(tokens, row), loss_mask=mask) for row in range(batch * count)]
    write_dataset(run_dir / "dataset.safetensors", rows)
    engine.start_job(
        TrainSpec(
            job_id=run_dir.name,
            model=name,
            adapter="profile",
            lora=LoRAParams(rank=RANK, alpha=16.0, target_modules=targets),
            params=TrainParams(batch_size=batch, max_steps=count, max_seq_len=tokens, shuffle=False),
            dataset_path=str(run_dir / "dataset.safetensors"),
            run_dir=str(run_dir),
        )
    )
    while engine.has_jobs():
        for event in engine.advance_jobs():
            if isinstance(event, TrainStep) and event.step > 0:
                yield


PIECES: dict[str, Callable[[Bench], tuple[str, Attribution, float]]] = {
    "decode": lambda bench: profile_decode(bench, GENERATOR),
    "decode_q8": lambda bench: profile_decode(bench, GENERATOR_Q8),
    "decode_float": lambda bench: profile_decode(bench, GENERATOR_HALF),
    "prefill": lambda bench: profile_prefill(bench, GENERATOR),
    "prefill_q8": lambda bench: profile_prefill(bench, GENERATOR_Q8),
    "train": lambda bench: profile_train(
        bench, GENERATOR, ATTENTION_TARGETS, bench.scale.train_batch, bench.scale.train_tokens
    ),
    "train_all": lambda bench: profile_train(
        bench, GENERATOR, TARGETS, bench.scale.train_batch, bench.scale.train_tokens
    ),
    "hybrid_decode": lambda bench: profile_decode(bench, HYBRID_Q8),
    "hybrid_prefill": lambda bench: profile_prefill(bench, HYBRID_Q8),
    "hybrid_train": lambda bench: profile_train(
        bench, HYBRID, TARGETS + DELTA_NET_TARGETS, 1, bench.scale.hybrid_train_tokens
    ),
}


def table(title: str, found: Attribution, floor: float, top: int) -> str:
    """Markdown: a row for each group that took time, then the whole, then the floor."""
    lines = [f"{title}:", "", "| where | microseconds | share | calls |", "| --- | ---: | ---: | ---: |"]
    for group in GROUPS:
        if taken := found.groups[group]:
            calls = found.calls[group] or ""
            lines.append(f"| {group} | {taken * 1e6:,.0f} | {taken / found.seconds:.0%} | {calls} |")
    lines.append(f"| **whole** | {found.seconds * 1e6:,.0f} | 100% | |")
    lines.append(f"| floor | {floor * 1e6:,.0f} | {floor / found.seconds:.0%} | |")
    if top:
        lines += ["", "| operation | microseconds |", "| --- | ---: |"]
        lines += [f"| `{name}` | {taken * 1e6:,.0f} |" for name, taken in found.top[:top]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Profiles the pieces that are named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("piece", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny random models: shows that it works")
    parser.add_argument("--model", type=Path, help="generating model; default: SmolLM2-135M of the demo packages")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--hybrid-layers", type=int, default=24, help="of the hybrid, a multiple of 4; default: all 24")
    parser.add_argument("--work-dir", type=Path, help="keeps the models that are made, for the next run")
    parser.add_argument("--top", type=int, default=0, help="single operations to list below each table; default: none")
    options = parser.parse_args(arguments)
    for name in options.piece:
        if name not in PIECES:
            parser.error(f"PIECE is {name!r}; accepted: {', '.join(PIECES)}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="whet-profile-") as directory:
        work_dir = (options.work_dir or Path(directory)).resolve()
        work_dir.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            work_dir,
            quick=options.quick,
            threads=options.threads,
            model=options.model,
            compare=False,
            hybrid_layers=options.hybrid_layers,
            job_slice_seconds=1e-4,  # one slice at a time, so that none of the next step is booked to this one
        )
        print(f"{machine_name()}, {options.threads} threads; {bench.limits.rounded()}")
        for name in options.piece or PIECES:
            bench.observe_limits()
            print("\n" + table(*PIECES[name](bench), options.top), flush=True)
            bench.release()


if __name__ == "__main__":
    main()
