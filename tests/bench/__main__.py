"""``python -m tests.bench [MEASURE …]``: prints a JSON line for each measure and peer.

Every number is the median of some rounds. Peers that are installed run in the same rounds, in turn, on the same
weights; a line carries the peer's number, and a ratio that is above 1 where ours is the better. It carries the floor
beside, as this machine's memory bandwidth and matrix rate allow, which are measured in the same rounds. Absolute
numbers depend on the machine and are no gates; ratios compare within one run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# As the server's workers have it: spinning threads burn the time of those that they wait for. Before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

from tests.bench import jobs, overhead, serving
from tests.bench.check import MARGIN, check, record
from tests.bench.setup import Bench

MEASURES: dict[str, Callable[[Bench], None]] = {
    measure.__name__: measure
    for measure in (
        serving.time_to_first_token,
        serving.prefill,
        serving.prefill_q8,
        serving.decode_1,
        serving.decode_1_q8,
        serving.decode_1_float,
        serving.decode_1_float32,
        serving.decode_8,
        serving.streams_8,
        jobs.train_qv,
        jobs.train,
        jobs.perplexity,
        jobs.embed,
        jobs.embed_q8,
        overhead.start,
        overhead.grpc_overhead,
        overhead.grpc_64,
        overhead.front_end,
        serving.hybrid_prefill,
        serving.hybrid_prefill_q8,
        serving.hybrid_decode_1,
        serving.hybrid_decode_1_q8,
        serving.hybrid_decode_8,
        jobs.hybrid_train_qv,
        jobs.hybrid_train_qv_q8,
        jobs.hybrid_train_all,
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the measures that are named, or all; returns the exit status, which is 1 only if --check found a fall."""
    summaries = "\n".join(f"  {name:<20} {(run.__doc__ or '').splitlines()[0]}" for name, run in MEASURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures Whet; prints a JSON line for each measure and peer.",
        epilog=f"measures:\n{summaries}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measure", nargs="*", metavar="MEASURE", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: shows that the measures work")
    parser.add_argument("--model", type=Path, help="generating model; default: SmolLM2-135M of the demo packages")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; default: all cores")
    parser.add_argument("--no-compare", action="store_true", help="leave the peers out")
    parser.add_argument("--hybrid-layers", type=int, default=24, help="of the hybrid, a multiple of 4; default: all 24")
    parser.add_argument("--rounds", type=int, help="repetitions, of which the median counts; default: 5")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="of the engine; default: auto")
    parser.add_argument("--work-dir", type=Path, help="keeps the models that are made, for the next run")
    parser.add_argument(
        "--check", action="store_true", help="compare ratios to a fixed torch loop with those on record; 1 if one fell"
    )
    parser.add_argument("--record", action="store_true", help="write this run's ratios to the record of --check")
    parser.add_argument("--margin", type=float, default=MARGIN, help=f"that a ratio may fall by; default: {MARGIN}")
    options = parser.parse_args(arguments)
    if not 0 < options.margin < 1:
        parser.error(f"--margin is {options.margin}; accepted: above 0 and below 1")
    if options.quick and (options.check or options.record):
        parser.error("--quick measures tiny models, of which --check and --record have no use")
    if options.measure and (options.check or options.record):
        parser.error(f"MEASURE is {options.measure[0]!r}; --check and --record have measures of their own")
    if options.hybrid_layers < 4 or options.hybrid_layers % 4:
        parser.error(f"--hybrid-layers is {options.hybrid_layers}; accepted: 4, 8, 12 …")
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; accepted: 1, 2, 3 …")
    for name in options.measure:
        if name not in MEASURES:
            parser.error(f"MEASURE is {name!r}; accepted: {', '.join(MEASURES)}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="whet-bench-") as directory:
        work_dir = options.work_dir or Path(directory)
        work_dir.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            work_dir.resolve(),
            quick=options.quick,
            threads=options.threads,
            model=options.model,
            compare=not options.no_compare,
            hybrid_layers=options.hybrid_layers,
            rounds=options.rounds,
            dtype=options.dtype,
        )
        if options.check or options.record:
            return _check(bench, options)
        for name in options.measure or MEASURES:
            try:
                MEASURES[name](bench)
            finally:
                bench.release()
    return 0


def _check(bench: Bench, options: argparse.Namespace) -> int:
    """The regression check, with one thread and the processor's clock."""
    bench.threads, bench.clock = 1, time.process_time
    torch.set_num_threads(1)
    if options.record:
        record(bench)
        return 0
    messages = check(bench, options.margin)
    for message in messages:
        print(f"tests.bench: {message}", file=sys.stderr)
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
