"""The front end's half of a completion: tokens become text, and stop strings end it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.request import FinishReason, RequestOutput, Timings, TokenLogprob
from engine.tokenizer import IncrementalDetokenizer, StopStringMatcher, Tokenizer

MAX_COALESCED_TOKENS = 256
"""Of one message: with log-probabilities of alternatives, such a one stays below the 4 MiB that clients accept."""


def coalesced(outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
    """The outputs of one request that have gathered while its caller was slower than the engine, with those of each
    completion in one, up to MAX_COALESCED_TOKENS. What one output says is what the several would have."""
    merged: list[RequestOutput] = []
    latest: dict[int, RequestOutput] = {}
    for output in outputs:
        before = latest.get(output.index)
        if (
            before is None
            or output.finish_reason in ("error", "cancelled")
            or len(before.token_ids) + len(output.token_ids) > MAX_COALESCED_TOKENS
        ):
            merged.append(output)
            latest[output.index] = output
            continue
        before.token_ids = before.token_ids + output.token_ids
        if output.logprobs is not None:
            before.logprobs = [*(before.logprobs or ()), *output.logprobs]
        before.finish_reason, before.stop_token_id = output.finish_reason, output.stop_token_id
        before.num_completion_tokens, before.timings = output.num_completion_tokens, output.timings
    return merged


@dataclass(slots=True)
class Delta:
    """What one output adds to a completion. Attributes: logprobs: one per token, if asked for."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Completion:
    """One completion in the making.

    A stop string counts from the token after ``min_tokens`` on, as end-of-sequence tokens do.

    Attributes:
        num_tokens: taken so far; what the engine made after a stop string does not count.
        finish_reason: None while it goes on.
        stop_string, stop_token_id: what ended it, if one did.
        timings: None until the engine has ended it, too.
        num_timed_tokens: how many tokens the timings speak of: the engine may have gone on for some.
    """

    index: int
    tokenizer: Tokenizer
    stop: Sequence[str]
    min_tokens: int
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    timings: Timings | None = None
    num_timed_tokens: int = 0
    _detokenizer: IncrementalDetokenizer = field(init=False)
    _matcher: StopStringMatcher = field(init=False)

    def __post_init__(self) -> None:
        self._detokenizer = IncrementalDetokenizer(self.tokenizer)
        self._matcher = StopStringMatcher(self.stop)

    def push(self, output: RequestOutput) -> Delta:
        """Takes the engine's output; after the end it adds nothing but the timings."""
        if output.finish_reason is not None:
            self.timings, self.num_timed_tokens = output.timings, output.num_completion_tokens
        if self.finish_reason is not None:
            return Delta(self.index, "", [], None, None)
        pieces: list[str] = []
        taken = 0
        for token_id in output.token_ids:
            taken += 1
            self.num_tokens += 1
            if output.stop_token_id is not None and taken == len(output.token_ids):
                break  # the stop token itself is no text
            pieces.append(self._add(self._detokenizer.append((token_id,))))
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and output.finish_reason is not None:
            pieces.append(self._add(self._detokenizer.finish()))
            if self.finish_reason is None:
                pieces.append(self._matcher.flush())
                self.stop_token_id = output.stop_token_id
                self.finish_reason = output.finish_reason
        logprobs = output.logprobs[:taken] if output.logprobs is not None else None
        return Delta(self.index, "".join(pieces), output.token_ids[:taken], logprobs, self.finish_reason)

    def _add(self, text: str) -> str:
        if self.num_tokens <= self.min_tokens:
            return text
        shown, stopped, which = self._matcher.push(text)
        if stopped:
            self.finish_reason, self.stop_string = "stop", which
        return shown
