"""What the tests of training share: a tiny loaded model, random examples, and runs to their end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.config import EngineConfig
from engine.core.loaded import LoadedModel
from engine.core.model_loader import load_model
from engine.jobs import JobEvent, LoRAParams, Pause, TokenizedExample, TrainParams, TrainSpec, TrainStep
from engine.training.data import write_dataset
from engine.training.trainer import train

E = TypeVar("E")


def load_tiny(path: Path, state_dir: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> LoadedModel:
    """A checkpoint as the engine holds it."""
    config = EngineConfig(device="cpu", kv_cache_bytes=4 << 20, block_size=4, state_dir=str(state_dir))
    return load_model("tiny", path, dataclasses.replace(config, **overrides), torch.device("cpu"), dtype)


def random_examples(lengths: Sequence[int], seed: int = 0, vocab_size: int = 300) -> list[TokenizedExample]:
    """Examples whose first three tokens are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenizedExample(
            token_ids=torch.randint(8, vocab_size, (length,), generator=generator).tolist(),
            loss_mask=[i >= 3 for i in range(length)],
        )
        for length in lengths
    ]


def make_spec(
    directory: Path,
    train_examples: Sequence[TokenizedExample],
    evaluation: Sequence[TokenizedExample] = (),
    *,
    lora: LoRAParams | None = None,
    run: str = "run",
    **params: Any,
) -> TrainSpec:
    """A run below ``directory``, its dataset written."""
    dataset = directory / "dataset.safetensors"
    write_dataset(dataset, train_examples, evaluation)
    defaults: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "batch_size": 2}
    return TrainSpec(
        job_id=run,
        model="tiny",
        adapter="tone",
        lora=lora or LoRAParams(rank=4, alpha=8.0),
        params=TrainParams(**(defaults | params)),
        dataset_path=str(dataset),
        run_dir=str(directory / run),
    )


def events_of(spec: TrainSpec, loaded: LoadedModel) -> list[JobEvent]:
    """All events of a run that goes to its end."""
    return told(train(spec, loaded))


def told(items: Iterable[JobEvent | Pause | None]) -> list[JobEvent]:
    """Of what a job yields, the events."""
    return [item for item in items if item is not None and not isinstance(item, Pause)]


def of_type(events: Iterator[JobEvent] | Sequence[JobEvent], kind: type[E]) -> list[E]:
    """The events of one type."""
    return [event for event in events if isinstance(event, kind)]


def losses(events: Sequence[JobEvent]) -> dict[int, tuple[float, float | None]]:
    """Step to loss and gradient norm, exactly."""
    return {event.step: (event.loss, event.grad_norm) for event in of_type(events, TrainStep)}
