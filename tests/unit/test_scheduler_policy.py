"""The scheduler's promises, one by one."""

from __future__ import annotations

import pytest

from engine.cache.full import FullAttentionManager
from engine.core.scheduled import ScheduledBatch
from engine.core.scheduler import DEFAULT_RETRY_SECONDS, Scheduler
from engine.core.sequence import Sequence, SequenceStatus, new_sequences
from engine.errors import InternalError, InvalidArgumentError, OutOfRangeError, OverloadedError
from engine.lora.adapter import Adapter
from engine.request import Request, SamplingParams
from tests.unit.test_scheduler_properties import adapter_of

BLOCK_SIZE = 4


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    *, blocks: int = 100, budget: int = 64, running: int = 8, waiting: int = 100, clock: Clock | None = None
) -> Scheduler:
    return Scheduler(
        "m",
        FullAttentionManager(blocks + 1, BLOCK_SIZE),
        max_batch_tokens=budget,
        max_running=running,
        max_waiting=waiting,
        max_model_len=256,
        clock=clock or Clock(),
    )


def add(
    scheduler: Scheduler,
    name: str,
    prompt: list[int] | int,
    *,
    n: int = 1,
    priority: int = 0,
    max_tokens: int | None = None,
    salt: str = "",
    adapter: Adapter | None = None,
    prompt_logprobs: int | None = None,
) -> list[Sequence]:
    """Queues a request; a prompt given as a number is that many tokens found in no other prompt."""
    if isinstance(prompt, int):
        prompt = [sum(name.encode()) * 1000 + i for i in range(prompt)]
    sequences = new_sequences(
        Request(
            request_id=name,
            model="m",
            prompt_token_ids=prompt,
            n=n,
            priority=priority,
            cache_salt=salt,
            sampling=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
        ),
        eos_token_ids=[0],
        max_model_len=scheduler.max_model_len,
        adapter=adapter,
        arrival_time=100.0,
    )
    scheduler.add(sequences)
    return sequences


def run(scheduler: Scheduler, token: int = 7) -> dict[str, int]:
    """One step in which all sample the same token; request id to tokens computed."""
    batch = scheduler.schedule()
    take_in(scheduler, batch, token)
    return {entry.sequence.request.request_id: entry.num_tokens for entry in batch.entries}


def take_in(scheduler: Scheduler, batch: ScheduledBatch, token: int = 7) -> None:
    for entry in batch.entries:
        scheduler.update(entry.sequence, entry.num_tokens, [token] if entry.reaches_end else [])


def test_decodes_and_prefill_chunks_share_a_budget() -> None:
    """A long prompt advances in what the decoding ones leave, and they lose no step to it."""
    scheduler = make(budget=10)
    add(scheduler, "short", 3)
    add(scheduler, "long", 20)
    assert run(scheduler) == {"short": 3, "long": 7}
    assert run(scheduler) == {"short": 1, "long": 9}
    assert run(scheduler) == {"short": 1, "long": 4}
    assert run(scheduler) == {"short": 1, "long": 1}


def test_a_batch_in_which_all_decode_stands_until_one_comes_or_goes() -> None:
    """A caller may keep what it knows of a batch as long as it is given the same one."""
    scheduler = make(blocks=9)  # of four tokens
    add(scheduler, "a", 3, max_tokens=50)
    add(scheduler, "b", 3, max_tokens=4)
    assert run(scheduler) == {"a": 3, "b": 3}
    standing = scheduler.schedule()
    for _ in range(3):
        assert scheduler.schedule() is standing
        take_in(scheduler, standing)  # at the last of these b ends
    alone = scheduler.schedule()
    assert alone is not standing
    assert [entry.sequence.index for entry in alone.entries] == [0]
    take_in(scheduler, alone)
    assert scheduler.schedule() is alone
    add(scheduler, "c", 2)
    assert run(scheduler) == {"a": 1, "c": 2}
    both = scheduler.schedule()
    assert len(both.entries) == 2
    scheduler.abort("c")
    assert scheduler.schedule() is not both


