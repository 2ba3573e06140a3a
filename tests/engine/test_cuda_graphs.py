"""What CUDA graphs need of the engine, without a GPU: a replay is the same forward over the same tensors once more.

Sizes, padding and the tensors that steps read are those of a GPU; attention and states run by the CPU's kernels, which
read lengths and slots from the tensors as the Triton kernels do. tests/gpu has the graphs themselves.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.context import DecodeInputs, ForwardContext
from engine.core import captured_steps, runner
from engine.core.cuda_graphs import MAX_ROWS, CudaGraphs, Step, StepInputs, sizes
from engine.engine import Engine
from engine.lora import slots
from engine.lora.adapter import Adapter
from engine.ops import cpu
from tests.engine.test_decode_graphs import MODELS, engine, tokens

PROMPTS = [[5 + i] * (1 + 7 * i) + list(range(3, 9 + i)) for i in range(6)]
LENGTHS = [30, 3, 22, 11, 40, 5]


def test_sizes() -> None:
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 4]
    assert sizes(4) == [1, 2, 4]
    assert sizes(17) == [1, 2, 4, 8, 16, 24]
    assert sizes(1000)[-1] == MAX_ROWS


def test_inputs_of_a_step() -> None:
    """Rows, the rows of nobody, and tables that grow, shrink and change hands."""
    inputs = StepInputs(4, 6, 4, torch.device("cpu"))
    # ids, computed, tables, and slots of states, which serve as those of adapters too
    steps = [
        ([7, 8, 9], [5, 0, 3], [[3, 5], [2], [9]], [4, 1, 2]),
        ([1, 1, 1], [8, 1, 4], [[3, 5, 6], [2], [9, 1]], [4, 1, 2]),
        ([2], [1], [[9, 1]], [3]),
        ([3, 3], [1, 17], [[8, 1], [2, 4, 6, 8, 10]], [3, 5]),
    ]
    for ids, computed, tables, own in steps:
        inputs.write(4, ids, computed, tables, own, own)
        count = len(ids)
        assert [x.tolist() for x in inputs.fed(4)] == [x.tolist() for x in inputs.given(4)]
        assert inputs.token_ids.tolist() == ids + [0] * (4 - count)
        assert inputs.positions.tolist() == computed + [0] * (4 - count)
        assert inputs.kv_lens.tolist() == [position + 1 for position in computed] + [1] * (4 - count)
        assert inputs.state_slots.tolist() == own + [0] * (4 - count)
        assert inputs.adapter_slots.tolist() == own + [-1] * (4 - count)
        places = [table[position // 4] * 4 + position % 4 for position, table in zip(computed, tables, strict=True)]
        assert inputs.slot_mapping.tolist() == places + [0] * (4 - count)
        for row, table in enumerate(tables):
            assert inputs.tables[row, : len(table)].tolist() == table
        assert inputs.tables[count:, 0].tolist() == [0] * (4 - count)


def test_inputs_from_the_step_before() -> None:
    """Rows take the tokens of other rows; one that has none there is nobody's. What a step draws with is its own."""
    inputs = StepInputs(4, 6, 4, torch.device("cpu"))
    inputs.sampled.copy_(torch.tensor([31, -1, 33, 34]))
    draws = [0.5, 1.0, 3, 0.9, 0.1] * 3
    inputs.write(4, [0] * 3, [5, 6, 7], [[3, 5], [2, 1], [9, 4]], [4, 1, 2], [-1] * 3, draws, [2, 1, 0])
    token_ids, slots, states = inputs.fed(4)
    assert token_ids.tolist() == [33, 0, 31, 0]
    assert slots.tolist() == [21, 0, 19, 0]
    assert states.tolist() == [4, 0, 2, 0]
    assert inputs.draws.flatten().tolist() == draws + [0.0] * 5
    assert inputs.sampled.tolist() == [31, -1, 33, 34]


