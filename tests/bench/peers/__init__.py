"""Where the peers are. Each is optional: a measure has a line for every peer that is there.

They are looked for in the folder that WHET_BENCH_PEERS names, or else in ``.peers`` of the repository, where
``make bench-peers`` puts them:

    llama.cpp/   the binaries (llama-bench, llama-server, llama-perplexity …), or links to them
    openvino/    a virtual environment with openvino-genai
    embedders/   a virtual environment with onnxruntime, optimum's exporter and sentence-transformers

transformers and peft belong to the project's own environment for development.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]

LLAMA_CPP = "llama.cpp"
OPENVINO = "openvino"
EMBEDDERS = "embedders"


def peers_dir() -> Path:
    """The folder where peers are looked for."""
    return Path(os.environ.get("WHET_BENCH_PEERS") or _ROOT / ".peers")


@dataclass(slots=True)
class Peers:
    """What is installed.

    Args:
        enabled: False: nothing is, as far as this run is concerned.
    """

    enabled: bool = True
    root: Path = field(default_factory=peers_dir)
    _noted: set[str] = field(default_factory=set)

    def binary(self, name: str) -> Path | None:
        """A program of llama.cpp."""
        path = self.root / LLAMA_CPP / name
        return self._found(LLAMA_CPP, path, path.exists())

    def python(self, environment: str) -> Path | None:
        """The interpreter of OPENVINO's or EMBEDDERS' environment."""
        path = self.root / environment / "bin" / "python"
        return self._found(environment, path, path.exists())

    def has_module(self, *names: str) -> bool:
        """Whether the project's own environment has these packages."""
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        for name in missing:
            self._note(name, f"{name} is not installed; make env installs it")
        return self.enabled and not missing

    def _found(self, peer: str, path: Path, exists: bool) -> Path | None:
        if not exists:
            self._note(peer, f"{peer} is not in {self.root}; make bench-peers installs it")
        return path if self.enabled and exists else None

    def _note(self, peer: str, message: str) -> None:
        if self.enabled and peer not in self._noted:
            self._noted.add(peer)
            print(f"tests.bench: {message}. Its lines are left out.", file=sys.stderr)
