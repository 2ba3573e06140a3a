"""Where an adapter version came from, kept as lineage.json beside its PEFT files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
        parent: adapter name and version that training went on from.
    """

    created_at: float | None = None
    run_id: str = ""
    base_digest: str = ""
    best_nll: float | None = None
    parent: tuple[str, int] | None = None

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
        )
