"""Experts that a checkpoint stores one by one, read as the stacked tensors that a model has.

``….experts.7.gate_proj.weight`` [I, D], ``up_proj`` [I, D] and ``down_proj`` [D, I] of all experts become
``….experts.gate_up_proj`` [E, 2 I, D], gate above up, and ``….experts.down_proj`` [E, D, I].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import FormatError, ShapeError
from engine.loading.checkpoint import Checkpoint

_ONE = re.compile(r"(?P<prefix>.*\.experts)\.(?P<index>\d{1,5})\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class StackedExperts:
    """A checkpoint with its single experts stacked; all other tensors as they are.

    Raises:
        FormatError: the experts of a layer are not 0 … E - 1, each with all its parts.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._inner = checkpoint
        self._names: list[str] = []
        found: dict[str, dict[str, set[int]]] = {}
        for name in checkpoint.names():
            match = _ONE.fullmatch(name)
            if match is None:
                self._names.append(name)
            else:
                parts = found.setdefault(match["prefix"], {})
                parts.setdefault(match["part"], set()).add(int(match["index"]))
        self._stacked: dict[str, list[list[str]]] = {}
        for prefix, parts in found.items():
            count = len(next(iter(parts.values())))
            expected = set(range(count))
            for stacked, sources in _PARTS.items():
                for source in sources:
                    if parts.get(source) != expected:
                        raise FormatError(
                            f"{checkpoint.path}: {prefix} has {len(parts.get(source, ()))} tensors {source}; "
                            f"accepted: one for each of the experts 0 … {count - 1}"
                        )
                self._stacked[f"{prefix}.{stacked}"] = [
                    [f"{prefix}.{i}.{source}.weight" for source in sources] for i in range(count)
                ]

    @property
    def path(self) -> Path:
        return self._inner.path

    @property
    def kind(self) -> Literal["safetensors", "gguf"]:
        return self._inner.kind

    @property
    def config(self) -> ModelConfig:
        return self._inner.config

    @property
    def stored_bytes(self) -> int:
        return self._inner.stored_bytes

    @property
    def stored(self) -> Checkpoint:
        """The checkpoint as its files have it, with single experts."""
        return self._inner

    def place(self, name: str) -> tuple[str, int, int] | None:
        """Where a stored tensor is in a stacked one: the name of that, the expert, and the first row within it; None
        for a tensor of no expert."""
        match = _ONE.fullmatch(name)
        if match is None:
            return None
        stacked, parts = next((key, parts) for key, parts in _PARTS.items() if match["part"] in parts)
        before = parts[: parts.index(match["part"])]
        prefix, index = match["prefix"], int(match["index"])
        rows = sum(self._inner.shape(f"{prefix}.{index}.{part}.weight")[0] for part in before)
        return f"{prefix}.{stacked}", index, rows

    def names(self) -> Iterable[str]:
        return [*self._names, *self._stacked]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._stacked:
            return self._inner.shape(name)
        experts = self._stacked[name]
        shapes = {tuple(self._inner.shape(source) for source in sources) for sources in experts}
        if len(shapes) != 1:
            raise ShapeError(f"{self.path}: the experts of {name!r} have the shapes {sorted(shapes)}; accepted: one")
        parts = next(iter(shapes))
        if any(len(part) != 2 for part in parts):
            raise ShapeError(f"{self.path}: the experts of {name!r} have shapes {parts}; accepted: matrices")
        return (len(experts), sum(part[0] for part in parts), parts[0][1])

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(self._stacked[name][0][0] if name in self._stacked else name)

    def get(self, name: str) -> Tensor:
        if name not in self._stacked:
            return self._inner.get(name)
        experts = [[self._inner.get(source) for source in sources] for sources in self._stacked[name]]
        # Written row by row into one tensor: stacking whole experts would hold them twice.
        out = torch.empty(self.shape(name), dtype=experts[0][0].dtype)
        for row, parts in zip(out, experts, strict=True):
            torch.cat(parts, out=row)
        return out

    def digest(self) -> str:
        return self._inner.digest()


def has_single_experts(names: Iterable[str]) -> bool:
    """Whether any name is that of a tensor of one expert."""
    return any(_ONE.fullmatch(name) for name in names)
