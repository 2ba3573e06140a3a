"""A checkpoint of which only the first layers are taken, so that a part of a large model can be verified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InvalidArgumentError
from engine.loading import Checkpoint
from engine.lora.targets import layer_index


class FirstLayers:
    """The checkpoint's first layers, with its embeddings, last norm and head.

    Args:
        num_layers: at least one, at most all.
    Raises:
        InvalidArgumentError: num_layers is out of range.
    """

    def __init__(self, checkpoint: Checkpoint, num_layers: int) -> None:
        config = checkpoint.config
        if not 1 <= num_layers <= config.num_hidden_layers:
            raise InvalidArgumentError(
                f"layers is {num_layers}; accepted: an integer in [1, {config.num_hidden_layers}], the model's number",
                field="layers",
            )
        self._checkpoint = checkpoint
        self._config = replace(config, num_hidden_layers=num_layers, layer_types=config.layer_types[:num_layers])

    @property
    def path(self) -> Path:
        return self._checkpoint.path

    @property
    def kind(self) -> Literal["safetensors", "gguf"]:
        return self._checkpoint.kind

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def stored_bytes(self) -> int:
        return self._checkpoint.stored_bytes

    def names(self) -> Iterable[str]:
        last = self._config.num_hidden_layers
        for name in self._checkpoint.names():
            index = layer_index(name)
            if index is None or index < last:
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype(name)

    def get(self, name: str) -> Tensor:
        return self._checkpoint.get(name)

    def digest(self) -> str:
        return self._checkpoint.digest()
