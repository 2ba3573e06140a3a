"""Checkpoints: whole or absent, the best one linked, the old ones gone, malformed ones refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import FormatError
from engine.lora.adapter import Adapter
from engine.lora.peft import load_adapter
from engine.training import checkpoint
from engine.training.checkpoint import Checkpoints, RunState
from tests.unit.test_lora_peft import LINEARS, make_adapter


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "tiny", LINEARS)


def adapter(step: int) -> Adapter:
    made = make_adapter()
    for a, _ in made.modules.values():
        a.fill_(float(step))
    return made


def write(checkpoints: Checkpoints, step: int, *, is_best: bool = False, **state: Any) -> Path:
    optimizer = {"m.lora_A:exp_avg": torch.full((2, 2), float(step))}
    return checkpoints.write(adapter(step), optimizer, RunState(step=step, **state), is_best=is_best)


def test_what_was_written_comes_back(checkpoints: Checkpoints) -> None:
    """State, masters and optimizer of the last one, floats exactly."""
    state: dict[str, Any] = {"best_nll": 0.1 + 0.2, "seconds": 1 / 3, "fingerprint": "f", "parent_name": "tone"}
    path = write(checkpoints, 7, **state)
    latest = checkpoints.read_latest()
    assert latest is not None
    assert latest[0] == RunState(step=7, **state)
    assert latest[1] == path
    assert latest[2]["m.lora_A:exp_avg"].tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert load_adapter(path, LINEARS, name="tone").modules["model.layers.0.mlp.up_proj"][0].unique().tolist() == [7.0]


def test_the_best_and_the_last_two_stay(checkpoints: Checkpoints) -> None:
    """The link follows the best one, which outlives the others."""
    for step in range(1, 7):
        write(checkpoints, step, is_best=step in (1, 3))
    assert checkpoints.steps() == [3, 5, 6]
    assert checkpoints.best_step() == 3
    assert json.loads((checkpoints.best / "state.json").read_text())["step"] == 3


def test_a_step_can_be_written_again(checkpoints: Checkpoints) -> None:
    """With what was learnt since, here an evaluation; the link still holds."""
    write(checkpoints, 4)
    write(checkpoints, 4, is_best=True, evaluated_step=4)
    latest = checkpoints.read_latest()
    assert latest is not None
    assert latest[0].evaluated_step == 4
    assert checkpoints.best_step() == 4
    assert checkpoints.steps() == [4]


@pytest.mark.parametrize("function", ["save_adapter", "save_file", "write_synced", "sync"])
def test_a_failed_write_leaves_the_one_before(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Wherever the disk runs full, nothing new bears a final name, and the last one reads as before."""
    write(checkpoints, 1, is_best=True)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, full)
        with pytest.raises(OSError, match="No space left"):
            write(checkpoints, 2)
    assert checkpoints.steps() == [1]
    assert sorted(p.name for p in checkpoints.best.parent.iterdir()) == ["best", "step-00000001"]
    assert checkpoints.best_step() == 1


def test_leftovers_of_a_crash_are_cleared(checkpoints: Checkpoints) -> None:
    """A directory that was never renamed is no checkpoint, and goes when the run begins again."""
    path = write(checkpoints, 1)
    half = path.parent / ".step-00000002.99"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert checkpoints.steps() == [1]
    checkpoints.clear_unfinished()
    assert [p.name for p in path.parent.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "seven"}', "\x00"])
def test_malformed_states_are_refused(checkpoints: Checkpoints, content: str) -> None:
    """With an error that names the file, not a crash later."""
    path = write(checkpoints, 1)
    (path / "state.json").write_text(content)
    with pytest.raises(FormatError, match="step-00000001"):
        checkpoints.read_latest()


def test_a_pickle_is_not_read(checkpoints: Checkpoints) -> None:
    """An optimizer state that is no safetensors file is refused unread."""
    path = write(checkpoints, 1)
    torch.save({"x": torch.zeros(1)}, path / "optimizer.safetensors")
    with pytest.raises(FormatError, match="cannot be read as a checkpoint"):
        checkpoints.read_latest()


def test_nothing_there(checkpoints: Checkpoints) -> None:
    """A new run has no checkpoint."""
    assert checkpoints.read_latest() is None
    assert checkpoints.best_step() is None
    checkpoints.clear_unfinished()