def test_decodes_leave_at_least_half_the_budget_to_prompts() -> None:
    """However many may run, a new prompt is not kept waiting by those that decode."""
    scheduler = make(budget=8, running=100)
    assert scheduler.max_running == 4
    for name in "abcdef":
        add(scheduler, name, 1, max_tokens=50)
    assert run(scheduler) == dict.fromkeys("abcd", 1)


def test_first_come_first_served_without_overtaking() -> None:
    """A small request behind a large one that finds no room does not slip past it."""
    scheduler = make(blocks=8)
    add(scheduler, "running", 10)
    run(scheduler)
    add(scheduler, "large", 24)
    add(scheduler, "small", 4)
    assert run(scheduler) == {"running": 1}
    scheduler.abort("running")
    assert run(scheduler)["large"] == 24


def test_the_last_to_arrive_is_preempted_and_comes_back_first() -> None:
    """When blocks run out the earlier one goes on; the later one is recomputed, completion included, before others
    begin."""
    scheduler = make(blocks=5)
    (first,) = add(scheduler, "first", 8)
    (second,) = add(scheduler, "second", 7)
    run(scheduler)  # 2 + 2 blocks
    assert (first.status, second.status) == (SequenceStatus.RUNNING, SequenceStatus.RUNNING)
    add(scheduler, "third", 2)
    assert run(scheduler) == {"first": 1, "second": 1}  # the fifth block goes to first
    assert run(scheduler) == {"first": 1}
    assert second.status is SequenceStatus.WAITING
    assert (second.num_preemptions, scheduler.stats.preemptions) == (1, 1)
    assert second.block_table == []
    assert second.num_output_tokens == 2
    scheduler.abort("first")
    batch = scheduler.schedule()
    assert [entry.sequence.request.request_id for entry in batch.entries] == ["second", "third"]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    """They stay cached, so recompute costs only what was evicted; usage still counts no cached prompt tokens."""
    scheduler = make(blocks=20, running=1)
    (low,) = add(scheduler, "low", 17, priority=1)
    run(scheduler)
    add(scheduler, "high", 4, priority=0, max_tokens=1)
    assert run(scheduler) == {"high": 4}
    assert run(scheduler) == {"low": 2}
    assert low.num_cached_tokens == 0
    assert scheduler.stats.prefix_hits_tokens == 0


def test_priority_preempts_and_equal_priority_does_not() -> None:
    """Lower numbers first: a running sequence gives way to a more urgent one, never to an equal."""
    scheduler = make(running=1)
    add(scheduler, "normal", 4, max_tokens=3)
    run(scheduler)
    add(scheduler, "equal", 4, max_tokens=3)
    assert run(scheduler) == {"normal": 1}
    add(scheduler, "urgent", 4, priority=-5, max_tokens=1)
    assert run(scheduler) == {"urgent": 4}
    assert list(run(scheduler)) == ["normal"]
    assert list(run(scheduler)) == ["equal"]


def test_those_behind_a_preempted_sequence_do_not_take_its_place() -> None:
    """What an urgent request leaves of the blocks that it took is not for later arrivals."""
    scheduler = make(blocks=8)
    (early,) = add(scheduler, "early", 21, priority=1)
    run(scheduler)
    add(scheduler, "late", 3, priority=1)
    add(scheduler, "urgent", 13, priority=0)
    assert run(scheduler) == {"urgent": 13}
    assert early.status is SequenceStatus.WAITING


def test_urgent_request_does_not_preempt_in_vain() -> None:
    """If even all lower ones' blocks would not do, they keep them."""
    scheduler = make(blocks=10)
    add(scheduler, "urgent", 20, priority=-1)
    add(scheduler, "low", 4, priority=1)
    run(scheduler)
    add(scheduler, "large", 36, priority=0)
    assert run(scheduler) == {"urgent": 1, "low": 1}
    assert scheduler.stats.preemptions == 0


