"""Outputs of short decode steps leave together; nothing that somebody waits for is kept, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.request import FinishReason, RequestOutput
from server.workers.outgoing import OutputSender


class Wire:
    """What was sent, and a clock that the test moves."""

    def __init__(self, interval: float) -> None:
        self.now = 100.0
        self.sent: list[list[RequestOutput]] = []
        self.sender = OutputSender(self.sent.append, interval, clock=lambda: self.now)

    def step(self, *outputs: RequestOutput, only_decodes: bool = True, seconds: float = 0.25) -> int:
        """A step of so many seconds. Returns how many messages it sent."""
        self.now += seconds
        before = len(self.sent)
        self.sender.take(list(outputs), only_decodes=lambda: only_decodes)
        return len(self.sent) - before


def token(number: int, name: str = "a", finish: FinishReason | None = None) -> RequestOutput:
    """The output that brings the number-th token of a request."""
    return RequestOutput(request_id=name, token_ids=[number], num_completion_tokens=number, finish_reason=finish)


def test_tokens_of_short_steps_leave_together_in_their_order() -> None:
    wire = Wire(interval=1.0)
    sent = [wire.step(token(number)) for number in range(1, 10)]
    assert sent == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [[o.token_ids for o in message] for message in wire.sent] == [
        [[1]],
        [[2], [3], [4], [5]],
        [[6], [7], [8], [9]],
    ]


def test_steps_longer_than_the_interval_have_a_message_each() -> None:
    wire = Wire(interval=0.2)
    assert [wire.step(token(number)) for number in range(1, 5)] == [1, 1, 1, 1]


def test_without_an_interval_each_step_has_its_message() -> None:
    wire = Wire(interval=0.0)
    assert [wire.step(token(number), seconds=0.0) for number in range(1, 5)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "news",
    [
        pytest.param(lambda: token(1, "b"), id="a first token"),
        pytest.param(lambda: token(7, "b", "length"), id="an end"),
        pytest.param(lambda: RequestOutput(request_id="b", finish_reason="error"), id="an error"),
        pytest.param(lambda: RequestOutput(request_id="b"), id="a chunk of a prompt"),
    ],
)
def test_what_somebody_waits_for_takes_along_all_that_was_kept(news: Callable[[], RequestOutput]) -> None:
    wire = Wire(interval=10.0)
    assert [wire.step(token(1)), wire.step(token(2))] == [1, 0]
    arrived = news()
    assert wire.step(token(3), arrived) == 1
    told = [arrived] if arrived.token_ids or arrived.finish_reason else []
    assert wire.sent[-1] == [token(2), token(3), *told]


def test_nothing_is_kept_where_more_than_a_decode_step_comes_before_the_next_outputs() -> None:
    wire = Wire(interval=10.0)
    assert [wire.step(token(1)), wire.step(token(2)), wire.step(token(3), only_decodes=False)] == [1, 0, 1]


def test_what_is_kept_can_be_sent_at_once() -> None:
    wire = Wire(interval=10.0)
    wire.step(token(1))
    wire.step(token(2))
    wire.sender.flush()
    wire.sender.flush()
    assert wire.sent == [[token(1)], [token(2)]]
