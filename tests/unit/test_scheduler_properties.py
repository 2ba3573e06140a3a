"""The scheduler under random traffic, with a stand-in for the model whose next token is a function of what the cache
holds: any block that is shared, freed or written wrongly changes a token."""

from __future__ import annotations

from hashlib import blake2b

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.full import FullAttentionManager
from engine.cache.hybrid import HybridManager
from engine.core.scheduled import ScheduledBatch
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence, SequenceStatus, new_sequences
from engine.errors import InternalError, OverloadedError
from engine.lora.adapter import Adapter
from engine.request import Request, SamplingParams

EOS = 5
BLOCK_SIZE = 2
MAX_RUNNING = 4
MAX_WAITING = 6

Manager = FullAttentionManager | HybridManager

Content = bytes
"""What stands for the keys and values of a position: a digest of the weights and all tokens up to it."""


def adapter_of(name: str, version: int, weight: float) -> Adapter:
    """An adapter of one number; with 0 it does nothing."""
    module = (torch.ones(1, 1), torch.full((1, 1), weight))
    return Adapter(name=name, version=version, rank=1, alpha=1.0, modules={"m": module})


def weights_of(sequence: Sequence) -> bytes:
    """Identifies all but tokens that contents depend on; a hit across any of these is a fault."""
    adapter = sequence.adapter
    weight = 0.0 if adapter is None else float(adapter.modules["m"][1])
    return repr((weight, sequence.request.cache_salt)).encode()


def content_of(weights: bytes, tokens: list[int]) -> Content:
    return blake2b(weights + bytes(tokens), digest_size=8).digest()


def next_token(contents: list[Content]) -> int:
    """0 … EOS, from everything that is attended to."""
    return blake2b(b"".join(contents), digest_size=8).digest()[0] % (EOS + 1)


