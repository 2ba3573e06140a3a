"""Which tokens the next step computes. Free of torch.

One token budget serves all. Each step first gives every sequence that has caught up its one token, then lets the
others (new prompts, and preempted sequences that compute themselves again) begin or catch up in chunks. As at most
half the budget's worth of sequences runs, neither can starve the other.

Order is by priority, then arrival. When blocks run out, the last running sequence in that order loses its blocks and
waits to be recomputed: the first one always goes on, so work always ends.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.cache.base import CacheManager
from engine.cache.prefix import root_hash
from engine.core.scheduled import ScheduledBatch, ScheduledSequence
from engine.core.sequence import Sequence, SequenceStatus
from engine.errors import EngineError, InvalidArgumentError, OutOfRangeError, OverloadedError
from engine.request import FinishReason

FINISHES_REMEMBERED = 64
DEFAULT_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


@dataclass(slots=True)
class SchedulerStats:
    """Cumulative counters.

    Attributes:
        prefix_queries_tokens: tokens of sequences that first ran and could use the prefix cache.
        prefix_hits_tokens: those of them that they found there.
    """

    preemptions: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0


class Scheduler:
    """Queues, runs and preempts the sequences of one model.

    Args:
        model: name, part of what prefixes are shared by.
        cache: lends blocks to sequences.
        max_batch_tokens: tokens of one step at most.
        max_running: sequences that run together; no more than half of max_batch_tokens do.
        max_waiting: sequences that may queue beyond those that can run at once.
        max_model_len: longest prompt and completion together; lowered to what the cache can hold, see the attribute.
        clock: monotonic seconds.

    Attributes:
        max_model_len: what new sequences must be limited to.
        stats: counters since the start.

    Raises:
        InvalidArgumentError: a limit is too small.
    """

    def __init__(
        self,
        model: str,
        cache: CacheManager,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_waiting: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value, low in (
            ("max_batch_tokens", max_batch_tokens, 2),
            ("max_running_requests", max_running, 1),
            ("max_waiting_requests", max_waiting, 0),
            ("max_model_len", max_model_len, 2),
        ):
            if value < low:
                raise InvalidArgumentError(f"{name} is {value}; accepted: at least {low}", field=name)
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens // 2)
        self.max_waiting = max_waiting
        self.max_model_len = min(max_model_len, cache.max_sequence_tokens)
        self.cache = cache
        self.stats = SchedulerStats()
        self._model = model
        self._clock = clock
        self._waiting: list[Sequence] = []  # both sorted by Sequence.order
        self._running: list[Sequence] = []
        self._live: dict[str, list[Sequence]] = {}  # by request id
        self._standing: ScheduledBatch | None = None  # see ``schedule``
        self._arrivals = itertools.count()
        self._finish_times: deque[float] = deque(maxlen=FINISHES_REMEMBERED)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_unfinished(self) -> bool:
        """Whether ``schedule`` has anything to do."""
        return bool(self._waiting or self._running)

    def only_decodes(self) -> bool:
        """Whether the next step computes no prompt: nothing waits, and what runs has a token to compute at most."""
        return not self._waiting and all(sequence.num_uncomputed_tokens <= 1 for sequence in self._running)

    def is_live(self, request_id: str) -> bool:
        """Whether a sequence of that request is waiting or running."""
        return request_id in self._live

    def adapters_waiting(self) -> list[str]:
        """Names of the adapters of waiting sequences, each once, sorted."""
        return sorted({s.adapter.name for s in self._waiting if s.adapter is not None})

    def adapters_running(self) -> list[str]:
        """Names of the adapters of running sequences, each once, sorted."""
        return sorted({s.adapter.name for s in self._running if s.adapter is not None})

    def adapters_held(self) -> set[tuple[str, int]]:
        """Names and versions of the adapters of all live sequences."""
        live = (sequence.adapter for sequences in self._live.values() for sequence in sequences)
        return {(adapter.name, adapter.version) for adapter in live if adapter is not None}

    def add(self, sequences: list[Sequence]) -> None:
        """Queues the sequences of one request: all of them or, on an error, none.

        Raises:
            OutOfRangeError: the request could never run, as the cache is too small for it.
            OverloadedError: the queue is full.
        """
        first = sequences[0]
        request = first.request
        assert request.request_id not in self._live, f"request {request.request_id} is already queued"
        if first.max_total_tokens > self.max_model_len:
            raise OutOfRangeError(
                f"the request may grow to {first.max_total_tokens} tokens; accepted: at most {self.max_model_len}, "
                f"as the cache has {self.cache.num_blocks - 1} blocks of {self.cache.block_size} tokens",
                field="prompt",
            )
        if len(sequences) > self.max_waiting + self.max_running:
            raise OutOfRangeError(
                f"n is {len(sequences)}; accepted: at most {self.max_waiting + self.max_running}, as many completions "
                f"as may run and wait",
                field="n",
            )
        free_places = self.max_waiting + max(0, self.max_running - self.num_running)
        if self.num_waiting + len(sequences) > free_places:
            raise OverloadedError(
                f"{self.num_waiting} completions are waiting and {self.num_running} running; {len(sequences)} more "
                f"would exceed the limit of {self.max_waiting} waiting",
                reason="QUEUE_FULL",
                retry_after_seconds=self._seconds_until(self.num_waiting + len(sequences) - free_places),
            )
        adapter = first.adapter
        root = root_hash(self._model, b"" if adapter is None else adapter.weights_digest(), request.cache_salt)
        arrival = next(self._arrivals)
        for sequence in sequences:
            sequence.arrival_number = arrival
            sequence.prefix_root = root
            sequence.leader = None if sequence is first else first
        first.leader = self._twin(first)
        for sequence in sequences:
            bisect.insort(self._waiting, sequence, key=Sequence.order)
        self._live[request.request_id] = list(sequences)
        self._standing = None

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "cancelled") -> list[Sequence]:
        """Ends a request's unfinished sequences, or the one of that index, and frees their blocks at once.

        Returns: these sequences; none if the request is unknown or has ended.
        """
        aborted = [s for s in self._live.get(request_id, ()) if index is None or s.index == index]
        for sequence in aborted:
            self.finish(sequence, reason)
        return aborted

    def finish(self, sequence: Sequence, reason: FinishReason, error: EngineError | None = None) -> None:
        """Ends an unfinished sequence and frees its blocks.

        Args:
            error: with reason "error".
        """
        assert not sequence.is_finished, "a sequence ends once"
        self._standing = None
        (self._running if sequence.status is SequenceStatus.RUNNING else self._waiting).remove(sequence)
        if reason == "error":
            self.cache.discard(sequence)  # logits that are not finite may come from keys and values that are not
        else:
            self.cache.free(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.error = error
        sequence.leader = None  # or each would keep the one before it in memory
        sequence.finish_time = self._clock()
        self._finish_times.append(sequence.finish_time)
        siblings = self._live[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.request_id]

    def update(self, sequence: Sequence, num_computed: int, new_tokens: list[int]) -> list[int]:
        """Takes in what a step brought a scheduled sequence, and ends it if it is complete.

        Args:
            num_computed: tokens of it that the step computed; 0 if ``follow`` has counted them.
            new_tokens: sampled after its last known token; empty if the step did not reach that.

        Returns: those of new_tokens that belong to the completion: none follows one that ends it.
        """
        assert sequence.status is SequenceStatus.RUNNING, f"update of a {sequence.status.value} sequence"
        if num_computed:
            self.cache.commit(sequence, num_computed)
        assert not new_tokens or sequence.num_uncomputed_tokens == 0, "sampled before all tokens were computed"
        now = self._clock()
        accepted: list[int] = []
        for token in new_tokens:
            sequence.append(token, now)
            accepted.append(token)
            if sequence.check_stop():
                break
        if sequence.finish_reason is not None:
            self.finish(sequence, sequence.finish_reason)
        return accepted

    def schedule(self) -> ScheduledBatch:
        """The next step. Not empty while anything is unfinished.

        A step in which all there is decodes is followed by one of the same sequences until one comes or goes. It is the
        very same batch, by which a caller knows that nothing but their tokens is new.
        """
        if self._standing is not None:
            if all(e.reaches_end and self.cache.allocate(e.sequence, 1) for e in self._standing.entries):
                return self._standing
            self._standing = None
        step = _Step(self.max_batch_tokens)
        for sequence in [s for s in self._running if s.num_uncomputed_tokens == 1]:
            if sequence.status is SequenceStatus.RUNNING:  # not preempted by one before it
                self._continue(sequence, step)
        # Running and waiting ones in one order: a long prompt that is half computed gives way to an urgent new one.
        behind = [s for s in self._running if s.num_uncomputed_tokens > 1] + self._waiting
        admitting = True
        for sequence in sorted(behind, key=Sequence.order):
            if step.budget == 0:
                break
            if sequence.status is SequenceStatus.RUNNING:
                self._continue(sequence, step)
            elif admitting and not self._shares_with_leader(sequence):
                # None overtakes one that finds no room or has just lost it, or that one might wait for ever.
                admitting = not step.preempted_before(sequence) and self._admit(sequence, step)
        batch = ScheduledBatch([ScheduledSequence(sequence, count) for sequence, count in step.tokens.items()])
        assert batch.entries or not self.has_unfinished(), "nothing scheduled, yet something is unfinished"
        decoding = [entry for entry in batch.entries if entry.num_tokens == 1 and entry.reaches_end]
        if len(decoding) == len(batch.entries) == len(self._running) and not self._waiting:
            self._standing = batch
        return batch

    def follow(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The step after one in which every sequence decodes, while that is under way and its tokens are not known: one
        more token for each sequence that may go on.

        A sequence of which that step turns out to be the last has this step for nothing: its blocks are given back when
        that is known, and nobody reads there before what this step writes has been written over. What the step under
        way computes is counted as computed, in the order of the device's work. Nothing is preempted or admitted, so
        this is for steps before which ``schedule`` would do neither.

        Returns: None if there is no such step; ``schedule`` is then to be asked once the tokens are known.
        """
        self._standing = None  # its entries may be committed below
        live = [entry for entry in batch.entries if not entry.sequence.is_finished]
        going_on = [e for e in live if len(e.sequence.token_ids) + 1 < e.sequence.max_total_tokens]
        if not going_on or len(live) != len(self._running):
            return None
        if self._waiting:
            urgent, last = self._waiting[0].request.priority, self._running[-1].request.priority
            if len(going_on) < self.max_running or urgent < last:
                return None
        for entry in batch.entries:
            if not entry.sequence.is_finished and not entry.is_committed:
                self.cache.commit(entry.sequence, entry.num_tokens)
                entry.is_committed = True
        if not all(self.cache.allocate(entry.sequence, 1) for entry in going_on):
            return None
        return ScheduledBatch([ScheduledSequence(entry.sequence, 1) for entry in going_on])

    def _continue(self, sequence: Sequence, step: _Step) -> None:
        """Schedules a running sequence, at the cost of those behind it."""
        count = min(sequence.num_uncomputed_tokens, step.budget)
        while not self.cache.allocate(sequence, count):
            victim = self._running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return
        step.take(sequence, count)

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Starts a waiting sequence, if need be at the cost of running ones of lower priority.

        Returns: False if there is no place for it.
        """
        priority = sequence.request.priority
        lower = [s for s in self._running if s.request.priority > priority]
        if len(self._running) >= self.max_running and not lower:
            return False
        if self.cache.shares_prefixes and not sequence.collects_prompt_logprobs:
            self.cache.match_prefix(sequence)
        others = [s for s in self._running if s.request.priority <= priority]
        if self._missing_blocks(sequence, others) > sum(len(s.block_table) for s in lower):
            self.cache.free(sequence)
            return False
        while lower and (len(self._running) >= self.max_running or self._missing_blocks(sequence, self._running) > 0):
            self._preempt(lower.pop(), step)
        if self._missing_blocks(sequence, self._running) > 0:  # the victims' blocks were shared with others
            self.cache.free(sequence)
            return False
        count = min(sequence.num_uncomputed_tokens, step.budget)
        allocated = self.cache.allocate(sequence, count)
        assert allocated
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=Sequence.order)
        sequence.status = SequenceStatus.RUNNING
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = self._clock()
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if self.cache.shares_prefixes and not sequence.collects_prompt_logprobs:
                self.stats.prefix_queries_tokens += len(sequence.token_ids)
                self.stats.prefix_hits_tokens += sequence.num_computed_tokens
        step.take(sequence, count)
        return True

    def _missing_blocks(self, sequence: Sequence, beside: list[Sequence]) -> int:
        """Blocks short of computing all known tokens of this sequence, though a step may compute only some, and of
        letting those beside it catch up and grow by a block; <= 0: none.

        To admit on less would soon cost a preemption, and the recompute of what was just computed.
        """
        needed = self.cache.blocks_needed(sequence, sequence.num_uncomputed_tokens)
        for running in beside:
            soon = min(len(running.token_ids) + self.cache.block_size, running.max_total_tokens)
            needed += self.cache.blocks_needed(running, soon - running.num_computed_tokens)
        return needed - self.cache.num_free_blocks

    def _twin(self, first: Sequence) -> Sequence | None:
        """A live sequence, ahead in order, whose prompt has the same contents in the cache: as when the base and an
        adapter that does nothing yet are asked the same at once."""
        if not self.cache.shares_prefixes or first.collects_prompt_logprobs:
            return None
        prompt = first.token_ids
        for live in self._live.values():
            other = live[0]
            if (
                other.prefix_root == first.prefix_root
                and other.num_prompt_tokens == len(prompt)
                and other.request.priority <= first.request.priority
                and other.request.prompt_token_ids == prompt
            ):
                return other
        return None

    def _shares_with_leader(self, sequence: Sequence) -> bool:
        """Whether it pays to wait: another sequence is computing the prompt they share."""
        leader = sequence.leader
        return (
            leader is not None
            and leader.status is SequenceStatus.RUNNING
            and self.cache.shares_prefixes
            and leader.num_computed_tokens < leader.num_prompt_tokens
            and leader.num_prompt_tokens > self.cache.block_size
        )

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        """Back to the queue without blocks; its place there is by priority and arrival, as always."""
        self._running.remove(sequence)
        self.cache.free(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        bisect.insort(self._waiting, sequence, key=Sequence.order)
        step.drop(sequence)
        self.stats.preemptions += 1

    def _seconds_until(self, places: int) -> float:
        """When so many places may be free, at the rate at which completions ended of late."""
        if len(self._finish_times) < 2:
            return DEFAULT_RETRY_SECONDS
        elapsed = self._clock() - self._finish_times[0]
        return min(MAX_RETRY_SECONDS, max(0.1, places * elapsed / len(self._finish_times)))


class _Step:
    """A step in the making: what is left of its budget, who has how many tokens, and who was preempted for it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tokens: dict[Sequence, int] = {}
        self.preempted: list[Sequence] = []

    def take(self, sequence: Sequence, count: int) -> None:
        assert 0 < count <= self.budget
        self.budget -= count
        self.tokens[sequence] = count

    def drop(self, sequence: Sequence) -> None:
        self.budget += self.tokens.pop(sequence, 0)
        self.preempted.append(sequence)

    def preempted_before(self, sequence: Sequence) -> bool:
        """Whether one that comes before this sequence has been preempted."""
        return any(other.order() < sequence.order() for other in self.preempted)