def test_what_a_failed_sequence_computed_is_never_shared() -> None:
    """Its keys and values may be the cause: the next request with the same prompt computes its own."""
    scheduler = make(budget=8)
    (failed,) = add(scheduler, "failed", list(range(1, 14)))
    run(scheduler)
    scheduler.schedule()
    scheduler.finish(failed, "error", InternalError("logits are not finite"))
    (after,) = add(scheduler, "after", list(range(1, 14)))
    run(scheduler)
    assert after.num_cached_tokens == 0


def test_completions_of_one_request_compute_their_prompt_once() -> None:
    """The siblings wait for the first one's prompt, then begin with its blocks."""
    scheduler = make(budget=16)
    first, second, third = add(scheduler, "r", 21, n=3)
    take_in(scheduler, scheduler.schedule())
    assert (first.num_computed_tokens, second.status) == (16, SequenceStatus.WAITING)
    take_in(scheduler, scheduler.schedule())
    assert second.status is SequenceStatus.WAITING
    batch = scheduler.schedule()
    assert [(e.sequence, e.num_tokens) for e in batch.entries] == [(first, 1), (second, 1), (third, 1)]
    assert (first.num_cached_tokens, second.num_cached_tokens, third.num_cached_tokens) == (0, 20, 20)
    assert second.block_table[:5] == third.block_table[:5] == first.block_table[:5]


def test_siblings_do_not_wait_for_a_first_one_that_has_ended() -> None:
    scheduler = make(budget=16)
    first, second = add(scheduler, "r", 20, n=2)
    take_in(scheduler, scheduler.schedule())
    scheduler.finish(first, "cancelled")
    assert [(e.sequence, e.num_tokens) for e in scheduler.schedule().entries] == [(second, 4)]


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    """A prefix hit would skip logits that were asked for; siblings that report none may still share."""
    scheduler = make()
    add(scheduler, "before", list(range(1, 14)), max_tokens=1)
    run(scheduler)
    first, second = add(scheduler, "r", list(range(1, 14)), n=2, prompt_logprobs=0)
    assert run(scheduler) == {"r": 13}
    assert first.num_cached_tokens == 0
    scheduler.schedule()
    assert second.num_cached_tokens == 12
    assert scheduler.stats.prefix_queries_tokens == 13 + 13
    assert scheduler.stats.prefix_hits_tokens == 12


@pytest.mark.parametrize(
    ("salt", "before", "after", "hit"),
    [
        ("", adapter_of("a", 1, 2.0), adapter_of("a", 1, 2.0), 8),
        ("s", adapter_of("a", 1, 2.0), adapter_of("a", 1, 2.0), 0),
        ("", adapter_of("a", 1, 2.0), adapter_of("a", 2, 3.0), 0),
        ("", adapter_of("a", 1, 2.0), adapter_of("a", 1, 3.0), 0),
        ("", adapter_of("a", 1, 2.0), adapter_of("a", 2, 2.0), 8),
        ("", adapter_of("a", 1, 2.0), adapter_of("b", 1, 2.0), 8),
        ("", adapter_of("a", 1, 2.0), None, 0),
        ("", adapter_of("a", 1, 0.0), None, 8),
        ("", None, adapter_of("a", 1, 0.0), 8),
    ],
)
def test_prefixes_are_shared_by_equal_weights_and_salt_alone(
    salt: str, before: Adapter | None, after: Adapter | None, hit: int
) -> None:
    """An adapter's update, another tenant or a replaced adapter never gets a stale prefix; the same weights under
    another name or version do, and an adapter that does nothing is the base."""
    scheduler = make()
    prompt = list(range(1, 11))
    add(scheduler, "first", prompt, adapter=before, max_tokens=1)
    run(scheduler)
    (second,) = add(scheduler, "second", prompt, adapter=after, salt=salt, max_tokens=1)
    run(scheduler)
    assert second.num_cached_tokens == hit


