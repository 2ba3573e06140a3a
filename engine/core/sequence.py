"""One completion of a request, from arrival to its last token. Free of torch.

There is no prefill or decode phase: a sequence has tokens, some leading part of which is computed; computing the last
one gives the next.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from engine.errors import EngineError, OutOfRangeError
from engine.request import FinishReason, Request, SamplingParams, Timings, TokenLogprob
from engine.sampling.counts import TokenCounts
from engine.sampling.random import sampling_key

if TYPE_CHECKING:
    from engine.lora.adapter import Adapter


class SequenceStatus(Enum):
    """WAITING holds no blocks: it has yet to start, or was preempted. FINISHED never changes again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """State of one completion. Made by ``new_sequences``; the scheduler and the cache manager change it.

    Attributes:
        request: what was asked.
        index: which of the request's n completions.
        adapter: resolved at arrival, so that a request keeps its version when a newer one goes live; None: the base.
        token_ids: prompt, then completion.
        num_prompt_tokens: leading tokens that are the prompt.
        max_total_tokens: prompt and completion may not exceed this.
        ending_token_ids: any of them ends the completion.
        sampling_key: of its random draws (engine.sampling.random).
        token_counts: for penalties; None if the request has none.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        num_cached_tokens: prompt tokens that were found in the prefix cache when it first ran.
        block_table, prefix_root, block_hashes: see engine.cache.base.CachedSequence.
        leader: the sequence whose computed prompt this one waits to share: the first completion of its request, or one
            of another request with the same prompt; None if there is no such.
        arrival_number: order of arrival, given by the scheduler.
        num_preemptions: times that it lost its blocks.
        logprobs: of the completion's tokens that were not yet reported, if asked for.
        prompt_logprobs: of the prompt's leading tokens, as far as computed; the first is None. The first completion of
            a request alone collects them.
        finish_reason: None while it goes on.
        stop_token_id: the token that ended it, if one did.
        error: with finish_reason "error".
        arrival_time, first_scheduled_time, first_token_time, last_token_time, finish_time: time.monotonic() seconds;
            None if it has not come to that.
    """

    request: Request
    index: int
    adapter: Adapter | None
    token_ids: list[int]
    num_prompt_tokens: int
    max_total_tokens: int
    ending_token_ids: frozenset[int]
    sampling_key: bytes
    token_counts: TokenCounts | None
    arrival_time: float

    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prefix_root: bytes = b""
    block_hashes: list[bytes] = field(default_factory=list)
    leader: Sequence | None = None
    arrival_number: int = -1
    num_preemptions: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: EngineError | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finish_time: float | None = None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def adapter_version(self) -> int | None:
        """None for the base."""
        return None if self.adapter is None else self.adapter.version

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the completion so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 for a sequence that has caught up: its last token."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def collects_prompt_logprobs(self) -> bool:
        """Whether logits at prompt positions are still wanted. Such a sequence computes its whole prompt itself."""
        return (
            self.sampling.prompt_logprobs is not None
            and self.index == 0
            and len(self.prompt_logprobs) < self.num_prompt_tokens
        )

    def order(self) -> tuple[int, int, int]:
        """Who goes first: the smaller. Priority, then arrival, then index."""
        return (self.request.priority, self.arrival_number, self.index)

    def append(self, token_id: int, now: float) -> None:
        """One more completion token, made at monotonic time ``now``."""
        self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        if self.first_token_time is None:
            self.first_token_time = now
        self.last_token_time = now

    def check_stop(self) -> bool:
        """Whether the token appended last ends the completion; notes the reason if so.

        A token that ends the completion wins over a length that is used up at the same time.
        """
        last = self.token_ids[-1]
        if last in self.ending_token_ids and self.num_output_tokens > self.sampling.min_tokens:
            self.finish_reason = "stop"
            self.stop_token_id = last
        elif len(self.token_ids) >= self.max_total_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def timings(self) -> Timings:
        """Seconds so far; phases that it has not come to are 0."""
        end = self.finish_time if self.finish_time is not None else time.monotonic()
        scheduled = end if self.first_scheduled_time is None else self.first_scheduled_time
        first = end if self.first_token_time is None else self.first_token_time
        last = first if self.last_token_time is None else self.last_token_time
        return Timings(
            queue_seconds=scheduled - self.arrival_time,
            prefill_seconds=first - scheduled,
            decode_seconds=last - first,
            time_to_first_token_seconds=None if self.first_token_time is None else first - self.arrival_time,
            total_seconds=end - self.arrival_time,
        )


def new_sequences(
    request: Request,
    *,
    eos_token_ids: Collection[int],
    max_model_len: int,
    adapter: Adapter | None = None,
    arrival_time: float | None = None,
) -> list[Sequence]:
    """The n sequences of a validated request.

    Args:
        eos_token_ids: of the model.
        max_model_len: prompt and completion together, tokens.
        adapter: what request.adapter and adapter_version resolve to now.
        arrival_time: time.monotonic() seconds; None: now.

    Raises:
        OutOfRangeError: the context cannot hold the prompt and one more token.
    """
    prompt = request.prompt_token_ids
    sampling = request.sampling
    if len(prompt) >= max_model_len:
        raise OutOfRangeError(
            f"the prompt has {len(prompt)} tokens; accepted: at most {max_model_len - 1}, as the context of "
            f"{max_model_len} tokens must also hold the completion",
            field="prompt",
        )
    ending = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else eos_token_ids)
    limit = max_model_len if sampling.max_tokens is None else min(max_model_len, len(prompt) + sampling.max_tokens)
    penalised = sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
    arrival = time.monotonic() if arrival_time is None else arrival_time
    return [
        Sequence(
            request=request,
            index=index,
            adapter=adapter,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_total_tokens=limit,
            ending_token_ids=ending,
            sampling_key=sampling_key(sampling.seed, index),
            token_counts=TokenCounts(prompt) if penalised else None,
            arrival_time=arrival,
        )
        for index in range(request.n)
    ]
