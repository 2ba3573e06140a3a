"""How many tokens one slice of a job may hold."""

from __future__ import annotations

from collections.abc import Callable

SMOOTHING = 0.5
FIRST_SLICE_TOKENS = 128
MIN_FORWARD_TOKENS = 256
"""A long text is not cut finer than this: smaller forwards would waste more than they spare serving."""

IDLE_SLICE_SECONDS = 0.5
"""Target of a slice while nobody is being served: large batches pay, and a request that arrives waits for one slice."""


class SliceBudget:
    """Tokens that a forward gets through within the slice's target time, as measured on the forwards before.

    It is kept from job to job of a kind (LoadedModel.slice_budget). A job asks for ``tokens`` before each forward and
    reports the forward's duration after it. The very first forward is small; the budget at most doubles from one to the
    next, so a single reading that was too good cannot make a slice that stalls serving.

    Args:
        target_seconds: how long a slice should take while requests are running.
        max_tokens: never more than this.
        is_serving: whether requests are running now or were a moment ago.
    """

    def __init__(self, target_seconds: float, max_tokens: int, is_serving: Callable[[], bool] = lambda: True) -> None:
        self._target_seconds = target_seconds
        self._max_tokens = max_tokens
        self._is_serving = is_serving
        self._seconds_per_token: float | None = None
        self._ceiling = min(FIRST_SLICE_TOKENS, max_tokens)

    @property
    def tokens(self) -> int:
        """Of the next slice."""
        rate = self._seconds_per_token
        if not rate:
            return self._ceiling
        target = self._target_seconds if self._is_serving() else max(self._target_seconds, IDLE_SLICE_SECONDS)
        return max(1, min(int(target / rate), self._ceiling))

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward over a text that cannot be split otherwise."""
        return max(self.tokens, min(MIN_FORWARD_TOKENS, self._max_tokens))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Takes in how long a forward of ``num_tokens`` took."""
        rate = seconds / num_tokens
        if self._seconds_per_token is not None:
            rate = SMOOTHING * rate + (1 - SMOOTHING) * self._seconds_per_token
        self._seconds_per_token = rate
        self._ceiling = min(2 * max(self._ceiling, num_tokens), self._max_tokens)
