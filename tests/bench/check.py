"""The regression check: the engine against a fixed loop of torch operations in the same run.

Both run in this process with one thread, in turn, and are timed by the processor's clock, which neighbours disturb
little. The ratio of the two is compared with one that is committed (reference_ratios.json). It depends on the machine
less than either speed does, but does: a ratio that was recorded on one kind of processor is for that kind. A ratio that
fell by more than the margin is told, and is an error of ``--check`` alone, never of a test.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.fixed_loop import FixedLoop, shape_of
from tests.bench.machine import machine_name
from tests.bench.models import GENERATOR, GENERATOR_FLOAT, GENERATOR_Q8
from tests.bench.serving import decode_rate, first_token_seconds
from tests.bench.setup import OURS, Bench
from tests.bench.work import random_tokens

RATIOS = Path(__file__).with_name("reference_ratios.json")
MARGIN = 0.25
"""By how much a ratio may fall: on a busy machine, caches and memory are shared with neighbours, too."""

LOOP = "fixed loop"


def make_loop(bench: Bench) -> FixedLoop:
    """The loop over the generator's numbers in float32."""
    model = bench.reference(GENERATOR)
    shape = shape_of(model.config)
    scale = bench.scale
    room = max(scale.prompt_tokens + scale.new_tokens, scale.prefill_tokens) + 1
    return FixedLoop({name: tensor.detach() for name, tensor in model.state_dict().items()}, shape, room)


def measures(bench: Bench) -> dict[str, tuple[str, Callable[[], float], Callable[[], float]]]:
    """Of each measure: the model, and tokens per second of the engine and of the loop."""
    scale = bench.scale
    loop = make_loop(bench)

    def loop_prefill() -> float:
        loop.reset()
        prompt = random_tokens(scale.prefill_tokens)
        began = bench.clock()
        int(loop.forward(prompt).argmax())
        return scale.prefill_tokens / (bench.clock() - began)

    def loop_decode() -> float:
        loop.reset()
        token = int(loop.forward(random_tokens(scale.prompt_tokens)).argmax())
        began = bench.clock()
        for _ in range(scale.new_tokens - 1):
            token = int(loop.forward([token]).argmax())
        return (scale.new_tokens - 1) / (bench.clock() - began)

    def prefill(name: str) -> Callable[[], float]:
        return lambda: scale.prefill_tokens / first_token_seconds(bench, name, scale.prefill_tokens)

    def decode(name: str) -> Callable[[], float]:
        return lambda: decode_rate(bench, name, 1)

    return {
        "decode_1": (GENERATOR, decode(GENERATOR), loop_decode),
        "decode_1_q8": (GENERATOR_Q8, decode(GENERATOR_Q8), loop_decode),
        "decode_1_float": (GENERATOR_FLOAT, decode(GENERATOR_FLOAT), loop_decode),
        "prefill": (GENERATOR, prefill(GENERATOR), loop_prefill),
        "prefill_q8": (GENERATOR_Q8, prefill(GENERATOR_Q8), loop_prefill),
        "prefill_float": (GENERATOR_FLOAT, prefill(GENERATOR_FLOAT), loop_prefill),
    }


def measure_ratios(bench: Bench) -> dict[str, float]:
    """Prints a line for each measure; returns the ratios, which are medians of each round's own."""
    ratios = {}
    for name, (model, ours, theirs) in measures(bench).items():
        taken = bench.samples({OURS: ours, LOOP: theirs})
        bench.report(f"check_{name}", "tokens/s", model, taken)
        ratios[name] = statistics.median(mine / loop for mine, loop in zip(taken[OURS], taken[LOOP], strict=True))
    return ratios


def conditions(bench: Bench) -> str:
    """What a ratio is good for: a kind of processor and one kind of model."""
    return f"{machine_name()}: {bench.models.label(GENERATOR)}"


def record(bench: Bench, path: Path = RATIOS) -> None:
    """Writes the ratios of this run as those to compare with, beside those of other machines."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[conditions(bench)] = {
        "torch": torch.__version__,
        "ratios": {name: round(ratio, 3) for name, ratio in measure_ratios(bench).items()},
    }
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fallen(ratios: dict[str, float], reference: dict[str, float], margin: float) -> list[str]:
    """A message for each ratio that fell by more than the margin, a fraction of the reference."""
    return [
        f"{name}: the ratio to the fixed loop is {ratios[name]:.3f}, {1 - ratios[name] / wanted:.0%} below "
        f"{wanted:.3f}; the margin is {margin:.0%}"
        for name, wanted in reference.items()
        if name in ratios and ratios[name] < wanted * (1 - margin)
    ]


def check(bench: Bench, margin: float = MARGIN, path: Path = RATIOS) -> list[str]:
    """Measures and compares; returns what fell.

    Raises:
        SystemExit: there is nothing to compare with: no ratios of this kind of processor.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if conditions(bench) not in known:
        there = "; ".join(sorted(known)) or "none"
        raise SystemExit(
            f"no ratios to compare with for {conditions(bench)!r}; there are those of: {there}. "
            "--record writes this run's"
        )
    return fallen(measure_ratios(bench), known[conditions(bench)]["ratios"], margin)