def run_again(step: Step) -> Step:
    """In place of a capture: runs the step, as a warm-up does, and again at each replay."""
    step()
    return step


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Runners on the CPU get CudaGraphs. Filled with (sequences, rows) of each step."""
    steps: list[tuple[int, int]] = []

    class Counting(CudaGraphs):
        def _replayed(self, kind: Any, tokens: Any, *args: Any) -> Any:
            rows = super()._replayed(kind, tokens, *args)
            if rows is not None or kind == "logits":  # what is not launched asks for logits next
                steps.append((len(tokens), rows or 0))
            return rows

    def make(loaded: Any, model: Any, cache: Any, states: Any, max_sequences: int) -> Any:
        if not loaded.engine_config.enable_decode_graphs:
            return None
        return Counting(model, cache, states, loaded.info.max_model_len, max_sequences, capture=run_again)

    monkeypatch.setattr(runner, "captured_steps", make)
    assert captured_steps.captured_steps is not make
    return steps


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
@pytest.mark.parametrize("kind", MODELS)
def test_padded_steps_give_the_same_tokens(kind: str, tmp_path: Path, padded: list[tuple[int, int]]) -> None:
    """While requests end one by one, so that steps of 6 to 1 sequences run in 8, 4, 2 rows and 1."""
    path = MODELS[kind](tmp_path / "model")
    wanted = tokens(engine(path, tmp_path / "eager", enable_decode_graphs=False), PROMPTS, LENGTHS)
    assert not padded
    graphs = engine(path, tmp_path / "graphs", max_running_requests=6)
    assert tokens(graphs, PROMPTS, LENGTHS) == wanted
    assert {(6, 8), (5, 8), (3, 4), (2, 2), (1, 1)} <= set(padded)
    assert all(rows for _, rows in padded)
    assert tokens(graphs, PROMPTS[::-1], LENGTHS[::-1]) == dict(
        zip(map(str, range(6)), reversed(wanted.values()), strict=True)
    )


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
def test_rows_of_nobody_write_nothing_of_others(tmp_path: Path) -> None:
    """Three sequences in four rows: beside what they write, the null block and the null slot alone change."""
    made = engine(MODELS["hybrid"](tmp_path / "model"), tmp_path / "state", max_running_requests=4)
    loaded = made._models["tiny"]
    assert loaded.runner is not None
    model, cache, states = loaded.runner._model, loaded.runner._cache, loaded.runner._states
    assert states is not None
    generator = torch.Generator().manual_seed(0)
    everything = [*cache.keys, *cache.values, *states.windows, *states.matrices]
    for tensor in everything:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    before = [tensor.clone() for tensor in everything]
    computed, tables, state_slots = [9, 3, 20], [[4], [7], [2, 9]], [3, 1, 4]
    with torch.inference_mode():
        graphs = CudaGraphs(model, cache, states, 64, 4, capture=run_again)
        padded = graphs.logits([11, 12, 13], computed, tables, state_slots, [None] * 3)
        assert padded is not None
        padded = padded.clone()
        size = cache.block_size
        written = [table[p // size] * size + p % size for p, table in zip(computed, tables, strict=True)]
        for tensor, old in zip(everything, before, strict=True):
            own = set(written) if tensor.shape[1] == size else set(state_slots)
            flat, flat_old = (x.flatten(0, 1) if tensor.shape[1] == size else x for x in (tensor, old))
            nobodys = size if tensor.shape[1] == size else 1
            changed = (flat != flat_old).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert own <= set(changed)
            assert all(at in own or at < nobodys for at in changed)
            tensor.copy_(old)
        width = max(len(table) for table in tables)
        lens = torch.tensor([p + 1 for p in computed])
        ctx = ForwardContext(
            positions=torch.tensor(computed),
            cu_seqlens=torch.arange(4, dtype=torch.int32),
            seq_starts=range(4),
            kv_lens=lens.tolist(),
            cache=cache,
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            slot_mapping=torch.tensor(written),
            decode=DecodeInputs(torch.arange(3), lens, torch.tensor(state_slots)),
            states=states,
            state_slots=state_slots,
            scratch={},
        )
        alone = model.compute_logits(model(torch.tensor([11, 12, 13]), ctx))
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def adapter(made: Engine, name: str, rank: int, part: str) -> Adapter:
    """Over the linears whose names end so."""
    generator = torch.Generator().manual_seed(rank)
    modules = {}
    for module, linear in made._models["tiny"].model.linears().items():
        if module.endswith(part):
            a = torch.randn(rank, linear.in_features, generator=generator) * 0.2
            modules[module] = (a, torch.randn(linear.out_features, rank, generator=generator) * 0.2)
    return Adapter(name=name, version=1, rank=rank, alpha=6.0, modules=modules)


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_several_adapters(
    kind: str, tmp_path: Path, padded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other modules and ranks, beside the base, and fewer as requests end. With two slots, steps of three are not
    captured."""
    path = MODELS[kind](tmp_path / "model")
    given = ["q", None, "all", "q", "wide", None]

    def run(folder: str, **options: Any) -> dict[str, list[int]]:
        made = engine(path, tmp_path / folder, **options)
        for name, rank, part in (("q", 3, "q_proj"), ("all", 2, "proj"), ("wide", 11, "down_proj")):
            made._models["tiny"].adapters.publish(adapter(made, name, rank, part))
        return tokens(made, PROMPTS, LENGTHS, given)

    wanted = run("eager", enable_decode_graphs=False)
    assert run("graphs", max_running_requests=6) == wanted
    assert all(rows for _, rows in padded)
    padded.clear()
    monkeypatch.setattr(slots, "NUM_SLOTS", 2)
    assert run("few", max_running_requests=6) == wanted
    assert {bool(rows) for _, rows in padded} == {True, False}


