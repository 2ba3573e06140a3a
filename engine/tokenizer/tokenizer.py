"""One model's tokenizer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import processors

from engine.errors import FailedPreconditionError, FormatError, InvalidArgumentError, OutOfRangeError
from engine.tokenizer.hf_files import FILES, TokenizerParts, read_directory
from engine.tokenizer.token_bytes import TokenDecoder, token_decoder

if TYPE_CHECKING:
    from engine.tokenizer.chat_template import ChatTemplate

MAX_TEXT_CHARS = 1 << 25
"""Longest text that is encoded in one call."""

_SHORT_CHARS = 1024
_COUNTED_CHARS = 1 << 16
"""Characters of a piece when only counting. A cut changes the tokens beside it, never their number by much."""
_CUT_TOKENS = 128
"""By how much tokens of a piece may exceed those of the same place in the whole text: WordPiece makes one unknown token
of a word that it does not split, and up to 100 of a part of it."""


class Tokenizer:
    """Text to ids, ids to bytes and text, and chat messages to prompts.

    Args:
        parts: what a file held.
        path: the directory or .gguf file it came from.

    Attributes:
        vocab_size: one more than the largest id that has a token; a model's embedding may have more rows.
        special_ids: ids of special tokens.
        special_tokens: "bos_token" and the like to their text.
    """

    def __init__(self, parts: TokenizerParts, path: Path) -> None:
        self.path = path
        self.special_tokens: Mapping[str, str] = parts.special_tokens
        self._config = parts.config
        self._backend: tokenizers.Tokenizer = parts.backend
        # A tokenizer.json may say to truncate or pad; the service never does so behind the caller's back.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._mark_special()
        self._set_added_at_the_ends(parts)
        self._decoder: TokenDecoder = token_decoder(_description(self._backend.decoder), str(path))
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        named = (self._named_id(name) for name in ("bos_token", "cls_token"))
        self._beginnings = frozenset(token_id for token_id in named if token_id is not None)
        self._cache: dict[tuple[int, bool], bytes] = {}
        self._template_source = parts.chat_template
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()

    @classmethod
    def from_path(cls, path: Path | str) -> Tokenizer:
        """Reads a tokenizer.

        Args:
            path: a Hugging Face directory (or its tokenizer.json), or a .gguf file.

        Raises:
            FormatError: naming the file and the fault.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            from engine.tokenizer.gguf_vocab import read_gguf

            return cls(read_gguf(path), path)
        if path.is_file():
            path = path.parent
        if not path.is_dir():
            raise FormatError(f"{path}: no such file or directory; accepted: a Hugging Face directory or a .gguf file")
        return cls(read_directory(path), path)

    @property
    def bos_token_id(self) -> int | None:
        """Beginning of sequence."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """End of sequence; a model may have more of them, see ModelConfig.eos_token_ids."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Padding."""
        return self._named_id("pad_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether apply_chat_template can work."""
        return self._template_source is not None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The text of an id in the vocabulary, or None."""
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return token

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """The ids of a text. Special tokens that are spelled out in it become their ids.

        Args:
            add_special_tokens: put before and after what the model was trained with (beginning of sequence, [CLS] …).
            max_tokens: accept no more ids than this; a text that has far more is refused without reading all of it.

        Raises:
            InvalidArgumentError: the text has lone surrogates.
            OutOfRangeError: too long.
        """
        if len(text) > MAX_TEXT_CHARS:
            raise OutOfRangeError(f"the text has {len(text)} characters; accepted: at most {MAX_TEXT_CHARS}")
        _check_unicode(text)
        if max_tokens is not None:
            self._refuse_far_longer(text, max_tokens)
        ids = self._encode(text, add_special_tokens)
        if max_tokens is not None and len(ids) > max_tokens:
            raise OutOfRangeError(f"the text has {len(ids)} tokens; accepted: at most {max_tokens}")
        return ids

    def encode_start(self, text: str, num_tokens: int) -> list[int]:
        """The first ``num_tokens`` ids of a text (all, if it has fewer), reading no more of it than that takes.

        Raises:
            InvalidArgumentError: what was read of the text has lone surrogates.
            OutOfRangeError: more than MAX_TEXT_CHARS of it would have to be read.
        """
        num_chars = max(_COUNTED_CHARS, 4 * num_tokens)
        while num_chars < len(text):
            ids = self.encode(text[:num_chars])
            if len(ids) >= num_tokens + _CUT_TOKENS:
                return ids[:num_tokens]
            num_chars *= 2
        return self.encode(text)[:num_tokens]

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's ways to encode, the batched ones alone let other threads run meanwhile, and the fast one
        # leaves out the offsets, which take half of the time. Handing over costs 0.1 ms.
        if len(text) >= _SHORT_CHARS:
            encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        else:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _refuse_far_longer(self, text: str, max_tokens: int) -> None:
        """Counts tokens piece by piece, and raises OutOfRangeError as soon as the text must have too many."""
        if len(text) <= max(max_tokens, _COUNTED_CHARS):
            return
        count = 0
        for start in range(0, len(text), _COUNTED_CHARS):
            count += max(0, len(self._encode(text[start : start + _COUNTED_CHARS], False)) - _CUT_TOKENS)
            if count > max_tokens:
                raise OutOfRangeError(f"the text has more than {count} tokens; accepted: at most {max_tokens}")

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; U+FFFD for bytes that are not UTF-8. See token_bytes for where other libraries differ.

        Ids that a model's padded embedding has and the vocabulary has not decode to nothing.

        Raises:
            InvalidArgumentError: a negative id.
        """
        return self.decode_bytes(token_ids, skip_special_tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """The exact bytes of ids.

        Raises:
            InvalidArgumentError: a negative id.
        """
        stream = self.byte_stream(skip_special_tokens)
        return b"".join([stream(token_id) for token_id in token_ids])

    def byte_stream(self, skip_special_tokens: bool) -> Callable[[int], bytes]:
        """A function that is called with one id after the other and gives the bytes that each adds to the text."""
        first = True
        strip = 0

        def step(token_id: int) -> bytes:
            nonlocal first, strip
            if token_id < 0:
                raise InvalidArgumentError(f"token id {token_id}; accepted: ids of at least 0", field="token_ids")
            if skip_special_tokens and token_id in self.special_ids:
                if first and token_id in self._beginnings:
                    strip = self._decoder.strip_leading
                return b""
            data = self._token(token_id, first)
            if data:
                spaces = len(data) - len(data.lstrip(b" "))
                data = data[min(strip, spaces) :]
                first, strip = False, 0
            return data

        return step

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: {"role", "content"}, and what else the template knows.
            add_generation_prompt: end with what opens the assistant's turn.
            tools: JSON schemas of functions, for templates that know them.

        Raises:
            InvalidArgumentError: malformed messages, or messages that the template refuses.
            FailedPreconditionError: the model has no chat template.
            FormatError: the template is faulty or exceeds its limits.
        """
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, str):
                _check_unicode(content, "messages")
        with self._template_lock:  # a rendering has its budget to itself
            if self._template is None:
                if self._template_source is None:
                    raise FailedPreconditionError(
                        "the model has no chat template; accepted: a prompt as text or token ids",
                        field="messages",
                        reason="NO_CHAT_TEMPLATE",
                    )
                from engine.tokenizer.chat_template import ChatTemplate  # the engine runs without Jinja

                self._template = ChatTemplate(self._template_source, str(self.path))
            return self._template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                special_tokens=self.special_tokens,
            )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        max_tokens: int | None = None,
    ) -> tuple[list[int], str]:
        """The ids of a conversation, and its text. The template writes the special tokens, so none are added: never two
        of them."""
        text = self.apply_chat_template(messages, add_generation_prompt, tools)
        return self.encode(text, add_special_tokens=False, max_tokens=max_tokens), text

    def save(self, directory: Path) -> None:
        """Writes the tokenizer so that transformers.AutoTokenizer and from_path read it back.

        A Hugging Face source is copied file by file; a GGUF source becomes tokenizer.json, tokenizer_config.json and
        chat_template.jinja.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            for name in FILES:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, directory / name)
            return
        self._backend.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {**self._config, **self.special_tokens}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self._template_source is not None:
            (directory / "chat_template.jinja").write_text(self._template_source, encoding="utf-8")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def _token(self, token_id: int, first: bool) -> bytes:
        key = (token_id, first)
        data = self._cache.get(key)
        if data is None:
            data = self._cache[key] = self._compute(token_id, first)
        return data

    def _compute(self, token_id: int, first: bool) -> bytes:
        if self._decoder.kind == "byte_level" and (added := self._added.get(token_id)) is not None:
            return added  # spelled as it is, not in the byte alphabet
        token = self.id_to_token(token_id)
        return b"" if token is None else self._decoder.decode(token, first=first)

    def _mark_special(self) -> None:
        """Named special tokens are special even where tokenizer.json does not list them as such."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        missing = [t for t in self.special_tokens.values() if t not in known and self.token_to_id(t) is not None]
        self._backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in missing])

    def _set_added_at_the_ends(self, parts: TokenizerParts) -> None:
        """Follows add_bos_token and add_eos_token where they are given. Each speaks of its own token alone: Qwen3's
        embedding models say false to the first, and end texts with a token that is not their eos_token."""
        if parts.add_bos is None and parts.add_eos is None:
            return
        before, after = _template_ends(self._backend)
        bos, eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        if parts.add_bos is not None:
            before = [*([bos] if parts.add_bos and bos else []), *(t for t in before if t != bos)]
        if parts.add_eos is not None:
            after = [*(t for t in after if t != eos), *([eos] if parts.add_eos and eos else [])]
        used = {t: i for t in (*before, *after) if (i := self.token_to_id(t)) is not None}
        single = [*(f"{t}:0" for t in before if t in used), "$A:0", *(f"{t}:0" for t in after if t in used)]
        self._backend.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=list(used.items())
        )


def _description(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json has it, by what pickling takes: that of the whole tokenizer would write
    and read its vocabulary."""
    return None if part is None else json.loads(part.__getstate__())


def _template_ends(backend: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens that the template in tokenizer.json, if it has one, puts before and after a text."""
    processor = _description(backend.post_processor) or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            pieces = part["single"]
            text = next((i for i, piece in enumerate(pieces) if "Sequence" in piece), len(pieces))
            before, after = pieces[:text], pieces[text + 1 :]
            return [p["SpecialToken"]["id"] for p in before], [p["SpecialToken"]["id"] for p in after]
    return [], []


def _check_unicode(text: str, field: str = "text") -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"the text has the lone surrogate U+{ord(text[error.start]):04X} at {error.start}; accepted: Unicode text",
            field=field,
        ) from error
