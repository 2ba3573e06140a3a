"""Drafts on a real hybrid, right and wrong ones, partly accepted and rolled back: hidden states and tokens are those of
a run without drafts."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cache.hybrid import HybridManager
from engine.context import packed_context
from engine.core.batch import pack
from engine.core.loaded import LoadedModel
from engine.core.sequence import Sequence, new_sequences
from engine.request import Request
from tests.engine.test_generate import GREEDY, make_engine, prompt

TOLERANCE = 1e-4
"""Of the largest hidden state. Steps and chunks sum in different orders, and rounding grows from layer to layer: the
same runs without any draft differ by up to 3e-5."""


class Drafter:
    """Advances sequences by their uncomputed tokens and drafts, on the cache and states of a loaded model.

    Attributes:
        replayed: tokens that were computed again after rejections; most_replayed: after one of them.
    """

    def __init__(self, loaded: LoadedModel, *, snapshots: bool) -> None:
        assert loaded.runner is not None
        self.loaded, self.runner = loaded, loaded.runner
        manager = loaded.runner._manager
        assert isinstance(manager, HybridManager)
        self.manager = manager
        self.snapshots = snapshots
        self.replayed = self.most_replayed = 0

    @torch.no_grad()
    def step(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[Tensor]:
        """One forward for all. Appends to each sequence its accepted drafts and one token more.

        Returns: per sequence, final hidden states of its computed tokens that count.
        """
        starts = [s.num_computed_tokens for s in sequences]
        known = [len(s.token_ids) for s in sequences]
        for sequence, drafted in zip(sequences, drafts, strict=True):
            sequence.token_ids += drafted
            count = sequence.num_uncomputed_tokens
            assert self.manager.allocate(sequence, count, len(drafted) if self.snapshots else 0)
        slots, saves = self.runner._prepare_states(sequences)
        token_ids, ctx = pack(
            [s.token_ids[s.num_computed_tokens :] for s in sequences],
            starts,
            [s.block_table for s in sequences],
            [None] * len(sequences),
            self.runner._cache,
            self.loaded.device,
            states=self.runner._states,
            state_slots=slots,
            state_saves=saves,
        )
        model = self.loaded.causal_lm()
        hidden = model(token_ids, ctx)
        kept = []
        for row, (sequence, drafted) in enumerate(zip(sequences, drafts, strict=True)):
            mine = hidden[ctx.seq_starts[row] : ctx.seq_starts[row + 1]]
            self.manager.commit(sequence, len(mine))
            chosen = model.compute_logits(mine[len(mine) - len(drafted) - 1 :]).argmax(-1).tolist()
            accepted = next((i for i, token in enumerate(drafted) if token != chosen[i]), len(drafted))
            rejected = len(drafted) - accepted
            valid = len(mine) - rejected
            if rejected:
                taken = self.manager.rollback(sequence, rejected)
                self.replayed += taken - rejected
                self.most_replayed = max(self.most_replayed, taken - rejected)
            del sequence.token_ids[known[row] + accepted :]
            sequence.token_ids.append(chosen[accepted])
            kept.append(mine[:valid])
        return kept


def run(path: Path, *, interval: int, snapshots: bool, seed: int, num_drafts: int = 4) -> Drafter:
    """Three sequences of 40 completion tokens; drafts are right with chance 0.7 each, of random number."""
    rng = random.Random(seed)
    engine = make_engine(path, num_threads=1, state_checkpoint_interval=interval)
    loaded = engine._models["tiny"]
    model = loaded.causal_lm()
    prompts = [prompt(90 + seed, 3), prompt(91 + seed, 17), prompt(92 + seed, 30)]
    plain = [greedy(loaded, ids, 40) for ids in prompts]
    made = []
    for number, ids in enumerate(prompts):
        asked = Request(request_id=str(number), model="tiny", prompt_token_ids=ids, sampling=GREEDY)
        (sequence,) = new_sequences(asked, eos_token_ids=[], max_model_len=256)
        sequence.prefix_root = str(number).encode()
        made.append(sequence)
    drafter = Drafter(loaded, snapshots=snapshots)
    states: list[dict[int, Tensor]] = [{} for _ in made]
    while min(len(s.token_ids) - s.num_prompt_tokens for s in made) < 40:
        drafts = []
        for sequence, tokens in zip(made, plain, strict=True):
            done = len(sequence.token_ids) - sequence.num_prompt_tokens
            ahead = tokens[done : done + rng.randint(0, num_drafts)] if done < 40 else []
            drafts.append([t if rng.random() < 0.7 else rng.randrange(3, 300) for t in ahead])
        before = [s.num_computed_tokens for s in made]
        for place, start, hidden in zip(states, before, drafter.step(made, drafts), strict=True):
            place.update({start + i: row for i, row in enumerate(hidden)})
    for sequence, ids, tokens, place in zip(made, prompts, plain, states, strict=True):
        assert sequence.token_ids[len(ids) : len(ids) + 40] == tokens
        whole = (ids + tokens)[:-1]
        with torch.no_grad():
            expected = model(torch.tensor(whole), packed_context([len(whole)]))
        got = torch.stack([place[i] for i in range(len(whole))])
        scale = expected.abs().max()
        assert ((got - expected).abs().max() / scale) < TOLERANCE
        drafter.manager.free(sequence)
    assert drafter.manager.slots.num_holding == 0
    assert drafter.manager.slots.pool.num_used == 0
    assert drafter.replayed > 0, "nothing was rolled back"
    return drafter


@torch.no_grad()
def greedy(loaded: LoadedModel, ids: list[int], count: int) -> list[int]:
    """The completion by whole forwards, without a cache."""
    model, tokens = loaded.causal_lm(), list(ids)
    for _ in range(count):
        hidden = model(torch.tensor(tokens), packed_context([len(tokens)]))
        tokens.append(int(model.compute_logits(hidden[-1:]).argmax()))
    return tokens[len(ids) :]


@pytest.mark.parametrize("kind", ["tiny_hybrid", "tiny_moe"])
@pytest.mark.parametrize(("interval", "snapshots"), [(0, True), (1, True), (0, False), (2, False)])
def test_drafts_change_nothing(kind: str, interval: int, snapshots: bool, request: pytest.FixtureRequest) -> None:
    """Dense and with experts, with snapshots and by checkpoints alone."""
    path: Path = request.getfixturevalue(kind)
    drafter = run(path, interval=interval, snapshots=snapshots, seed=interval)
    if snapshots:
        assert drafter.most_replayed <= 4, "no more than the accepted drafts"


def test_snapshots_replay_less(tiny_hybrid: Path) -> None:
    """The same drafts, rolled back to the snapshot before them and to the checkpoint before that."""
    by_snapshot = run(tiny_hybrid, interval=0, snapshots=True, seed=7)
    by_checkpoint = run(tiny_hybrid, interval=0, snapshots=False, seed=7)
    assert by_snapshot.replayed < by_checkpoint.replayed


def test_without_a_spare_slot_the_last_checkpoint_serves(tiny_hybrid: Path) -> None:
    """As many slots as may run: no snapshot, no checkpoint; rejected drafts replay from the start, and rightly."""
    engine = make_engine(tiny_hybrid, num_threads=1, max_running_requests=1, enable_prefix_caching=False)
    loaded = engine._models["tiny"]
    drafter = Drafter(loaded, snapshots=True)
    ids = prompt(99, 10)
    plain = greedy(loaded, ids, 12)
    asked = dataclasses.replace(Request(request_id="r", model="tiny", prompt_token_ids=ids, sampling=GREEDY))
    (sequence,) = new_sequences(asked, eos_token_ids=[], max_model_len=256)
    while len(sequence.token_ids) < len(ids) + 12:
        done = len(sequence.token_ids) - len(ids)
        drafter.step([sequence], [[*plain[done : done + 1], 299]] if done else [[]])
    assert sequence.token_ids[len(ids) :][:12] == plain
    assert drafter.most_replayed > 8
