"""Stop strings: against a naive reference, whatever the chunking."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgumentError
from engine.tokenizer import StopStringMatcher


def reference(stop: list[str], text: str) -> tuple[str, str | None]:
    """Character by character: cut at the longest stop string that ends where the first one ends."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            which = max(matches, key=len)
            return text[: end - len(which)], which
    return text, None


STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(STOPS, st.lists(st.text(alphabet="abcd", max_size=4), max_size=12))
def test_equals_the_reference_whatever_the_chunks(stop: list[str], chunks: list[str]) -> None:
    """Same text, same stop string; nothing that belongs to it is ever shown, and nothing else is held back for long."""
    text = "".join(chunks)
    expected, which = reference(stop, text)
    matcher = StopStringMatcher(stop)
    shown, seen, ended_by = "", "", None
    for chunk in chunks:
        emit, stopped, found = matcher.push(chunk)
        shown += emit
        seen += chunk
        ended_by = ended_by or found
        assert expected.startswith(shown)
        assert stopped == (reference(stop, seen)[1] is not None)
        if not stopped:
            assert len(seen) - len(shown) < max(map(len, stop))
    shown += matcher.flush()
    assert (shown, ended_by) == (expected, which)


def test_held_back_text_comes_out_as_soon_as_it_can_be_no_stop_string() -> None:
    matcher = StopStringMatcher(["###END"])
    assert matcher.push("one ##") == ("one ", False, None)
    assert matcher.push("# two") == ("### two", False, None)
    assert matcher.push(" ###EN") == (" ", False, None)
    assert matcher.push("D three") == ("", True, "###END")
    assert matcher.push("more") == ("", True, None)
    assert matcher.flush() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    matcher = StopStringMatcher([])
    assert matcher.push("text") == ("text", False, None)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="empty"):
        StopStringMatcher(["a", ""])
