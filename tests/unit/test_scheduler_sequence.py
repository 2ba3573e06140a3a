"""One completion: when it ends, what it counts, what it measures."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core.sequence import Sequence, new_sequences
from engine.errors import OutOfRangeError
from engine.request import Request, SamplingParams


def make(
    prompt: list[int], *, n: int = 1, eos: tuple[int, ...] = (0,), limit: int = 100, **params: Any
) -> list[Sequence]:
    request = Request(request_id="r", model="m", prompt_token_ids=prompt, n=n, sampling=SamplingParams(**params))
    return new_sequences(request, eos_token_ids=eos, max_model_len=limit, arrival_time=10.0)


def feed(sequence: Sequence, tokens: list[int]) -> int:
    """Appends tokens until one ends it; how many it took."""
    for count, token in enumerate(tokens, 1):
        sequence.append(token, 0.0)
        if sequence.check_stop():
            return count
    return len(tokens)


@pytest.mark.parametrize(
    ("params", "tokens", "count", "reason", "stop_token"),
    [
        ({}, [5, 0, 5], 2, "stop", 0),
        ({"ignore_eos": True}, [5, 0, 5], 3, None, None),
        ({"stop_token_ids": [9]}, [5, 9, 5], 2, "stop", 9),
        ({"ignore_eos": True, "stop_token_ids": [9]}, [0, 9], 2, "stop", 9),
        ({"max_tokens": 2}, [5, 5, 5], 2, "length", None),
        ({"max_tokens": 2}, [5, 0], 2, "stop", 0),
        ({"min_tokens": 1}, [5, 0], 2, "stop", 0),
        ({"min_tokens": 2, "max_tokens": 9}, [5, 0, 0], 3, "stop", 0),
    ],
)
def test_what_ends_a_completion(
    params: dict[str, Any], tokens: list[int], count: int, reason: str | None, stop_token: int | None
) -> None:
    """End-of-sequence, stop tokens, min_tokens and max_tokens, and which of them is named."""
    (sequence,) = make([1, 2], **params)
    assert feed(sequence, tokens) == count
    assert (sequence.finish_reason, sequence.stop_token_id) == (reason, stop_token)


def test_the_context_ends_a_completion_without_max_tokens() -> None:
    (sequence,) = make([1, 2, 3], limit=5)
    assert feed(sequence, [5] * 9) == 2
    assert sequence.finish_reason == "length"


def test_a_prompt_must_leave_room_for_a_token() -> None:
    with pytest.raises(OutOfRangeError, match="prompt has 5 tokens; accepted: at most 4"):
        make([1] * 5, limit=5)


def test_completions_of_one_request_draw_apart_and_repeat_with_a_seed() -> None:
    keys = [s.sampling_key for s in make([1], n=3, seed=4)]
    assert len(set(keys)) == 3
    assert keys == [s.sampling_key for s in make([2], n=3, seed=4)]
    unseeded = [s.sampling_key for s in make([1], n=2) + make([1], n=2)]
    assert len(set(unseeded)) == 4


def test_token_counts_follow_the_completion() -> None:
    """Kept only for penalties: distinct tokens of the prompt with 0, of the completion with their number."""
    (plain,) = make([1])
    assert plain.token_counts is None
    (sequence,) = make([3, 1, 3], presence_penalty=0.5)
    feed(sequence, [1, 8, 1])
    assert sequence.token_counts is not None
    assert dict(zip(sequence.token_counts.tokens, sequence.token_counts.counts, strict=True)) == {3: 0, 1: 2, 8: 1}


def test_timings_are_differences_of_what_happened() -> None:
    (sequence,) = make([1])
    sequence.finish_time = 19.0
    assert sequence.timings().time_to_first_token_seconds is None
    assert sequence.timings().queue_seconds == 9.0
    sequence.first_scheduled_time = 11.0
    sequence.append(5, 13.0)
    sequence.append(5, 18.0)
    timings = sequence.timings()
    assert (timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds) == (1.0, 2.0, 5.0)
    assert (timings.time_to_first_token_seconds, timings.total_seconds) == (3.0, 9.0)
