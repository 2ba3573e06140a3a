"""A model's chat template: Jinja in a sandbox, with bounded time and size.

The names that templates use (raise_exception, strftime_now, tojson, namespace, ``{% generation %}``, break and
continue) are those of transformers' ``chat_template_utils``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from engine.errors import FormatError, InvalidArgumentError
from engine.tokenizer.template_sandbox import (
    BoundedEnvironment,
    Budget,
    TemplateLimitError,
    TemplateRefusal,
    check_size,
)

MAX_SOURCE_CHARS = 1 << 20
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]


class ChatTemplate:
    """One compiled template. Rendering is serialised by the caller: one budget serves one rendering at a time.

    Args:
        source: Jinja text.
        origin: the file it came from, for messages.

    Raises:
        FormatError: too long, or not a template.
    """

    def __init__(self, source: str, origin: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise FormatError(f"{origin}: chat template of {len(source)} characters; accepted: {MAX_SOURCE_CHARS}")
        self.source = source
        self._origin = origin
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, TypeError) as error:
            raise FormatError(f"{origin}: chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        special_tokens: Mapping[str, str],
    ) -> str:
        """The prompt text.

        Args:
            special_tokens: "bos_token" and the like, as the template sees them.

        Raises:
            InvalidArgumentError: messages that are malformed, or that the template refuses.
            FormatError: the template itself fails, or exceeds its limits.
        """
        plain = [check_message(message, i) for i, message in enumerate(messages)]
        if not plain:
            raise InvalidArgumentError("messages is empty; accepted: at least one message", field="messages")
        self._environment.budget = Budget()
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=plain,
                tools=None if tools is None else [_plain(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            ):
                size += len(part)
                check_size(size)
                parts.append(part)
        except TemplateRefusal as error:
            raise InvalidArgumentError(
                f"the chat template refuses these messages: {error}", field="messages"
            ) from error
        except (TemplateLimitError, OverflowError, RecursionError, MemoryError) as error:
            raise FormatError(f"{self._origin}: chat template exceeds its limits: {error}") from error
        except SecurityError as error:
            raise FormatError(f"{self._origin}: chat template does what is not allowed: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidArgumentError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}", field="messages"
            ) from error
        return "".join(parts)


def check_message(message: object, index: int) -> dict[str, Any]:
    """A message as plain JSON values.

    Raises:
        InvalidArgumentError: not a mapping, a role that is not one of ROLES, or content that is not text.
    """
    field = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidArgumentError(f"{field} is a {type(message).__name__}; accepted: role and content", field=field)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidArgumentError(f"{field}.role is {role!r}; accepted: {', '.join(ROLES)}", field=f"{field}.role")
    if not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
        raise InvalidArgumentError(f"{field}.content is {content!r:.80}; accepted: a string", field=f"{field}.content")
    plain = _plain(message)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of JSON values alone, so that no object with methods reaches the template."""
    if depth > 32:
        raise InvalidArgumentError("messages are nested more than 32 deep", field="messages")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    raise InvalidArgumentError(f"a {type(value).__name__} in messages; accepted: JSON values", field="messages")
