"""Where an adapter version came from, kept as lineage.json beside its PEFT files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.info import AdapterSource
from engine.lora.peft import BASE_DIGEST_KEY, WEIGHTS_NAME

LINEAGE_NAME = "lineage.json"
MAX_LINEAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Origin of one version.

    Attributes:
        created_at: seconds since the epoch.
        run_id: of the training run, or "".
        base_digest: weights_digest of the model it belongs to, or "" if not known.
        best_nll: held-out NLL of these weights, nats per token; None if not measured.
        parent: adapter name and version that training went on from, as they were called then.
        data_digest: of the tokenised examples that the run trained on (engine.training.dataset), or "".
        sources: what it was combined from, as they were called then.
        combination: how: see engine.lora.combine; "" for what was not combined.
        forced: a source was trained on other base weights.
    """

    created_at: float | None = None
    run_id: str = ""
    base_digest: str = ""
    best_nll: float | None = None
    parent: tuple[str, int] | None = None
    data_digest: str = ""
    sources: tuple[AdapterSource, ...] = ()
    combination: str = ""
    forced: bool = False

    def encode(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def read(cls, directory: Path) -> Lineage:
        """That of a version's directory. What is missing or malformed stays unknown: the adapter itself is whole."""
        path = directory / LINEAGE_NAME
        try:
            if path.stat().st_size > MAX_LINEAGE_BYTES:
                return cls()
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return cls()
        return cls._of(values) if isinstance(values, dict) else cls()

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Lineage:
        def number(name: str) -> float | None:
            value = values.get(name)
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

        def text(name: str) -> str:
            value = values.get(name)
            return value if isinstance(value, str) else ""

        parent = values.get("parent")
        known = isinstance(parent, list) and len(parent) == 2 and isinstance(parent[1], int)
        return cls(
            created_at=number("created_at"),
            run_id=text("run_id"),
            base_digest=text("base_digest"),
            best_nll=number("best_nll"),
            parent=(str(parent[0]), parent[1]) if known and parent is not None else None,
            data_digest=text("data_digest"),
            sources=_sources(values.get("sources")),
            combination=text("combination"),
            forced=values.get("forced") is True,
        )


def _sources(values: Any) -> tuple[AdapterSource, ...]:
    try:
        return tuple(
            AdapterSource(name=str(value["name"]), version=int(value["version"]), weight=float(value["weight"]))
            for value in values or ()
        )
    except (TypeError, KeyError, ValueError):
        return ()


def base_digest_of(directory: Path) -> str:
    """Digest of the base weights that an adapter's files say they were trained on; "" where they do not.

    An adapter that this project wrote says so in its lineage and, where only its PEFT files came along, in the
    metadata of its tensors.
    """
    known = Lineage.read(directory).base_digest
    if known:
        return known
    try:
        with safe_open(str(directory / WEIGHTS_NAME), framework="pt") as file:
            return str((file.metadata() or {}).get(BASE_DIGEST_KEY, ""))
    except (SafetensorError, OSError):
        return ""  # reading its tensors tells what is wrong with it
