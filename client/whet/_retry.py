"""When a failed call is tried again, and after how long (AIP-194)."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from whet.errors import OverloadedError, UnavailableError, WhetError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How calls that are safe to repeat are repeated.

    UNAVAILABLE is retried with exponential backoff; RESOURCE_EXHAUSTED after the delay that the server names, and not
    at all if it names none. Nothing else is, and no stream after its first message.

    Attributes:
        max_attempts: calls in all; 1 never retries.
        initial_backoff_seconds: before the second attempt.
        backoff_multiplier: from each wait to the next.
        max_backoff_seconds: the longest wait.
        jitter: each wait is varied by up to this fraction.
    """

    max_attempts: int = 6
    initial_backoff_seconds: float = 0.1
    backoff_multiplier: float = 1.5
    max_backoff_seconds: float = 5.0
    jitter: float = 0.2

    def delay(self, error: WhetError, attempt: int) -> float | None:
        """Seconds to wait after the failed ``attempt`` (from 1); None: do not repeat the call."""
        if attempt >= self.max_attempts:
            return None
        if isinstance(error, UnavailableError):
            backoff = self.initial_backoff_seconds * self.backoff_multiplier ** (attempt - 1)
            return min(backoff, self.max_backoff_seconds) * (1.0 + random.uniform(-self.jitter, self.jitter))
        if isinstance(error, OverloadedError) and error.retry_after is not None:
            # Never before the server's own time; callers that were refused together should not come back together.
            return error.retry_after * (1.0 + random.uniform(0.0, self.jitter))
        return None


DEFAULT_RETRY = RetryPolicy()
NO_RETRY = RetryPolicy(max_attempts=1)


class Attempts:
    """The attempts of one call, all under one deadline.

    Args:
        timeout: seconds for all of them together; infinity: no deadline.
    """

    def __init__(self, policy: RetryPolicy, timeout: float) -> None:
        self._policy = policy
        self._deadline = time.monotonic() + timeout
        self._failed = 0

    def remaining(self) -> float | None:
        """Seconds that are left, as gRPC takes them: None without a deadline."""
        return None if math.isinf(self._deadline) else max(0.0, self._deadline - time.monotonic())

    def delay_after(self, error: WhetError) -> float | None:
        """Counts a failed attempt. Returns the seconds to wait before the next; None: there is none."""
        self._failed += 1
        delay = self._policy.delay(error, self._failed)
        if delay is None or time.monotonic() + delay >= self._deadline:
            return None
        return delay
