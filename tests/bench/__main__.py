"""``python -m tests.bench [MEASURE …]``: prints one JSON line a measure.

Every number is the median of a few rounds. Where transformers can do the same work on the same weights, it runs in the
same rounds, in turn, and the line carries its number and the ratio (above 1 means more than transformers). Absolute
numbers depend on the machine and are no gates; ratios compare within one run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.jobs import embed, hybrid_train_all, hybrid_train_qv, perplexity, train
from tests.bench.overhead import grpc_overhead
from tests.bench.serving import (
    decode_1,
    decode_8,
    hybrid_decode_1,
    hybrid_decode_8,
    hybrid_prefill,
    prefill,
    time_to_first_token,
)
from tests.bench.setup import Bench

MEASURES: dict[str, Callable[[Bench], None]] = {
    measure.__name__: measure
    for measure in (
        time_to_first_token,
        prefill,
        decode_1,
        decode_8,
        train,
        embed,
        perplexity,
        grpc_overhead,
        hybrid_prefill,
        hybrid_decode_1,
        hybrid_decode_8,
        hybrid_train_qv,
        hybrid_train_all,
    )
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the measures that are named, or all."""
    summaries = "\n".join(f"  {name:<20} {(run.__doc__ or '').splitlines()[0]}" for name, run in MEASURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures Whet; prints one JSON line a measure.",
        epilog=f"measures:\n{summaries}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measure", nargs="*", metavar="MEASURE", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny random model: shows that the measures work")
    parser.add_argument("--model", type=Path, help="generating model; default: SmolLM2-135M of the demo packages")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; default: all cores")
    parser.add_argument("--no-compare", action="store_true", help="leave transformers out")
    parser.add_argument("--hybrid-layers", type=int, default=24, help="of the hybrid, a multiple of 4; default: all 24")
    options = parser.parse_args(arguments)
    if options.hybrid_layers < 4 or options.hybrid_layers % 4:
        parser.error(f"--hybrid-layers is {options.hybrid_layers}; accepted: 4, 8, 12 …")
    for name in options.measure:
        if name not in MEASURES:
            parser.error(f"MEASURE is {name!r}; accepted: {', '.join(MEASURES)}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="whet-bench-") as directory:
        bench = Bench(
            Path(directory),
            quick=options.quick,
            threads=options.threads,
            model=options.model,
            compare=not options.no_compare,
            hybrid_layers=options.hybrid_layers,
        )
        for name in options.measure or MEASURES:
            MEASURES[name](bench)


if __name__ == "__main__":
    main()
