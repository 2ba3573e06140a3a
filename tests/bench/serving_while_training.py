"""``python -m tests.bench.serving_while_training``: what a LoRA run costs the streams of the same model, and they it.

One JSON line a load: the time between two tokens of a stream, without and with a run, and the run's tokens per second,
also as a fraction of what it has alone; ``--table`` prints the table of docs/performance.md instead. Streams come in
bursts of ``streams`` requests, so that both sides have contexts of the same lengths however long they are measured.
At ``load`` 1 each burst follows the one before; with less, they come as often as keep the engine busy for that fraction
of the time while there is no run. What a run can have at best is then the rest of the time: half at half load, and at
load 1 what the planner's limit leaves it. Both sides take turns in one process, whose loop is that of a worker without
its socket.

With ``--clock cpu`` time is what this process computes, plus what it waits for: on a machine that is busy with other
things that is the time which an idle one would take, for one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the server's workers have it; read when torch is loaded

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.jobs import JobFailed, LoRAParams, TokenizedExample, TrainParams, TrainSpec, TrainStep
from engine.training.dataset import write_dataset
from tests.bench.models import GENERATOR
from tests.bench.setup import CACHE_BYTES, Bench
from tests.bench.work import random_tokens, request

PROMPT_TOKENS = 16
PERIOD_BURSTS = 3
"""Of which the median says how long one takes."""
LEVELS = ((0, 1.0), (1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (1, 0.5), (4, 0.5))
"""Streams and load of each line."""

_numbers = itertools.count()


class Clock:
    """Seconds; ``wait`` lets some pass."""

    def __init__(self, kind: str) -> None:
        self._cpu = kind == "cpu"
        self._waited = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._waited if self._cpu else time.monotonic()

    def wait(self, seconds: float) -> None:
        """As much as an idle loop would."""
        if self._cpu:
            self._waited += seconds
        else:
            time.sleep(seconds)


@dataclass(slots=True)
class Side:
    """One side's observations.

    Attributes:
        latencies: seconds between two tokens of a stream.
        rates: tokens per second of the run, of each of its steps.
        busy: fraction of the time that was spent on steps.
        slices: seconds of what the run took between two steps.
    """

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    slices: list[float] = field(default_factory=list)


class Loop:
    """A worker's loop with streams of its own making.

    Args:
        streams: requests of one burst.
        burst_tokens: of each request.
        period: seconds between two bursts; None: each follows the one before.
    """

    def __init__(
        self, engine: Engine, clock: Clock, streams: int, burst_tokens: int, period: float | None = None
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._streams = streams
        self._burst_tokens = burst_tokens
        self._period = period
        self._next_burst = clock()
        self._last: dict[str, float] = {}
        self._live: list[str] = []

    def run(self, side: Side, *, seconds: float, steps: int) -> None:
        """Goes round for so long, and until a run has done so many steps after the first that is seen."""
        begin, busy = self._clock(), 0.0
        done: list[tuple[float, int]] = []
        while (steps and len(done) <= steps) or self._clock() - begin < seconds:
            self._submit()
            if self._engine.has_requests():
                since = self._clock()
                outputs = self._engine.step()
                now = self._clock()
                busy += now - since
                for output in outputs:
                    if output.token_ids:
                        if output.request_id in self._last:
                            side.latencies.append(now - self._last[output.request_id])
                        self._last[output.request_id] = now
            if self._period is None:
                self._submit()  # before the run finds nobody served
            if self._engine.has_jobs():
                for event in self._engine.advance_jobs():
                    if isinstance(event, TrainStep) and event.step:
                        done.append((self._clock(), event.num_tokens))
                    elif isinstance(event, JobFailed):
                        raise SystemExit(f"the run failed: {event.error_message}")
            elif not self._engine.has_requests():
                self._clock.wait(max(0.0, self._next_burst - self._clock()))
        side.busy.append(busy / (self._clock() - begin))
        if len(done) > 1:
            side.rates.append(sum(tokens for _, tokens in done[1:]) / (done[-1][0] - done[0][0]))

    def _submit(self) -> None:
        if not self._streams or self._engine.has_requests() or self._clock() < self._next_burst:
            return
        if self._period is not None:
            self._next_burst += self._period
        self._last.clear()
        self._live = [f"stream-{next(_numbers)}" for _ in range(self._streams)]
        for name in self._live:
            self._engine.add_request(request(name, random_tokens(PROMPT_TOKENS), self._burst_tokens, GENERATOR))

    def stop(self) -> None:
        """Ends the streams."""
        for name in self._live:
            self._engine.abort(name)


class Bencher:
    """Both sides of every level."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self._bench = bench
        self._options = options
        self._clock = Clock(options.clock)
        config = EngineConfig(
            device="cpu",
            num_threads=options.threads,
            state_dir=str(bench.work_dir / "state"),
            kv_cache_bytes=CACHE_BYTES,
            job_slice_seconds=options.slice_ms / 1000,
            job_share=options.share,
            job_max_slowdown=options.max_slowdown,
        )
        self._engine = Engine(config, self._clock)
        self._engine.load_model(GENERATOR, bench.models.path(GENERATOR))

    def _start_run(self) -> str:
        options, run_id = self._options, f"run-{next(_numbers)}"
        run_dir = self._bench.work_dir / run_id
        mask = [False] + [True] * (options.train_tokens - 1)
        examples = [
            TokenizedExample(token_ids=random_tokens(options.train_tokens, seed), loss_mask=mask) for seed in range(16)
        ]
        write_dataset(run_dir / "dataset.safetensors", examples)
        params = TrainParams(batch_size=options.train_batch, max_steps=100_000, max_seq_len=options.train_tokens)
        lora = LoRAParams(rank=8, target_modules=["q_proj", "v_proj"])
        self._engine.start_job(
            TrainSpec(
                job_id=run_id,
                model=GENERATOR,
                adapter="bench",
                lora=lora,
                params=params,
                dataset_path=str(run_dir / "dataset.safetensors"),
                run_dir=str(run_dir),
            )
        )
        return run_id

    def _period(self, streams: int, load: float) -> float | None:
        """Seconds between bursts that give this load without a run."""
        if load >= 1.0:
            return None
        seconds = []
        for _ in range(PERIOD_BURSTS):
            for name in [f"alone-{next(_numbers)}" for _ in range(streams)]:
                prompt = random_tokens(PROMPT_TOKENS)
                self._engine.add_request(request(name, prompt, self._options.burst_tokens, GENERATOR))
            begin = self._clock()
            while self._engine.has_requests():
                self._engine.step()
            seconds.append(self._clock() - begin)
        return statistics.median(seconds) / load

    def level(self, streams: int, load: float, solo: float | None) -> dict[str, Any]:
        """Measures one line.

        Args:
            solo: the run's tokens per second alone; None: this level is what tells.
        """
        options = self._options
        without, with_run = Side(), Side()
        for _ in range(options.rounds):
            period = self._period(streams, load)
            if streams:
                loop = Loop(self._engine, self._clock, streams, options.burst_tokens, period)
                loop.run(without, seconds=options.seconds, steps=0)
                loop.stop()
            run_id = self._start_run()
            loop = Loop(self._engine, self._clock, streams, options.burst_tokens, period)
            loop.run(Side(), seconds=0.0, steps=1)  # the first steps prove, load and warm up
            self._engine.stats()  # what was observed until here
            loop.run(with_run, seconds=options.seconds, steps=options.steps)
            with_run.slices += self._engine.stats().job_slice_seconds["train"]
            loop.stop()
            self._engine.cancel_job(run_id)
        rate = statistics.median(with_run.rates)
        line: dict[str, Any] = {
            "measure": "serving_while_training",
            "streams": streams,
            "load": load,
            "train_tokens_per_second": round(rate, 2),
            "train_fraction_of_solo": round(rate / (solo or rate), 3),
            **latencies("without", without),
            **latencies("with", with_run),
        }
        if streams:
            line["p99_ms_slice"] = quantile(with_run.slices, 0.99)
            line["p99_ratio"] = round(line["p99_ms_with"] / line["p99_ms_without"], 3)
            line["busy_without"] = round(statistics.median(without.busy), 3)
        return line | {
            "model": self._bench.models.label(GENERATOR),
            "threads": options.threads,
            "clock": options.clock,
            "train_batch": options.train_batch,
            "train_tokens": options.train_tokens,
            "max_slowdown": options.max_slowdown,
            "share": options.share,
            "torch": torch.__version__,
        }


