"""Token ids to text as they come, in whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns a completion into text while it is being made.

    The concatenation of what append and finish return equals ``tokenizer.decode(ids)`` of the whole completion,
    whatever the chunking: both run the same bytes through the same decoder. A character whose bytes are spread over
    tokens is held back until it is whole; bytes that can never become one are U+FFFD, at once.

    Args:
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._bytes = tokenizer.byte_stream(skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that the next tokens complete; may be empty.

        Raises:
            InvalidArgumentError: a negative id.
        """
        return self._decoder.decode(b"".join([self._bytes(token) for token in token_ids]))

    def finish(self) -> str:
        """The rest: U+FFFD if the completion ended within a character, or else nothing."""
        return self._decoder.decode(b"", final=True)
