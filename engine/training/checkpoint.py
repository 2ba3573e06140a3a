"""Resumable checkpoints: PEFT files, optimizer state, counters. Atomic, and free of pickle.

<run>/checkpoints/step-00000120/   adapter_config.json, adapter_model.safetensors, optimizer.safetensors, state.json
<run>/checkpoints/best             a link to the one with the lowest held-out NLL

A checkpoint is written aside, synced and renamed, so one that bears its final name is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.durable import sync, write_synced
from engine.errors import FormatError
from engine.lora.adapter import Adapter
from engine.lora.peft import save_adapter
from engine.lora.targets import LinearLike

BEST_NAME = "best"
STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
KEEP_LAST = 2
"""Checkpoints that stay beside the best one."""

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(slots=True, kw_only=True)
class RunState:
    """Where a run stands, after a completed step. With the masters and the optimizer's state it determines the rest.

    Attributes:
        step: completed optimizer steps, skipped ones included.
        micro_batch_tokens: of one forward; kept, because another cut would sum in another order.
        fingerprint: of configuration, data and base weights.
        num_tokens: trained on so far.
        seconds: of work and waiting so far.
        consecutive_skips: non-finite steps in a row up to now.
        evaluated_step, published_step: last step whose evaluation and publication are done; -1: none.
        evaluations_without_improvement: in a row up to now.
        base_nll, last_nll, best_nll: on the held-out examples.
        parent_name, parent_version: the adapter that the run went on from; "" for a new one.
    """

    step: int = 0
    micro_batch_tokens: int = 0
    fingerprint: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    consecutive_skips: int = 0
    evaluated_step: int = -1
    published_step: int = -1
    evaluations_without_improvement: int = 0
    base_nll: float | None = None
    last_nll: float | None = None
    best_nll: float | None = None
    best_step: int | None = None
    parent_name: str = ""
    parent_version: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any], source: Path) -> RunState:
        """From state.json.

        Raises:
            FormatError: it lacks a value or has another type.
        """
        taken: dict[str, Any] = {}
        for entry in fields(cls):
            value, declared = values.get(entry.name), str(entry.type)
            accepted = _ACCEPTED[declared.removesuffix(" | None")]
            if not (isinstance(value, accepted) or (value is None and declared.endswith("None"))):
                raise FormatError(f"{source}: {entry.name} is {value!r}; accepted: {declared}")
            taken[entry.name] = value
        return cls(**taken)


_ACCEPTED: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "float": (int, float)}


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: made when the first one is written.
        targets: everything adaptable of the model, for the PEFT configuration.
    """

    def __init__(self, directory: Path, base_model: str, targets: Mapping[str, LinearLike]) -> None:
        self._directory = directory
        self._base_model = base_model
        self._targets = targets

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self._directory / f"step-{step:08d}"

    @property
    def best(self) -> Path:
        """The link to the best one."""
        return self._directory / BEST_NAME

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self._directory.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self._directory.iterdir())
        return sorted(int(match[1]) for match in matches if match is not None)

    def best_step(self) -> int | None:
        """Step of the best one."""
        with contextlib.suppress(OSError):
            match = _STEP.fullmatch(os.readlink(self.best))
            return None if match is None else int(match[1])
        return None

    def write(self, adapter: Adapter, optimizer: Mapping[str, Tensor], state: RunState, *, is_best: bool) -> Path:
        """Writes the checkpoint of ``state.step``, in place of one that is there, and removes those not kept."""
        self._directory.mkdir(parents=True, exist_ok=True)
        final = self.path(state.step)
        temporary = self._directory / f".{final.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            save_adapter(temporary, adapter, self._targets, base_model=self._base_model)
            save_file(dict(optimizer), str(temporary / OPTIMIZER_NAME))
            sync(temporary / OPTIMIZER_NAME)
            write_synced(temporary / STATE_NAME, json.dumps(asdict(state), indent=2) + "\n")
            sync(temporary)
            if final.exists():
                # A rename cannot replace a directory that is not empty. Moved aside, the old one is still whole.
                aside = self._directory / f".old-{final.name}.{os.getpid()}"
                final.rename(aside)
                temporary.rename(final)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if is_best:
            self._link_best(final.name)
        sync(self._directory)
        self._prune()
        return final

    def clear_unfinished(self) -> None:
        """Removes what a process that died left half written. A run has one process at a time."""
        for path in self._directory.glob(".*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def read_latest(self) -> tuple[RunState, Path, dict[str, Tensor]] | None:
        """State, PEFT directory and optimizer state of the last checkpoint; None if there is none.

        Raises:
            FormatError: it is malformed.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            values = json.loads((path / STATE_NAME).read_bytes())
            optimizer = load_file(str(path / OPTIMIZER_NAME))
        except (OSError, ValueError, SafetensorError) as error:
            raise FormatError(f"{path}: cannot be read as a checkpoint: {error}") from error
        if not isinstance(values, dict):
            raise FormatError(f"{path / STATE_NAME}: holds a JSON {type(values).__name__}; accepted: an object")
        return RunState.of(values, path / STATE_NAME), path, optimizer

    def _link_best(self, name: str) -> None:
        link = self._directory / f".{BEST_NAME}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(name)
        link.replace(self.best)

    def _prune(self) -> None:
        best = self.best_step()
        for step in self.steps()[:-KEEP_LAST]:
            if step != best:
                gone = self._directory / f".gone-{step}.{os.getpid()}"
                self.path(step).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