def latencies(name: str, side: Side) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    if not side.latencies:
        return {}
    return {f"p50_ms_{name}": quantile(side.latencies, 0.5), f"p99_ms_{name}": quantile(side.latencies, 0.99)}


def quantile(seconds: list[float], fraction: float) -> float:
    """In milliseconds."""
    ordered = sorted(seconds)
    return round(1000 * ordered[min(len(ordered) - 1, int(fraction * len(ordered)))], 2)


HEAD = (
    "streams", "load", "p50 without, with (ms)", "p99 without, with (ms)", "ratio of p50", "ratio of p99 (aim <= 1.5)",
    "slice p99 (ms)", "the run's share of its speed alone (aim >= 50% at half load)",
)  # fmt: skip


def row(line: dict[str, Any]) -> tuple[str, ...]:
    """A line as cells under HEAD."""
    share = f"{line['train_fraction_of_solo']:.0%}"
    if not line["streams"]:
        return "0", "", "", "", "", "", "", f"{share}: {line['train_tokens_per_second']:.0f} tokens/s"
    p50, p99 = ([line[f"{name}_ms_{side}"] for side in ("without", "with")] for name in ("p50", "p99"))
    return (
        str(line["streams"]),
        f"{line['load']:.0%}",
        "{:.3g}, {:.3g}".format(*p50),
        "{:.3g}, {:.3g}".format(*p99),
        f"{p50[1] / p50[0]:.2f}",
        f"{p99[1] / p99[0]:.2f}",
        f"{line['p99_ms_slice']:.3g}",
        share,
    )


