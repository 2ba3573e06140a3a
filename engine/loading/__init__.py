"""From files to configurations and weights: Hugging Face directories and GGUF files.

Names are resolved at first use, so that the front end can read configurations without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.loading.checkpoint import Checkpoint, open_checkpoint
    from engine.loading.defaults import embedded_models
    from engine.loading.hf_config import load_hf_config
    from engine.loading.resolve import resolve_model_path
    from engine.loading.weights import load_weights

__all__ = ["Checkpoint", "embedded_models", "load_hf_config", "load_weights", "open_checkpoint", "resolve_model_path"]

_MODULES = {
    "Checkpoint": "checkpoint",
    "embedded_models": "defaults",
    "load_hf_config": "hf_config",
    "load_weights": "weights",
    "open_checkpoint": "checkpoint",
    "resolve_model_path": "resolve",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
