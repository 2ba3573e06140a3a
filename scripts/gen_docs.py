"""Writes docs/configuration.md from ServerConfig, so that options and limits are documented where they are defined.

`make docs` runs it; with --check it only compares, and exits 1 if the file is stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from server.config import ServerConfig

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
SECTIONS = {
    "model": "What is served",
    "host": "Where it listens",
    "device": "The engine",
    "max_message_bytes": "Limits",
}
"""First field of each section of ServerConfig, and its title."""

HEAD = """# Configuration of whet-server

Every option has three spellings that mean the same: a flag (`--max-batch-tokens`), an environment variable
(`WHET_MAX_BATCH_TOKENS`) and a key of the YAML file that `--config` names (`max_batch_tokens`). Flags win over the
environment, the environment over the file, the file over the defaults. Sizes may be written as `2GiB`.

A request over a limit is refused with INVALID_ARGUMENT, or with RESOURCE_EXHAUSTED where it may succeed later; the
error names the field, the value and the limit.

This file is made from `server/config.py` by `make docs`.
"""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _default(name: str, field: Any) -> str:
    if name == "state_dir":
        return "`$XDG_STATE_HOME/whet`, or `~/.local/state/whet`"
    value = field.default_factory() if field.default_factory is not None else field.default
    if value is None or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def render() -> str:
    """The whole file."""
    lines = [HEAD]
    for name, field in ServerConfig.model_fields.items():
        if name in SECTIONS:
            lines += [f"\n## {SECTIONS[name]}\n", "| option | default | meaning |", "| --- | --- | --- |"]
        flag = f"--{name.replace('_', '-')}"
        lines.append(f"| `{flag}` | {_default(name, field)} | {_cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 if the file is fresh, or was written."""
    text = render()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
        return 0
    if TARGET.exists() and TARGET.read_text() == text:
        return 0
    print(f"{TARGET.name} is stale; run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
