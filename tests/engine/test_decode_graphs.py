"""Captured decode steps give what steps that are not captured give, for the families that are meant to be captured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.core import decode_graphs
from engine.core.decode_graphs import DecodeGraphs
from engine.engine import Engine
from engine.lora.adapter import Adapter
from engine.ops import cpu
from engine.request import Request, SamplingParams
from tests.tiny import save_tiny_hybrid, save_tiny_llama

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

MODELS: dict[str, Any] = {
    "llama": save_tiny_llama,
    "hybrid": save_tiny_hybrid,
}


def engine(path: Path, state: Path, **options: Any) -> Engine:
    made = Engine(EngineConfig(device="cpu", dtype="float32", num_threads=2, state_dir=str(state), **options))
    made.load_model("tiny", path)
    return made


def tokens(
    made: Engine, prompts: list[list[int]], lengths: list[int], adapters: Sequence[str | None] = ()
) -> dict[str, list[int]]:
    """What greedy requests of those lengths give, which end at different steps."""
    names = adapters or [None] * len(prompts)
    for number, (prompt, length, name) in enumerate(zip(prompts, lengths, names, strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        asked = Request(request_id=str(number), model="tiny", prompt_token_ids=prompt, sampling=sampling, adapter=name)
        made.add_request(asked)
    found: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while made.has_requests():
        for output in made.step():
            assert output.finish_reason != "error", output.error_message
            found[output.request_id] += output.token_ids
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_captured_steps_give_the_same_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MODELS[kind](tmp_path / "model")
    steps: list[bool] = []
    run = DecodeGraphs.logits

    def counted(self: DecodeGraphs, *args: Any) -> Any:
        logits = run(self, *args)
        steps.append(logits is not None)
        return logits

    monkeypatch.setattr(DecodeGraphs, "logits", counted)
    # Steps that repeat the one before have tests of their own.
    monkeypatch.setattr(DecodeGraphs, "can_go_on", False)
    prompts = [[5 + i] * (1 + 7 * i) + list(range(3, 9 + i)) for i in range(5)]
    lengths = [30, 3, 22, 11, 40]
    wanted = tokens(engine(path, tmp_path / "eager", enable_decode_graphs=False), prompts, lengths)
    assert not steps
    captured = engine(path, tmp_path / "captured")
    assert tokens(captured, prompts, lengths) == wanted
    assert len(steps) > 30
    assert all(steps)
    assert tokens(captured, prompts[::-1], lengths[::-1]) == dict(
        zip(map(str, range(5)), reversed(wanted.values()), strict=True)
    )


def adapter(made: Engine, name: str, rank: int, part: str, seed: int = 0) -> Adapter:
    """Over the linears whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, linear in made._models["tiny"].model.linears().items():
        if module.endswith(part):
            a = torch.randn(rank, linear.in_features, generator=generator) * 0.2
            modules[module] = (a, torch.randn(linear.out_features, rank, generator=generator) * 0.2)
    return Adapter(name=name, version=1, rank=rank, alpha=6.0, modules=modules)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_several_adapters(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other modules and ranks, beside the base, and fewer as requests end; later versions are found as well. Where
    more sets of modules come than are captured for, steps run as they are."""
    path = MODELS[kind](tmp_path / "model")
    prompts = [[5 + i] * (1 + 7 * i) + list(range(3, 9 + i)) for i in range(6)]
    lengths = [30, 3, 22, 11, 40, 14]
    given = ["q", None, "all", "q", "wide", None]
    steps: list[bool] = []
    run = DecodeGraphs.logits

    def counted(self: DecodeGraphs, *args: Any) -> Any:
        logits = run(self, *args)
        steps.append(logits is not None)
        return logits

    def served(folder: str, **options: Any) -> list[dict[str, list[int]]]:
        made = engine(path, tmp_path / folder, **options)
        found = []
        for version in range(2):
            for name, rank, part in (("q", 3, "q_proj"), ("all", 2, "proj"), ("wide", 11, "down_proj")):
                made._models["tiny"].adapters.publish(adapter(made, name, rank, part, version))
            found.append(tokens(made, prompts, lengths, given))
        return found

    wanted = served("eager", enable_decode_graphs=False)
    assert wanted[0]["0"] != wanted[1]["0"]
    monkeypatch.setattr(DecodeGraphs, "logits", counted)
    assert served("captured") == wanted
    assert len(steps) > 10
    assert all(steps)
    steps.clear()
    monkeypatch.setattr(decode_graphs, "MAX_REACHES", 1)
    assert served("few") == wanted
    assert not all(steps)


def test_a_model_of_which_torch_computes_a_part_is_not_captured(tmp_path: Path) -> None:
    """Routed experts are multiplied by torch: every step is run as it is, and gives tokens."""
    path = save_tiny_hybrid(tmp_path / "model", experts=True)
    prompts, lengths = [[3, 4, 5], [6, 7]], [12, 9]
    wanted = tokens(engine(path, tmp_path / "eager", enable_decode_graphs=False), prompts, lengths)
    assert tokens(engine(path, tmp_path / "captured"), prompts, lengths) == wanted
