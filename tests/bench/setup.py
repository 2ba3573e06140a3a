"""One run of the benchmark: sizes, engines, peers, and a way to compare them and to report."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from tests.bench.counts import Counts, count
from tests.bench.hybrid_model import QWEN3_5_0_8B
from tests.bench.machine import Limits, machine_name, measure_limits
from tests.bench.models import EMBEDDER, GENERATOR_FLOAT, Models, load_reference
from tests.bench.peers import Peers
from tests.bench.peers.process import PeerProcess

T = TypeVar("T")
Floor = Callable[[Limits], float]

OURS = "whet"
CACHE_BYTES = 512 << 20
LOWER_IS_BETTER = frozenset({"seconds", "bytes", "microseconds/token", "cores"})
"""Units whose ratio is the peer's value over ours; of all others, ours over the peer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: repetitions, each side in turn; the median counts.
        train_rounds: those of training, where each is a median over steps already.
        warm_up: rounds before those, which are thrown away.
        embed_tokens: mean length; texts are up to a quarter shorter or longer.
    """

    rounds: int = 5
    warm_up: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64
    prefill_tokens: int = 512
    streams: int = 8
    stream_prompt_tokens: int = 100
    train_batch: int = 4
    train_tokens: int = 256
    hybrid_train_tokens: int = 128
    train_steps: int = 3
    train_rounds: int = 5
    embed_texts: int = 128
    embed_batch: int = 32
    embed_tokens: int = 32
    perplexity_tokens: int = 1024
    perplexity_window: int = 512
    many_streams: int = 64
    start_rounds: int = 5


FULL = Scale()
QUICK = Scale(
    rounds=1,
    warm_up=0,
    prompt_tokens=16,
    new_tokens=8,
    prefill_tokens=64,
    streams=3,
    stream_prompt_tokens=10,
    train_batch=2,
    train_tokens=16,
    hybrid_train_tokens=16,
    train_steps=3,
    train_rounds=1,
    embed_texts=4,
    embed_batch=4,
    embed_tokens=8,
    perplexity_tokens=128,
    perplexity_window=32,
    many_streams=4,
    start_rounds=1,
)


@dataclass(slots=True)
class Bench:
    """One run of the benchmark.

    Args:
        work_dir: for everything that is written.
        quick: tiny random models and sizes that only show that the measures work.
        threads: of torch, here, in the server and in every peer.
        model: of generation, training and perplexity; None: SmolLM2-135M of the demo packages.
        compare: measure the peers beside, where they can do the same.
        hybrid_layers: of the hybrid; fewer than the published 24 take less memory and time.
        rounds: in place of the scale's.
        dtype: of the engine; "auto" is what a server has that is not told.
        job_slice_seconds: of the engine.
        clock: of what runs in this process. With one thread, that of the processor does not see neighbours.
    """

    work_dir: Path
    quick: bool
    threads: int
    model: Path | None = None
    compare: bool = True
    hybrid_layers: int = QWEN3_5_0_8B["num_hidden_layers"]
    rounds: int | None = None
    dtype: str = "auto"
    job_slice_seconds: float = 0.05
    clock: Callable[[], float] = time.perf_counter
    models: Models = field(init=False)
    peers: Peers = field(init=False)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _made: dict[str, Any] = field(default_factory=dict)
    _limits: list[Limits] = field(default_factory=list)
    _versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = Models(self.work_dir, self.quick, self.model, self.hybrid_layers)
        self.peers = Peers(enabled=self.compare)

    @property
    def scale(self) -> Scale:
        """Sizes of this run."""
        return QUICK if self.quick else FULL

    @property
    def limits(self) -> Limits:
        """What the machine can do: the median over the rounds of this measure, or what it is now if there was none."""
        if not self._limits:
            self.observe_limits()
        return Limits.median(self._limits)

    def observe_limits(self) -> None:
        """Measures what the machine can do, as a round of the present measure."""
        self._limits.append(measure_limits(quick=self.quick))

    def load(self, name: str) -> Engine:
        """An engine with one model, loaded under its name."""

        def make() -> Engine:
            engine = Engine(
                EngineConfig(
                    device="cpu",
                    dtype="float32" if name == GENERATOR_FLOAT else self.dtype,  # type: ignore[arg-type]
                    num_threads=self.threads,
                    state_dir=str(self.work_dir / "state"),
                    kv_cache_bytes=CACHE_BYTES,
                    job_slice_seconds=self.job_slice_seconds,
                    gguf_weights="float" if name == GENERATOR_FLOAT else "auto",
                    half_weights="float" if name == GENERATOR_FLOAT else "auto",
                )
            )
            engine.load_model(name, self.models.path(name))
            return engine

        return self._once(f"engine {name}", make)

    def reference(self, name: str) -> Any:
        """The same weights in transformers, float32."""
        path = self.models.reference_path(name)
        return self._once(f"reference {path}", lambda: load_reference(path, encoder=name == EMBEDDER))

    def process(self, key: str, command: list[str]) -> PeerProcess:
        """A process that answers questions until the measure ends."""

        def make() -> PeerProcess:
            process = PeerProcess(command)
            self.stack.callback(process.close)
            return process

        return self._once(f"process {key}", make)

    def counts(self, name: str) -> Counts:
        """What the model's work consists of."""
        return count(self.models.path(name), wide=name == GENERATOR_FLOAT)

    def release(self) -> None:
        """Ends the peers' processes and frees models, so that measures do not crowd each other."""
        self.stack.close()
        self._made.clear()
        self._limits.clear()

    def _once(self, key: str, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    # --------------------------------------------------------------------------------------------------- measuring

    def samples(
        self, sides: Mapping[str, Callable[[], T]], rounds: int | None = None, warm_up: int | None = None
    ) -> dict[str, list[T]]:
        """What each side gave in each round. Every round has a turn for each side and for the machine's limits, so that
        all see the same machine.

        Args:
            rounds, warm_up: None: those of the scale.
        """
        rounds = self.rounds or rounds or self.scale.rounds
        warm_up = self.scale.warm_up if warm_up is None else warm_up
        taken: dict[str, list[T]] = {side: [] for side in sides}
        for round_ in range(-warm_up, rounds):
            if round_ >= 0:
                self.observe_limits()
            for side, measure in sides.items():
                value = measure()
                if round_ >= 0:
                    taken[side].append(value)
        return taken

    def compared(
        self, measure: str, unit: str, model: str, sides: Mapping[str, Callable[[], float]], **more: Any
    ) -> None:
        """Measures the sides in turn and reports the medians; see report."""
        self.report(measure, unit, model, self.samples(sides), **more)

    def report(
        self,
        measure: str,
        unit: str,
        model: str,
        samples: Mapping[str, list[float]],
        floor: Floor | None = None,
        floor_int8: Floor | None = None,
        **more: Any,
    ) -> None:
        """Prints a line for each peer that was measured, or one without a peer.

        Args:
            samples: of OURS, and of the peers under their names.
            floor: what limits of a machine allow, in the unit of the measure.
            floor_int8: the same where products may be of int8.
        """
        least = None if floor is None else floor(self.limits)
        if floor_int8 is not None:
            more["floor_int8"] = _rounded(floor_int8(self.limits))
        value = statistics.median(samples[OURS])
        peers: list[str | None] = [peer for peer in samples if peer != OURS]
        for peer in peers or [None]:
            theirs = statistics.median(samples[peer]) if peer is not None else None
            lower = unit in LOWER_IS_BETTER
            line: dict[str, Any] = {
                "measure": measure,
                "value": _rounded(value),
                "unit": unit,
                "peer": peer,
                "peer_value": None if theirs is None else _rounded(theirs),
                "ratio": None if theirs is None else _rounded(theirs / value if lower else value / theirs),
                "model": self.models.label(model),
                "threads": self.threads,
                "versions": self.versions(peer),
                "rounds": len(samples[OURS]),
                "spread": [_rounded(min(samples[OURS])), _rounded(max(samples[OURS]))],
                "quick": self.quick,
                "machine": machine_name(),
                "date": datetime.date.today().isoformat(),
                "limits": self.limits.rounded(),
            }
            if peer is not None:
                line["peer_spread"] = [_rounded(min(samples[peer])), _rounded(max(samples[peer]))]
            if least is not None:
                fraction = least / value if lower else value / least
                line |= {"floor": _rounded(least), "floor_fraction": round(fraction, 4)}
            print(json.dumps(line | more), flush=True)

    def know_version(self, peer: str, version: str) -> None:
        """Notes what a peer says that it is."""
        self._versions[peer] = version

    def versions(self, peer: str | None) -> dict[str, str]:
        """Versions of what a line is about: a peer's first word is its name."""
        found = {"python": platform.python_version(), "torch": torch.__version__}
        found["whet"] = importlib.metadata.version("whet-server")
        if peer is None:
            return found
        name = peer.split(" ", 1)[0]
        if name in self._versions:
            return found | {name: self._versions[name]}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
        return found


def _rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")