class Model:
    """Runs batches on a cache of contents."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.cache: dict[int, Content] = {}
        self.weights: dict[Sequence, bytes] = {}

    def forward(self, batch: ScheduledBatch) -> dict[Sequence, list[int]]:
        """Writes contents of all new tokens, then samples where a sequence reached its end."""
        written: set[int] = set()
        for entry in batch.entries:
            sequence = entry.sequence
            start = sequence.num_computed_tokens
            for position in range(start, start + entry.num_tokens):
                slot = self.slot(sequence, position)
                assert slot not in written, "two sequences write one slot"
                assert self.manager.pool.ref_count(slot // BLOCK_SIZE) == 1, "a shared block is written"
                written.add(slot)
                self.cache[slot] = content_of(self.weights[sequence], sequence.token_ids[: position + 1])
        sampled: dict[Sequence, list[int]] = {}
        for entry in batch.entries:
            sequence = entry.sequence
            if entry.reaches_end:
                read = [self.cache[self.slot(sequence, p)] for p in range(len(sequence.token_ids))]
                sampled[sequence] = [next_token(read)]
        return sampled

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def alone(self, sequence: Sequence) -> list[int]:
        """The completion that the sequence would have by itself, without cache or scheduler."""
        params = sequence.sampling
        tokens = list(sequence.request.prompt_token_ids)
        output: list[int] = []
        while len(tokens) < sequence.max_total_tokens:
            weights = self.weights[sequence]
            token = next_token([content_of(weights, tokens[: p + 1]) for p in range(len(tokens))])
            tokens.append(token)
            output.append(token)
            if token == EOS and len(output) > params.min_tokens:
                break
        return output


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are aborted, fail; steps run, or fail and are run again; at the end all must finish."""

    num_blocks = 11
    budget = 7
    prefix_caching = True

    def __init__(self) -> None:
        super().__init__()
        self.manager, self.model = self.make()
        self.scheduler = Scheduler(
            "m",
            self.manager,
            max_batch_tokens=self.budget,
            max_running=MAX_RUNNING,
            max_waiting=MAX_WAITING,
            max_model_len=16,
        )
        self.sequences: list[Sequence] = []
        self.updates = {"a": 0, "b": 0}
        self.count = 0

    def make(self) -> tuple[Manager, Model]:
        """The cache under test, and what stands for a model that uses it."""
        manager = FullAttentionManager(self.num_blocks, BLOCK_SIZE, enable_prefix_caching=self.prefix_caching)
        return manager, Model(manager)

    def failed(self, batch: ScheduledBatch) -> None:
        """A step failed as if the device had run out of memory: nothing is taken in, and all of it runs again."""

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14) | st.integers(1, 14).map(lambda n: [0] * n),
        n=st.integers(1, 3),
        adapter=st.sampled_from([None, ("a", 1), ("a", 2), ("b", 2), ("b", 0)]),
        salt=st.sampled_from(["", "s"]),
        priority=st.integers(-1, 1),
        max_tokens=st.none() | st.integers(1, 6),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        prompt: list[int],
        n: int,
        adapter: tuple[str, int] | None,
        salt: str,
        priority: int,
        max_tokens: int | None,
        prompt_logprobs: int | None,
    ) -> None:
        request = Request(
            request_id=str(self.count),
            model="m",
            prompt_token_ids=prompt,
            n=n,
            priority=priority,
            cache_salt=salt,
            sampling=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
        )
        self.count += 1
        sequences = new_sequences(
            request,
            eos_token_ids=[EOS],
            max_model_len=self.scheduler.max_model_len,
            adapter=None if adapter is None else adapter_of(*adapter, self.weight(*adapter)),
        )
        scheduler = self.scheduler
        places = MAX_WAITING + max(0, scheduler.max_running - scheduler.num_running) - scheduler.num_waiting
        if n > places:
            with pytest.raises(OverloadedError) as caught:
                scheduler.add(sequences)
            assert (caught.value.retry_after_seconds or 0) > 0
            return
        scheduler.add(sequences)
        for sequence in sequences:
            self.model.weights[sequence] = weights_of(sequence)
        self.sequences += sequences

    @rule(name=st.sampled_from(["a", "b"]))
    def replace_adapter(self, name: str) -> None:
        """Other weights under the same name and version."""
        self.updates[name] += 1

    def weight(self, name: str, version: int) -> float:
        """What stands for the weights of a version now. Until an update, version 2 of one adapter is that of the other,
        and version 0 does nothing."""
        return float(version + 10 * self.updates[name])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        request_id = sequence.request.request_id
        unfinished = [s for s in self.sequences if s.request.request_id == request_id and not s.is_finished]
        assert self.scheduler.abort(request_id) == unfinished
        for aborted in unfinished:
            assert aborted.finish_reason == "cancelled"
            assert aborted.block_table == []
        assert self.scheduler.abort(request_id) == []

    @rule(fails=st.booleans(), data=st.data())
    def step(self, fails: bool, data: st.DataObject) -> None:
        batch = self.schedule()
        sampled = self.model.forward(batch)
        if fails:
            self.failed(batch)
            return
        for entry in batch.entries:
            sequence = entry.sequence
            if entry.reaches_end and data.draw(st.integers(0, 15)) == 0:
                self.scheduler.finish(sequence, "error", InternalError("logits are not finite"))
                continue
            self.scheduler.update(sequence, entry.num_tokens, sampled.get(sequence, []))

    def schedule(self) -> ScheduledBatch:
        """The next batch, with what must hold of every batch."""
        unfinished = [s for s in self.sequences if not s.is_finished]
        first = min(unfinished, key=Sequence.order, default=None)
        batch = self.scheduler.schedule()
        assert bool(batch.entries) == bool(unfinished)
        assert batch.num_tokens <= self.budget
        scheduled = {entry.sequence for entry in batch.entries}
        assert len(scheduled) == len(batch.entries)
        for entry in batch.entries:
            assert entry.sequence.status is SequenceStatus.RUNNING
            assert 1 <= entry.num_tokens <= entry.sequence.num_uncomputed_tokens
            covered = entry.sequence.num_computed_tokens + entry.num_tokens
            assert len(entry.sequence.block_table) * BLOCK_SIZE >= covered
        running = [s for s in self.sequences if s.status is SequenceStatus.RUNNING]
        for sequence in running:
            if sequence.num_uncomputed_tokens == 1:
                assert sequence in scheduled, "a sequence that has caught up misses a step"
        if first is not None and first.leader is None:  # one that waited may find its place taken
            assert first in scheduled, "the first in order does not go on"
        return batch

    @invariant()
    def counts_agree(self) -> None:
        by_status = [s.status for s in self.sequences]
        assert self.scheduler.num_waiting == by_status.count(SequenceStatus.WAITING)
        assert self.scheduler.num_running == by_status.count(SequenceStatus.RUNNING) <= self.scheduler.max_running

    @invariant()
    def references_are_right(self) -> None:
        tables = [block for s in self.sequences for block in s.block_table]
        assert all(self.manager.pool.ref_count(b) == tables.count(b) for b in range(self.num_blocks))
        assert all(s.block_table == [] for s in self.sequences if s.status is not SequenceStatus.RUNNING)

    @invariant()
    def computed_contents_are_right(self) -> None:
        """No hit crosses weights, replaced ones included, or salt, and nothing is overwritten."""
        for s in self.sequences:
            for p in range(s.num_computed_tokens):
                expected = content_of(self.model.weights[s], s.token_ids[: p + 1])
                assert self.model.cache[self.model.slot(s, p)] == expected

    def teardown(self) -> None:
        work = sum(2 * s.max_total_tokens for s in self.sequences)
        steps = 0
        while self.scheduler.has_unfinished():
            batch = self.schedule()
            sampled = self.model.forward(batch)
            for entry in batch.entries:
                self.scheduler.update(entry.sequence, entry.num_tokens, sampled.get(entry.sequence, []))
            self.computed_contents_are_right()
            steps += 1
            assert steps <= work, "no progress"
        for s in self.sequences:
            expected = self.model.alone(s)
            if s.finish_reason in ("cancelled", "error"):
                assert s.output_token_ids == expected[: s.num_output_tokens]
            else:
                assert s.output_token_ids == expected, "the completion depends on what ran beside it"
                assert s.finish_reason == ("stop" if s.stop_token_id == EOS else "length")
                assert (expected[-1] == EOS) == (s.finish_reason == "stop")
        assert self.manager.num_free_blocks == self.manager.pool.capacity, "blocks leak"


class RoomyMachine(SchedulerMachine):
    """Blocks enough for all: no preemption."""

    num_blocks = 200
    budget = 20

    def teardown(self) -> None:
        super().teardown()
        assert all(s.num_preemptions == 0 for s in self.sequences if s.request.priority == -1)


class NarrowMachine(SchedulerMachine):
    """The smallest budget, without prefix caching."""

    num_blocks = 9
    budget = 2
    prefix_caching = False


CASES = settings(max_examples=80, stateful_step_count=40, deadline=None)
SchedulerMachine.TestCase.settings = CASES
RoomyMachine.TestCase.settings = CASES
NarrowMachine.TestCase.settings = CASES
TestTight = SchedulerMachine.TestCase
TestRoomy = RoomyMachine.TestCase
TestNarrow = NarrowMachine.TestCase
