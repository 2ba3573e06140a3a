"""torch's operations take one thread where theirs are small, and all of them everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.ops import cpu
from engine.ops.torch_threads import SMALL, threads_for
from engine.training import optimizer, segments
from engine.training.trainer import train
from tests.tiny import save_tiny_llama
from tests.training_runs import load_tiny, make_spec, random_examples


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_work_has_one_thread_and_large_work_all() -> None:
    with threads_for(SMALL):
        assert torch.get_num_threads() == 1
        with threads_for(SMALL + 1):
            assert torch.get_num_threads() == 1  # it is part of something small
        with threads_for(0):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with threads_for(SMALL + 1):
        assert torch.get_num_threads() == 3


def test_an_error_gives_the_threads_back() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), threads_for(1):
        raise RuntimeError("on purpose")
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
@pytest.mark.parametrize("is_small", [True, False])
def test_a_training_step_of_few_tokens_has_one_thread(
    is_small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and update; whoever has the engine between two slices has all threads."""
    if not is_small:
        monkeypatch.setattr("engine.ops.torch_threads.SMALL", 1)
    seen: dict[str, set[int]] = {"forward": set(), "backward": set(), "update": set()}

    def recorded(name: str, run: Any) -> Any:
        def wrapper(*args: Any, **named: Any) -> Any:
            seen[name].add(torch.get_num_threads())
            return run(*args, **named)

        return wrapper

    monkeypatch.setattr(segments.torch.autograd, "backward", recorded("backward", torch.autograd.backward))
    monkeypatch.setattr(optimizer, "_adam", recorded("update", optimizer._adam))
    plain = segments.Segments._segment

    def segment(self: segments.Segments, state: Any, run: Any, gradients: bool, name: str) -> Any:
        return plain(self, state, recorded("forward", run), gradients, name)

    monkeypatch.setattr(segments.Segments, "_segment", segment)
    loaded = load_tiny(save_tiny_llama(tmp_path / "model"), tmp_path / "state")
    between = {
        torch.get_num_threads() for _ in train(make_spec(tmp_path, random_examples([9, 8]), max_steps=2), loaded)
    }
    threads = {1} if is_small else {3}
    assert seen == {"forward": threads, "backward": threads, "update": threads}
    assert between == {3}
