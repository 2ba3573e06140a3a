"""The other end of PeerProcess. Imports nothing of this project, so that any environment's Python can run it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(ready: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Says that it is ready, then answers line by line until the input ends."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        try:
            print(json.dumps(answer(json.loads(line))), flush=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the asker is to have it
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


def reset_peak() -> None:
    """Makes the peak of resident memory start at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Peak of resident memory since reset_peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
