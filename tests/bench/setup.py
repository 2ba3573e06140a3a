"""What every measure stands on: models, an engine in this process, the reference, and a way to compare them."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.jobs import TERMINAL_EVENTS, JobEvent, JobFailed, JobSpec
from engine.loading.defaults import embedded_models
from engine.request import Request, SamplingParams
from tests.bench.hybrid_model import QWEN3_5_0_8B, save_hybrid
from tests.tiny import save_tiny_hybrid

GENERATOR = "generator"
EMBEDDER = "embedder"
HYBRID = "hybrid"
DEFAULT_MODELS = {GENERATOR: "smollm2-135m", EMBEDDER: "all-minilm-l6-v2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: repetitions, each side in turn; the median counts.
        train_rounds: those of training, where each is a median over steps already.
        warm_up: rounds before those, which are thrown away.
    """

    rounds: int = 5
    warm_up: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    prefill_tokens: int = 512
    train_batch: int = 4
    train_tokens: int = 128
    train_steps: int = 4
    train_rounds: int = 2
    embed_texts: int = 64
    embed_tokens: int = 32
    perplexity_tokens: int = 1024
    perplexity_window: int = 512


FULL = Scale()
QUICK = Scale(
    rounds=1,
    warm_up=1,
    prompt_tokens=16,
    new_tokens=8,
    prefill_tokens=64,
    train_batch=2,
    train_tokens=16,
    train_steps=3,
    train_rounds=1,
    embed_texts=4,
    embed_tokens=8,
    perplexity_tokens=128,
    perplexity_window=32,
)


@dataclass(slots=True)
class Bench:
    """One run of the benchmark.

    Args:
        work_dir: for everything that is written.
        quick: a tiny random model and sizes that only show that the measures work.
        threads: of torch, here and in the server.
        model: of generation, training and perplexity; None: SmolLM2-135M of the demo packages.
        compare: measure transformers beside, where it can do the same.
        hybrid_layers: of the hybrid; fewer than the published 24 take less memory and time.
    """

    work_dir: Path
    quick: bool
    threads: int
    model: Path | None = None
    compare: bool = True
    hybrid_layers: int = QWEN3_5_0_8B["num_hidden_layers"]
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> Scale:
        """Sizes of this run."""
        return QUICK if self.quick else FULL

    def path(self, name: str) -> Path:
        """Where a model lies: GENERATOR, EMBEDDER or HYBRID."""
        if name == HYBRID:
            return self._once("hybrid", self._save_hybrid)  # type: ignore[no-any-return]
        if self.quick:
            return self._once("tiny", lambda: _save_tiny(self.work_dir / "tiny"))  # type: ignore[no-any-return]
        if name == GENERATOR and self.model is not None:
            return self.model
        wanted = DEFAULT_MODELS[name]
        models = embedded_models()
        if wanted not in models:
            raise SystemExit(f"the package of {wanted} is not installed; make env installs it, or give --model PATH")
        return models[wanted]

    def _save_hybrid(self) -> Path:
        if self.quick:
            return save_tiny_hybrid(self.work_dir / "tiny-hybrid")
        return save_hybrid(self.work_dir / "hybrid", self.hybrid_layers)

    def label(self, name: str) -> str:
        """Name of a model in the results."""
        if name == HYBRID:
            return "tiny-qwen3.5" if self.quick else f"qwen3.5-0.8b-shape ({self.hybrid_layers} layers)"
        if self.quick:
            return "tiny-llama"
        return self.model.name if name == GENERATOR and self.model is not None else DEFAULT_MODELS[name]

    @property
    def engine(self) -> Engine:
        """An engine that has loaded what was asked of it so far."""

        def make() -> Engine:
            state = self.work_dir / "state"
            return Engine(EngineConfig(device="cpu", dtype="float32", num_threads=self.threads, state_dir=str(state)))

        return self._once("engine", make)  # type: ignore[no-any-return]

    def load(self, name: str) -> Engine:
        """The engine, with a model loaded."""
        if name not in {info.name for info in self.engine.models()}:
            self.engine.load_model(name, self.path(name))
        return self.engine

    def reference(self, name: str) -> Any:
        """The same weights in transformers, float32; made anew where a measure changes the model."""
        return self._once(f"reference {name}", lambda: load_reference(self.path(name), name))

    def forget_reference(self, name: str) -> None:
        """Frees the memory of a reference that is not needed, or that was changed."""
        self._made.pop(f"reference {name}", None)

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # --------------------------------------------------------------------------------------------------- measuring

    def medians(
        self, sides: dict[str, Callable[[], float]], rounds: int | None = None, warm_up: int | None = None
    ) -> dict[str, float]:
        """Each side's median over the rounds; in every round each side has its turn, so that both see the same
        machine.

        Args:
            rounds, warm_up: None: those of the scale.
        """
        rounds = self.scale.rounds if rounds is None else rounds
        warm_up = self.scale.warm_up if warm_up is None else warm_up
        values: dict[str, list[float]] = {side: [] for side in sides}
        for round_ in range(-warm_up, rounds):
            for side, measure in sides.items():
                value = measure()
                if round_ >= 0:
                    values[side].append(value)
        return {side: statistics.median(taken) for side, taken in values.items()}

    def report(self, measure: str, unit: str, model: str, medians: dict[str, float], **more: Any) -> None:
        """Prints one line: the engine's value, and transformers' where it was measured, with a ratio that is above 1
        where the engine is the faster."""
        line: dict[str, Any] = {
            "measure": measure,
            "value": round(medians["whet"], 6),
            "unit": unit,
            "model": self.label(model),
            "threads": self.threads,
            "rounds": more.pop("rounds", self.scale.rounds),
            "quick": self.quick,
        }
        if "transformers" in medians:
            line["transformers"] = round(medians["transformers"], 6)
            ratio = medians["whet"] / medians["transformers"]
            line["ratio"] = round(1 / ratio if unit == "seconds" else ratio, 4)
        print(json.dumps(line | more), flush=True)


def load_reference(path: Path, name: str) -> Any:
    """A model of transformers on the CPU in float32."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if name == EMBEDDER else AutoModelForCausalLM
    if path.suffix == ".gguf":
        model = kind.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    else:
        model = kind.from_pretrained(str(path), dtype=torch.float32)
    return model.eval()


def _save_tiny(directory: Path) -> Path:
    from tests.rpc.tiny_tokenizer import save_tiny_tokenizer
    from tests.tiny import save_tiny_llama

    save_tiny_llama(directory)
    return save_tiny_tokenizer(directory)


def random_tokens(count: int, seed: int | None = None) -> list[int]:
    """Token ids that every vocabulary here has; without a seed, ids that no prefix cache has seen."""
    generator = random.Random(seed)
    return [generator.randrange(3, 250) for _ in range(count)]


def request(number: int | str, prompt: list[int], max_tokens: int, model: str = GENERATOR) -> Request:
    """A greedy request of exactly so many tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=str(number), model=model, prompt_token_ids=prompt, sampling=sampling)


def run_job(engine: Engine, spec: JobSpec) -> list[JobEvent]:
    """Runs a job to its end.

    Raises:
        SystemExit: it failed.
    """
    engine.start_job(spec)
    events: list[JobEvent] = []
    while engine.has_jobs():
        events.extend(engine.advance_jobs())
    last = events[-1]
    assert isinstance(last, TERMINAL_EVENTS)
    if isinstance(last, JobFailed):
        raise SystemExit(f"the job failed: {last.error_message}")
    return events


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
