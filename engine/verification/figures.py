"""What a verification reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped"]
Group = Literal["a", "b", "c", "d"]

GROUPS: dict[Group, str] = {
    "a": "the forward against transformers",
    "b": "the ways to compute a forward against each other",
    "c": "gradients in float64 against differences",
    "d": "gradients of adapters against transformers and peft",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One check.

    Attributes:
        value: what was measured; None where nothing was.
        accepted: the largest value that passes.
        detail: where the value is from, or why nothing was measured.
    """

    group: Group
    name: str
    status: Status
    value: float | None = None
    accepted: float | None = None
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A value before it is judged. Attributes as of Figure."""

    value: float
    accepted: float
    detail: str = ""

    @property
    def status(self) -> Status:
        """NaN fails."""
        return "passed" if math.isfinite(self.value) and self.value <= self.accepted else "failed"


class Unmeasurable(Exception):
    """Raised by a check that cannot be made here; the message is the reason."""
