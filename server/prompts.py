"""From what a caller sends to token ids: limits first, then templates and tokenising, off the event loop when large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.tokenizer import Tokenizer
from server.config import ServerConfig
from server.errors import over_limit
from whet.v1 import common_pb2

T = TypeVar("T")
_INLINE_CHARS = 2048  # tokenising this much takes less than handing it to a thread


@dataclass(frozen=True, slots=True)
class ResolvedPrompt:
    """Attributes: text: as given, or as the chat template rendered it; None for token ids."""

    token_ids: list[int]
    text: str | None


async def in_thread_if(large: bool, function: Callable[[], T]) -> T:
    """Calls ``function`` here, or in a thread where it would hold up the event loop."""
    return await asyncio.to_thread(function) if large else function()


async def resolve_prompt(
    prompt: common_pb2.Prompt, tokenizer: Tokenizer, vocab_size: int, config: ServerConfig, field: str = "prompt"
) -> ResolvedPrompt:
    """Token ids of a prompt.

    Raises:
        InvalidArgumentError: it is empty, malformed or over a limit.
        FailedPreconditionError: a chat for a model without a template.
    """
    kind = prompt.WhichOneof("input")
    if kind == "text":
        return await _from_text(prompt, tokenizer, config, field)
    if kind == "chat":
        return await _from_chat(prompt.chat, tokenizer, config, f"{field}.chat")
    if kind == "token_ids":
        ids = list(prompt.token_ids.ids)
        check_token_ids(ids, vocab_size, config.max_prompt_tokens, f"{field}.token_ids")
        return ResolvedPrompt(ids, None)
    raise InvalidArgumentError(f"{field} is empty; accepted: text, token_ids or chat", field=field)


async def _from_text(
    prompt: common_pb2.Prompt, tokenizer: Tokenizer, config: ServerConfig, field: str
) -> ResolvedPrompt:
    text = prompt.text
    special = prompt.add_special_tokens if prompt.HasField("add_special_tokens") else True
    ids = await encode(text, tokenizer, config.max_prompt_chars, config.max_prompt_tokens, f"{field}.text", special)
    return ResolvedPrompt(ids, text)


async def _from_chat(chat: common_pb2.Chat, tokenizer: Tokenizer, config: ServerConfig, field: str) -> ResolvedPrompt:
    if len(chat.messages) > config.max_chat_messages:
        raise over_limit(f"{field}.messages", len(chat.messages), config.max_chat_messages, "messages")
    num_chars = sum(len(message.content) + len(message.role) for message in chat.messages)
    if num_chars > config.max_prompt_chars:
        raise over_limit(field, num_chars, config.max_prompt_chars, "characters")
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True

    def render() -> ResolvedPrompt:
        text = tokenizer.apply_chat_template(messages, opens)
        return ResolvedPrompt(tokenizer.encode(text, add_special_tokens=False), text)

    try:
        # A template is a program of the model's author: it always runs off the event loop.
        resolved = await in_thread_if(True, render)
    except InvalidArgumentError as error:
        raise _within(error, field) from None
    _check_count(resolved.token_ids, config.max_prompt_tokens, field)
    return resolved


async def encode(
    text: str, tokenizer: Tokenizer, max_chars: int, max_tokens: int, field: str, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text; at least one.

    Raises:
        InvalidArgumentError: it is empty, no Unicode text, or over a limit.
    """
    if not text:
        raise InvalidArgumentError(f"{field} is empty; accepted: at least one character", field=field)
    if len(text) > max_chars:
        raise over_limit(field, len(text), max_chars, "characters")
    try:
        ids = await in_thread_if(len(text) > _INLINE_CHARS, lambda: tokenizer.encode(text, add_special_tokens))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(error.message, field=field, reason=error.reason) from None
    _check_count(ids, max_tokens, field)
    return ids


def check_token_ids(ids: list[int], vocab_size: int, max_tokens: int, field: str) -> None:
    """Raises InvalidArgumentError unless there are 1 to ``max_tokens`` ids, all of the vocabulary."""
    _check_count(ids, max_tokens, field)
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise InvalidArgumentError(
            f"{field} holds {low if low < 0 else high}; accepted: ids in [0, {vocab_size})", field=field
        )


def _check_count(ids: list[int], max_tokens: int, field: str) -> None:
    if not ids:
        raise InvalidArgumentError(f"{field} has no tokens; accepted: at least one", field=field)
    if len(ids) > max_tokens:
        raise OutOfRangeError(f"{field} has {len(ids)} tokens; accepted: at most {max_tokens}", field=field)


def _within(error: InvalidArgumentError, field: str) -> InvalidArgumentError:
    inner = f"{field}.{error.field}" if error.field else field
    return type(error)(f"{field}: {error.message}", field=inner, reason=error.reason)
