"""Ends a text at a stop string that may be spread over chunks."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InvalidArgumentError


class StopStringMatcher:
    """Finds the first stop string in a growing text, and never lets a part of it through.

    The text ends as soon as a stop string is complete; of those that complete with the same character, the longest
    counts. So the outcome does not depend on how the text was cut into chunks. What could be the beginning of a stop
    string is held back until it turns out not to be.

    Args:
        stop: strings that end the text; they are not part of it.

    Raises:
        InvalidArgumentError: an empty stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not s for s in stop):
            raise InvalidArgumentError("a stop string is empty; accepted: at least one character", field="stop")
        self._stop = tuple(dict.fromkeys(stop))
        self._longest = max((len(s) for s in stop), default=0)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool, str | None]:
        """Adds text.

        Returns: what may be shown now, whether the text has ended, and, once, the stop string that ended it. After
            the end nothing is shown any more.
        """
        if self._stopped:
            return "", True, None
        held = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            _, at, which = min(found)
            self._stopped, self._held = True, ""
            return held[:at], True, which
        cut = self._first_partial(held)
        self._held = held[cut:]
        return held[:cut], False, None

    def flush(self) -> str:
        """What is still held back, when the text is over: the beginning of a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _first_partial(self, text: str) -> int:
        """Where the longest suffix begins that a stop string begins with; the length of the text if there is none."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(s.startswith(text[at:]) for s in self._stop):
                return at
        return len(text)
