"""Which tokens a sequence has seen, kept as it grows, for the penalties. Free of torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class TokenCounts:
    """Distinct tokens of prompt and completion.

    Kept in flat arrays, so that a step copies them to a tensor without a Python loop over what was seen.

    Attributes:
        tokens: int64, each distinct token once, in order of first appearance.
        counts: int64, how often each occurs in the completion; 0 for those of the prompt alone.
    """

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.tokens = array("q", dict.fromkeys(prompt_token_ids))
        self.counts = array("q", bytes(8 * len(self.tokens)))
        self._place = {token: place for place, token in enumerate(self.tokens)}

    def add(self, token: int) -> None:
        """One more token of the completion."""
        place = self._place.get(token)
        if place is None:
            self._place[token] = len(self.tokens)
            self.tokens.append(token)
            self.counts.append(1)
        else:
            self.counts[place] += 1
