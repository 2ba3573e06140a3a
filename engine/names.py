"""Names of models and adapters. They become directory names, so a name never carries a path."""

from __future__ import annotations

import re

from engine.errors import InvalidArgumentError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def validate_name(value: str, field: str) -> str:
    """Returns the name.

    Raises:
        InvalidArgumentError: it is empty, too long, or has other characters than the accepted ones.
    """
    if not _NAME.fullmatch(value) or ".." in value:
        shown = value if len(value) <= 64 else value[:61] + "..."
        raise InvalidArgumentError(
            f"{field} is {shown!r}; accepted: 1 to 128 of ASCII letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, without '..'",
            field=field,
            reason="BAD_NAME",
        )
    return value