def print_row(cells: Iterable[str]) -> None:
    """As markdown."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measures the levels that are named, or all."""
    parser = argparse.ArgumentParser(description="What a LoRA run costs streams of the same model, and they it.")
    parser.add_argument("--streams", type=int, nargs="*", help="levels of these numbers of streams alone, and 0")
    parser.add_argument("--loads", type=float, nargs="*", choices=(0.5, 1.0), help="of those levels, these loads alone")
    parser.add_argument("--table", action="store_true", help="a table in place of lines of JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that the benchmark works")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M of the demo packages")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=2, help="in each, both sides have their turn")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the side without a run")
    parser.add_argument("--steps", type=int, default=3, help="of the run, on the other side")
    parser.add_argument("--burst-tokens", type=int, default=24)
    parser.add_argument("--train-batch", type=int, default=2)
    parser.add_argument("--train-tokens", type=int, default=128)
    parser.add_argument("--slice-ms", type=float, default=1000 * EngineConfig().job_slice_seconds)
    parser.add_argument("--share", type=float, default=EngineConfig().job_share)
    parser.add_argument("--max-slowdown", type=float, default=EngineConfig().job_max_slowdown)
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up the time of all threads; give --threads 1")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.quick, options.threads, options.model)
        bencher = Bencher(bench, options)
        solo = None
        if options.table:
            print_row(HEAD)
            print_row(["---"] * len(HEAD))
        for streams, load in LEVELS:
            if streams and options.streams is not None and streams not in options.streams:
                continue
            if streams and options.loads is not None and load not in options.loads:
                continue
            line = bencher.level(streams, load, solo)
            solo = solo or line["train_tokens_per_second"]
            if options.table:
                print_row(row(line))
            else:
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
