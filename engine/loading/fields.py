"""Checked reads from a mapping that came out of a file. Free of torch.

A configuration file is input like any other: every value is checked for type and range where it is read, and a fault
names the file, the key, the value and what would be accepted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import FormatError

MAX_JSON_BYTES = 64 << 20
"""Longest JSON file that is parsed; the largest known (a 256k-entry tokenizer) is about half of it."""


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: unreadable, too long, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise FormatError(f"{path}: {size} bytes; accepted: at most {max_bytes}")
        value = json.loads(path.read_bytes())
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a JSON {type(value).__name__}; accepted: an object")
    return value


class Fields:
    """Typed, range-checked access to a mapping.

    Args:
        values: what the file held.
        source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def reject(self, name: str, value: object, accepted: str) -> NoReturn:
        """Raises FormatError."""
        shown = repr(value)
        raise FormatError(f"{self.source}: {name} is {shown[:200]}; accepted: {accepted}")

    def has(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 1 << 31) -> int:
        """An integer in [low, high]; without a default the key must be there."""
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.reject(name, value, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in [low, high]; without a default the key must be there."""
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.reject(name, value, f"a number in [{low:g}, {high:g}]")
        # The comparison also turns away NaN, and integers too large for a float.
        if not low <= value <= high or not math.isfinite(value):
            self.reject(name, value, f"a number in [{low:g}, {high:g}]")
        return float(value)

    def optional_number(self, name: str, *, low: float = 0.0, high: float = 1e12) -> float | None:
        """As number, but None where the key is absent or null."""
        return self.number(name, low=low, high=high) if self.has(name) else None

    def boolean(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.reject(name, value, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        """A string; without a default the key must be there."""
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, str):
            self.reject(name, value, "a string")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object, or None where the key is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.reject(name, value, "an object")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; ids that the vocabulary does not have (some files say -1) are left out."""
        value = self.values.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if len(values) > 256 or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            self.reject(name, value, "a token id, or at most 256 of them")
        return tuple(dict.fromkeys(v for v in values if 0 <= v < vocab_size))
