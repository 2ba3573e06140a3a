"""From what a caller sends to token ids: limits first, then templates and tokenising, off the event loop when large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.tokenizer import Tokenizer
from engine.tokenizer.tokenizer import MAX_TEXT_CHARS
from server.config import ServerConfig
from server.errors import over_limit
from whet.v1 import common_pb2

T = TypeVar("T")
_INLINE_CHARS = 2048  # tokenising this much takes less than handing it to a thread
_INLINE_IDS = 1 << 16  # of ids that come as numbers
_CHARS_PER_TOKEN = 8
# Its own, so that long texts wait for one another, not files and other work for them.
_threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")


@dataclass(frozen=True, slots=True)
class ResolvedPrompt:
    """Attributes: text: as given, or as the chat template rendered it; None for token ids."""

    token_ids: list[int]
    text: str | None


async def in_thread_if(large: bool, function: Callable[[], T]) -> T:
    """Calls ``function`` here, or in one of a few threads where it would hold up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, function) if large else function()


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
        ids = await take_token_ids(prompt.token_ids.ids, vocab_size, config.max_prompt_tokens, f"{field}.token_ids")
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
        return ResolvedPrompt(*tokenizer.encode_chat(messages, opens, max_tokens=config.max_prompt_tokens))

    try:
        # A template is a program of the model's author: it always runs off the event loop.
        resolved = await in_thread_if(True, render)
    except InvalidArgumentError as error:
        raise _within(error, field) from None
    _check_count(resolved.token_ids, config.max_prompt_tokens, field)
    return resolved


def max_chars_of(max_tokens: int) -> int:
    """Characters of a text of which ``max_tokens`` tokens are accepted, where there is no limit of their own."""
    return min(_CHARS_PER_TOKEN * max_tokens, MAX_TEXT_CHARS)


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
        ids = await in_thread_if(
            len(text) > _INLINE_CHARS, lambda: tokenizer.encode(text, add_special_tokens, max_tokens=max_tokens)
        )
    except InvalidArgumentError as error:
        raise type(error)(f"{field}: {error.message}", field=field, reason=error.reason) from None
    _check_count(ids, max_tokens, field)
    return ids


async def encode_start(text: str, tokenizer: Tokenizer, num_tokens: int, field: str) -> list[int]:
    """The first ids of a text, ``num_tokens`` or all there are, whatever its length; at least one.

    Raises:
        InvalidArgumentError: it is empty or no Unicode text.
    """
    if not text:
        raise InvalidArgumentError(f"{field} is empty; accepted: at least one character", field=field)
    try:
        ids = await in_thread_if(len(text) > _INLINE_CHARS, lambda: tokenizer.encode_start(text, num_tokens))
    except InvalidArgumentError as error:
        raise type(error)(f"{field}: {error.message}", field=field, reason=error.reason) from None
    _check_count(ids, num_tokens, field)
    return ids


async def take_token_ids(ids: Sequence[int], vocab_size: int, max_tokens: int, field: str) -> list[int]:
    """``read_token_ids``, off the event loop where they are many."""
    return await in_thread_if(len(ids) > _INLINE_IDS, lambda: read_token_ids(ids, vocab_size, max_tokens, field))


def read_token_ids(ids: Sequence[int], vocab_size: int, max_tokens: int, field: str) -> list[int]:
    """Token ids from the wire, counted before they are copied.

    Raises:
        InvalidArgumentError: there are none or too many, or one is not of the vocabulary.
    """
    _check_count(ids, max_tokens, field)
    taken = list(ids)
    check_token_ids(taken, vocab_size, max_tokens, field)
    return taken


def check_token_ids(ids: list[int], vocab_size: int, max_tokens: int, field: str) -> None:
    """Raises InvalidArgumentError unless there are 1 to ``max_tokens`` ids, all of the vocabulary."""
    _check_count(ids, max_tokens, field)
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise InvalidArgumentError(
            f"{field} holds {low if low < 0 else high}; accepted: ids in [0, {vocab_size})", field=field
        )


def _check_count(ids: Sequence[int], max_tokens: int, field: str) -> None:
    if not ids:
        raise InvalidArgumentError(f"{field} has no tokens; accepted: at least one", field=field)
    if len(ids) > max_tokens:
        raise OutOfRangeError(f"{field} has {len(ids)} tokens; accepted: at most {max_tokens}", field=field)


def _within(error: InvalidArgumentError, field: str) -> InvalidArgumentError:
    inner = f"{field}.{error.field}" if error.field else field
    return type(error)(f"{field}: {error.message}", field=inner, reason=error.reason)
