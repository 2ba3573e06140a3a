"""plan_windows: every token scored once, with the context that the stride promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.evaluation.scoring import Window, plan_windows, take_windows, validate_text

SIZES = st.integers(2, 60).flatmap(lambda w: st.tuples(st.integers(2, 400), st.just(w), st.integers(1, w)))


@given(SIZES)
def test_every_token_but_the_first_is_scored_once_in_order(sizes: tuple[int, int, int]) -> None:
    """For all lengths, windows and strides, the scored ranges join to [1, num_tokens)."""
    num_tokens, window, stride = sizes
    scored = [i for w in plan_windows(num_tokens, window, stride) for i in range(w.first_scored, w.end)]
    assert scored == list(range(1, num_tokens))


@given(SIZES)
def test_context_of_scored_tokens(sizes: tuple[int, int, int]) -> None:
    """A scored token has a predecessor in its window, and window - stride of them once the text is that long."""
    num_tokens, window, stride = sizes
    for w in plan_windows(num_tokens, window, stride):
        assert w.num_tokens <= window
        assert w.num_scored >= 1
        assert w.first_scored - w.start >= 1
        assert w.first_scored - w.start >= min(w.first_scored, window - stride)


@given(SIZES)
def test_windows_are_those_of_the_documented_loop(sizes: tuple[int, int, int]) -> None:
    """Begin, end and number of new tokens equal the loop in transformers' documentation while stride < window."""
    num_tokens, window, stride = sizes
    expected, previous_end = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        # The shift of labels leaves a window's own first token unscored.
        expected.append(Window(begin, end, max(previous_end, begin + 1)))
        previous_end = end
        if end == num_tokens:
            break
    planned = list(plan_windows(num_tokens, window, stride))
    if stride < window:
        assert planned == expected
    else:
        assert len(planned) >= len(expected)


def test_examples() -> None:
    """A short text, an exact fit, a partial last window, and stride = window."""
    assert list(plan_windows(2, 512, 256)) == [Window(0, 2, 1)]
    assert list(plan_windows(8, 8, 4)) == [Window(0, 8, 1)]
    assert list(plan_windows(13, 8, 4)) == [Window(0, 8, 1), Window(4, 12, 8), Window(8, 13, 12)]
    assert list(plan_windows(10, 4, 4)) == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]


@given(SIZES, st.integers(1, 300))
def test_packs_hold_all_windows_in_order(sizes: tuple[int, int, int], max_tokens: int) -> None:
    """Packs follow each other without a gap; only a window that exceeds the limit alone may exceed it."""
    windows = list(plan_windows(*sizes))
    packed: list[Window] = []
    while len(packed) < len(windows):
        pack = take_windows(windows, len(packed), max_tokens)
        assert pack
        assert len(pack) == 1 or sum(w.num_tokens for w in pack) <= max_tokens
        packed.extend(pack)
    assert packed == windows


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride", "field"),
    [
        (1, 4, 2, "token_ids"),
        (0, 4, 2, "token_ids"),
        (9, 1, 1, "window"),
        (9, -4, 1, "window"),
        (9, 4, 0, "stride"),
        (9, 4, 5, "stride"),
    ],
)
def test_bad_sizes_are_named(num_tokens: int, window: int, stride: int, field: str) -> None:
    with pytest.raises(InvalidArgumentError, match="accepted") as raised:
        plan_windows(num_tokens, window, stride)
    assert raised.value.field == field


def test_window_beyond_the_context_and_foreign_tokens_are_named() -> None:
    validate_text([0, 9], 16, 16, 10)
    with pytest.raises(OutOfRangeError, match="window is 17; accepted: at most 16"):
        validate_text([0, 9], 17, 16, 10)
    for token in (-1, 10, 1 << 70):
        with pytest.raises(InvalidArgumentError, match=rf"token_ids\[1\] is {token}"):
            validate_text([0, token], 16, 16, 10)
