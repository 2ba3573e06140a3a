"""What bytes a token stands for.

``tokenizers`` decodes lists of tokens to text and puts U+FFFD where the bytes are not whole characters. A stream needs
the bytes themselves. This reads the decoder of a tokenizer.json and answers per token, which is possible because every
decoder that language models use works token by token but for the first.

Differences from ``tokenizers.Tokenizer.decode``, on purpose:

- The space that SentencePiece puts before a text is taken off where the beginning of the text can be seen, which is
  after a beginning-of-sequence token. A completion is a continuation and keeps its leading space.
- Byte-fallback tokens that are not valid UTF-8 give U+FFFD by the rule of Python's decoder (one for each maximal
  prefix of a character), as byte-level tokenizers do, and not one for each byte of the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import FormatError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What the WordPiece decoder's clean-up does within one token, after the space was put before it.
_CLEANUP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level BPE: printable Latin-1 stands for itself, the rest for code points from 256.

    Source: Radford et al. 2019 (GPT-2), ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


@dataclass(frozen=True, slots=True)
class TokenDecoder:
    """The decoder of one tokenizer.

    Attributes:
        kind: "byte_level", "pieces" (SentencePiece and the like) or "words" (a space between tokens).
        replacements: "pieces": substrings to replace in a token, in order.
        byte_fallback: "pieces": "<0xE2>" is a byte.
        strip_leading: spaces to take off the beginning of a text.
        prefix: "words": mark of a token that continues the one before it; "" if there is none.
        cleanup: "words": no space before punctuation and English contractions.
    """

    kind: Literal["byte_level", "pieces", "words"]
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_leading: int = 0
    prefix: str = ""
    cleanup: bool = False

    def decode(self, token: str, *, first: bool) -> bytes:
        """The bytes of a token of the vocabulary (not of an added one).

        Args:
            first: no token that shows in the text precedes it.
        """
        if self.kind == "byte_level":
            values = [_ALPHABET.get(char) for char in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if self.kind == "words":
            return self._word(token, first=first).encode()
        if self.byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()

    def _word(self, token: str, *, first: bool) -> str:
        if not first:
            continues = self.prefix and token.startswith(self.prefix)
            token = token[len(self.prefix) :] if continues else f" {token}"
        if self.cleanup:
            for pattern in _CLEANUP:
                token = token.replace(pattern, pattern.strip() if pattern != " ' " else "'")
        return token


def token_decoder(spec: Mapping[str, Any] | None, source: str) -> TokenDecoder:
    """Reads the ``decoder`` of a tokenizer.json.

    Raises:
        FormatError: of a kind, or a combination of kinds, that cannot be decoded token by token.
    """
    if spec is None:
        return TokenDecoder(kind="words")
    steps = list(spec.get("decoders") or []) if spec.get("type") == "Sequence" else [spec]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenDecoder(kind="byte_level")
    if kinds == ["WordPiece"]:
        return TokenDecoder(kind="words", prefix=str(steps[0]["prefix"]), cleanup=bool(steps[0]["cleanup"]))
    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    strip = 0
    fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and not fused:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)} if not fused:
                replacements.append((mark, " "))
                if step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True):
                    strip = 1
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                strip = start
            case _:
                raise FormatError(
                    f"{source}: decoder step {step.get('type')!r} in {kinds}; accepted: ByteLevel, WordPiece, "
                    "Metaspace, or Replace, ByteFallback, Fuse and Strip of leading spaces, in this order"
                )
    return TokenDecoder(
        kind="pieces", replacements=tuple(replacements), byte_fallback=byte_fallback, strip_leading=strip
    )
