"""A micro-batch in segments of a layer: states, loss and gradients of one graph, to the bit, in every family."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from engine.core.loaded import LoadedModel
from engine.core.staged import StagedForward
from engine.jobs import LoRAParams, Pause
from engine.training import segments as segments_module
from engine.training.batching import MicroBatch
from engine.training.dataset import Examples
from engine.training.forward import TrainingForward
from engine.training.lora_init import masters, new_adapter
from engine.training.passes import accumulate_gradients
from tests.engine.test_activation_checkpointing import FAMILIES
from tests.training_runs import load_tiny, random_examples

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Examples.of(random_examples([40, 24, 33, 30]))
R = TypeVar("R")


def drained(slices: Generator[Pause | None, None, R]) -> tuple[R, list[Pause | None]]:
    """What a generator returns, and its pauses."""
    pauses = []
    while True:
        try:
            pauses.append(next(slices))
        except StopIteration as end:
            return end.value, pauses


def adapter_for(loaded: LoadedModel, dropout: float, layers: list[int]) -> tuple[object, dict[str, torch.nn.Parameter]]:
    adapter = new_adapter("a", loaded.model.linears(), LoRAParams(rank=4, dropout=dropout, layers=layers), 0, "cpu")
    parameters = masters(adapter)
    filler = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0.0, 0.05, generator=filler)  # with B = 0, A has no gradient
    return adapter, parameters


CUTS = {"layers": [False], "stages": [True], "now and then": [True, False, False]}
"""Whether requests are being served, at each layer in turn."""


def gradients(
    loaded: LoadedModel, serving: list[bool] | None, dtype: torch.dtype, dropout: float, layers: list[int]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of two micro-batches, in segments, or of one graph each where serving is None."""
    loaded.is_serving = itertools.cycle(serving or [False]).__next__
    adapter, parameters = adapter_for(loaded, dropout, layers)
    batches = [MicroBatch.of(EXAMPLES[:2]), MicroBatch.of(EXAMPLES[2:])]
    forward = TrainingForward(loaded, dtype)
    generator = torch.Generator().manual_seed(2) if dropout else None
    count = EXAMPLES.num_loss_tokens
    if serving is not None:
        total, _ = drained(accumulate_gradients(forward, batches, adapter, count, generator))  # type: ignore[arg-type]
    else:
        total = 0.0
        for batch in batches:
            with torch.enable_grad():
                hidden = forward.hidden(batch, adapter, generator)[batch.rows]  # type: ignore[arg-type]
            (nll, gradient), _ = drained(forward.nll_slices(hidden, batch, gradient=True))
            assert gradient is not None
            hidden.backward(gradient * (1.0 / count))  # type: ignore[no-untyped-call]
            total += nll
    return total, {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layers", [[], [2]], ids=["all layers", "the third layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, dropout: float, layers: list[int], cut: str
) -> None:
    """However layers are cut."""
    monkeypatch.setattr(segments_module, "FINE_TOKENS", 1)
    loaded = load_tiny(FAMILIES[family](tmp_path / "model"), tmp_path / "state")
    whole_loss, whole = gradients(loaded, None, torch.float32, dropout, layers)
    loss, segmented = gradients(loaded, CUTS[cut], torch.float32, dropout, layers)
    assert loss == whole_loss
    assert segmented.keys() == whole.keys()
    assert segmented
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, segmented[name]), name


def test_under_autocast_as_well(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path) -> None:
    """bfloat16 over a model in float32."""
    monkeypatch.setattr(segments_module, "FINE_TOKENS", 1)
    loaded = load_tiny(tiny_llama, tmp_path / "state")
    whole_loss, whole = gradients(loaded, None, torch.bfloat16, 0.0, [])
    loss, segmented = gradients(loaded, [True], torch.bfloat16, 0.0, [])
    assert loss == whole_loss
    assert all(torch.equal(gradient, segmented[name]) for name, gradient in whole.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_give_the_models_own_forward(tmp_path: Path, family: str) -> None:
    """Whatever a family does around its layers, stages do the same."""
    loaded = load_tiny(FAMILIES[family](tmp_path / "model"), tmp_path / "state")
    model, batch = loaded.causal_lm(), MicroBatch.of(EXAMPLES[:2])
    with torch.no_grad():
        whole = model(batch.token_ids, batch.context(None))
        stages = StagedForward(model, batch.token_ids, batch.context(None))
        x = stages.x
        for index in range(len(stages)):
            x = stages.run(index, x)
        assert torch.equal(stages.finish(x), whole)
        state: tuple[Tensor, ...] = (stages.x,)
        for index in range(len(stages)):
            for stage in stages.stages(index, fine=True):
                state = stage(state)
        assert torch.equal(stages.finish(*state), whole)
        finest = [len(stages.stages(index, fine=True)) for index in range(len(stages))]
    assert len(stages) == loaded.config.num_hidden_layers
    mixers = [1 if kind == "linear_attention" else 3 for kind in loaded.config.layer_types]
    assert finest == [mixer + (1 if family == "moe" else 3) for mixer in mixers]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_the_logits_are_the_logits(tmp_path: Path, family: str) -> None:
    """The head in parts gives what the whole head gives, soft cap and all."""
    loaded = load_tiny(FAMILIES[family](tmp_path / "model"), tmp_path / "state")
    model, hidden = loaded.causal_lm(), torch.randn(9, loaded.config.hidden_size)
    with torch.no_grad():
        parts = [model.compute_logits_part(hidden, *bounds) for bounds in ((0, 7), (7, 130), (130, 300))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.compute_logits(hidden)[:, :300])


def test_every_layer_is_a_pause(tiny_llama: Path, tmp_path: Path) -> None:
    """No piece is more than a layer: as many pauses in forward and backward as there are layers, and more."""
    loaded = load_tiny(tiny_llama, tmp_path / "state")
    adapter, _ = adapter_for(loaded, 0.0, [])
    batch = MicroBatch.of(EXAMPLES[:1])
    forward = TrainingForward(loaded, torch.float32)
    _, pauses = drained(accumulate_gradients(forward, [batch], adapter, batch.num_loss_tokens))  # type: ignore[arg-type]
    kinds = [pause.kind for pause in pauses if pause is not None]
    layers = loaded.config.num_hidden_layers
    assert kinds.count("forward") == layers
    assert kinds.count("backward") == layers
    assert {pause.size for pause in pauses if pause is not None and pause.kind == "forward"} == {batch.num_tokens}


def test_graphs_are_freed_on_the_way_back(tiny_llama: Path, tmp_path: Path) -> None:
    """Once a segment's backward is done, nothing of it is kept."""
    loaded = load_tiny(tiny_llama, tmp_path / "state")
    adapter, _ = adapter_for(loaded, 0.0, [])
    batch = MicroBatch.of(EXAMPLES[:1])
    segments = TrainingForward(loaded, torch.float32).segments(batch, adapter)  # type: ignore[arg-type]
    hidden, _ = drained(segments.forward())
    kept = [len(segments._graphs)]
    for _ in segments.backward(torch.ones_like(hidden)):
        kept.append(len(segments._graphs))
    assert kept == [3, 3, 2, 1]
    assert not segments._graphs