def test_adapters_that_have_no_slot() -> None:
    """Factors of experts, and of another type."""
    given = slots.AdapterSlots(["q_proj"], torch.device("cpu"), torch.float32)
    a, b = torch.ones(2, 8), torch.ones(4, 2)

    def assigned(modules: dict[str, Any]) -> Any:
        return given.assign([None, Adapter(name="a", version=1, rank=2, alpha=2.0, modules=modules)])

    assert assigned({"q_proj": (a, b)}) == ([-1, 0], slots.Reach(frozenset({"q_proj"}), 8))
    assert assigned({"experts.down_proj": (a[None], b[None])}) is None
    assert assigned({"q_proj": (a.double(), b.double())}) is None
    assert assigned({"q_proj": (a.T.contiguous().T, b)}) is None
    assert given.assign([None]) == ([-1], slots.Reach(frozenset(), 8))


@pytest.mark.parametrize("part", ["all", "choice"])
def test_what_cannot_be_captured_runs_as_it_is(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why, once for each size and kind of step, and the tokens are right: where the choice of tokens is
    what cannot be captured, steps end with the logits."""
    path = MODELS["llama"](tmp_path / "model")
    wanted = tokens(engine(path, tmp_path / "eager", enable_decode_graphs=False), PROMPTS[:3], LENGTHS[:3])
    asked = []

    def refuse(step: Step) -> Step:
        asked.append(step)
        if part == "choice" and len(asked) % 2 == 0:
            return run_again(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(
        runner,
        "captured_steps",
        lambda loaded, model, cache, states, count: CudaGraphs(model, cache, states, 64, count, capture=refuse),
    )
    with caplog.at_level(logging.WARNING):
        assert tokens(engine(path, tmp_path / "refused", max_running_requests=4), PROMPTS[:3], LENGTHS[:3]) == wanted
    said = [record.message for record in caplog.records if "not captured" in record.message]
    kinds = ("greedy", "logits") if part == "all" else ("greedy",)
    assert [message.split(" are ")[0] for message in said] == [
        f"decode steps of {size} rows ({kind})" for size in (4, 2, 1) for kind in kinds
    ]
    assert len(asked) == 6
    assert all("stream is capturing" in message for message in said)


def test_a_step_that_asks_the_host_for_lengths_is_not_captured(tmp_path: Path) -> None:
    """In float64, which no kernel takes, attention in torch asks for them."""
    made = engine(MODELS["llama"](tmp_path / "model"), tmp_path / "state")
    loaded = made._models["tiny"]
    assert loaded.runner is not None
    model, cache = loaded.runner._model.double(), loaded.runner._cache
    cache.keys = [x.double() for x in cache.keys]
    cache.values = [x.double() for x in cache.values]
    with torch.inference_mode():
        assert CudaGraphs(model, cache, None, 64, 2, capture=run_again).logits([5], [3], [[2]], [], [None]) is None