def test_a_prompt_that_is_being_computed_is_waited_for() -> None:
    """Two requests of one prompt at once: the second begins when it can share, in the step after; another prompt, other
    weights or a more urgent request does not wait, and no chain of leaders is kept."""
    scheduler = make()
    prompt = list(range(1, 11))
    (first,) = add(scheduler, "first", prompt)
    (twin,) = add(scheduler, "twin", prompt, adapter=adapter_of("a", 1, 0.0))
    (third,) = add(scheduler, "third", prompt, adapter=adapter_of("b", 1, 1.0))
    add(scheduler, "urgent", prompt, priority=-1)
    assert run(scheduler) == {"first": 10, "third": 10, "urgent": 10}
    assert run(scheduler) == {"first": 1, "third": 1, "urgent": 1, "twin": 2}
    assert (twin.num_cached_tokens, third.num_cached_tokens) == (8, 0)
    assert twin.leader is not None
    scheduler.abort("twin")
    assert twin.leader is None
    scheduler.abort("first")
    assert first.is_finished


def test_a_full_queue_says_when_to_come_back() -> None:
    """Nothing of a rejected request stays; the estimate follows the rate at which completions end."""
    clock = Clock()
    scheduler = make(running=2, waiting=1, clock=clock)
    add(scheduler, "a", 4, n=2)
    run(scheduler)
    with pytest.raises(OverloadedError, match="limit of 1 waiting") as caught:
        add(scheduler, "b", 4, n=2)
    assert caught.value.retry_after_seconds == DEFAULT_RETRY_SECONDS
    assert scheduler.num_waiting == 0
    for name in ("c", "d", "e"):
        clock.now += 10
        scheduler.abort(name if name != "c" else "a")
        add(scheduler, chr(ord(name) + 1), 4, n=2)
        run(scheduler)
    add(scheduler, "waiting", 4)
    with pytest.raises(OverloadedError) as caught:
        add(scheduler, "b", 4)
    assert caught.value.retry_after_seconds == pytest.approx(20 / 6)


def test_what_can_never_fit_is_refused_at_once() -> None:
    """The context is limited to what the cache holds, so that a request alone can always end."""
    scheduler = make(blocks=4)
    assert scheduler.max_model_len == 16
    with pytest.raises(OutOfRangeError, match="prompt has 16 tokens; accepted: at most 15"):
        add(scheduler, "r", 16)
    (sequence,) = add(scheduler, "r", 15)
    run(scheduler)
    assert (sequence.finish_reason, sequence.num_output_tokens) == ("length", 1)
    too_long = new_sequences(
        Request(request_id="x", model="m", prompt_token_ids=[1]), eos_token_ids=[], max_model_len=17
    )
    with pytest.raises(OutOfRangeError, match="at most 16, as the cache has 4 blocks of 4"):
        scheduler.add(too_long)


def test_tokens_after_the_one_that_ends_do_not_count() -> None:
    """With several new tokens in a step, as drafts give, the completion ends where it would have one by one."""
    scheduler = make()
    (sequence,) = add(scheduler, "r", 4)
    batch = scheduler.schedule()
    assert scheduler.update(sequence, batch.entries[0].num_tokens, [5, 0, 6]) == [5, 0]
    assert (sequence.finish_reason, sequence.stop_token_id) == ("stop", 0)
    assert not scheduler.has_unfinished()


def test_adapters_of_waiting_and_running() -> None:
    scheduler = make(running=1)
    add(scheduler, "a", 4, adapter=adapter_of("x", 1, 1.0))
    add(scheduler, "b", 4, adapter=adapter_of("y", 1, 2.0))
    add(scheduler, "c", 4, adapter=adapter_of("y", 2, 3.0))
    run(scheduler)
    assert (scheduler.adapters_running(), scheduler.adapters_waiting()) == (["x"], ["y"])


@pytest.mark.parametrize("field", ["max_batch_tokens", "max_running", "max_waiting", "max_model_len"])
def test_limits_are_validated(field: str) -> None:
    limits = {"max_batch_tokens": 8, "max_running": 8, "max_waiting": 8, "max_model_len": 8, field: -1}
    with pytest.raises(InvalidArgumentError, match="is -1; accepted: at least"):
        Scheduler(
            "m",
            FullAttentionManager(4, 4),
            max_batch_tokens=limits["max_batch_tokens"],
            max_running=limits["max_running"],
            max_waiting=limits["max_waiting"],
            max_model_len=limits["max_model_len"],
        )
