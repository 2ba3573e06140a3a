"""The profile books operations where they belong, and the table of results keeps what people wrote."""

from __future__ import annotations

import ctypes
import json
import types
from pathlib import Path

import pytest
import torch

import engine.ops.norm
from tests.bench import attribution
from tests.bench.attribution import ATTENTION, ELEMENTWISE, GROUPS, NORMS, OPTIMIZER, PRODUCTS, PYTHON, attribute
from tests.bench.profile import PIECES, main
from tests.bench.table import AIMS, markdown, remarks_of
from tests.bench.table import main as print_table


def test_products_norms_and_other_operations_are_told_apart() -> None:
    x, weight = torch.randn(300, 300), torch.randn(300)

    def work() -> None:
        y = x @ x
        engine.ops.norm.rms_norm(y, weight, 1e-5)
        (y + 1).cos()

    before = engine.ops.norm.rms_norm
    found = attribute(work, rounds=2)
    assert engine.ops.norm.rms_norm is before
    assert found.calls[PRODUCTS] >= 1
    assert found.calls[NORMS] >= 1
    assert found.calls[ELEMENTWISE] >= 2
    assert found.calls[ATTENTION] == 0
    assert found.groups[PRODUCTS] > 0
    assert found.groups[PYTHON] == pytest.approx(
        max(0.0, found.seconds - sum(taken for group, taken in found.groups.items() if group != PYTHON))
    )
    assert "aten::mm" in dict(found.top)


def test_kernels_behind_ctypes_are_timed_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(None)
    module = types.ModuleType("engine.kernels_of_this_test")
    module._library, module._attention = library, library.labs  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    results: list[int] = []

    def work() -> None:
        results.append(module._library.abs(-3))  # type: ignore[attr-defined]
        results.append(module._attention(-4))  # type: ignore[attr-defined]

    found = attribute(work, repeats=2, rounds=2)
    assert results == [3, 4] * 4  # two rounds, with the profiler and without
    assert (found.calls[ELEMENTWISE], sum(found.calls.values())) == (1, 1)  # of two, for each of the two repeats
    assert {"kernel abs", "kernel labs"} <= {name for name, _ in found.top}
    assert module._library is library  # type: ignore[attr-defined]
    assert not callable(getattr(module._attention, "__wrapped__", None))  # type: ignore[attr-defined]


class _Doubled(torch.autograd.Function):
    """A node of autograd around an operation, as the engine's are around kernels."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.mul(2.0)

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].mul(2.0)


def test_a_node_of_autograd_is_no_operation_beside_those_within_it() -> None:
    x = torch.randn(8, requires_grad=True)
    found = attribute(lambda: _Doubled.apply(x).sum().backward(), rounds=1)
    names = {name for name, _ in found.top}
    assert {"aten::mul", "aten::sum"} <= names
    assert not [name for name in names if "Doubled" in name or "autograd" in name]


@pytest.mark.parametrize("piece", ["decode", "prefill_q8", "train", "hybrid_decode"])
def test_a_quick_profile_prints_a_table(piece: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main([piece, "--quick", "--threads", "1", "--top", "3"])
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = {row[0].removeprefix("| ") for row in rows}
    assert {PRODUCTS, NORMS, ATTENTION, "**whole**", "floor"} <= names
    assert (OPTIMIZER in names) == (piece == "train")
    assert names & set(GROUPS)


def test_an_unknown_piece_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])
    said = capsys.readouterr().err
    assert all(name in said for name in PIECES)


def test_every_scope_is_a_part_of_the_engine() -> None:
    """A part that was renamed would be booked as elementwise operations, unseen."""
    with attribution._scopes():
        pass


# -------------------------------------------------------------------------------------------------------------- table


def _line(measure: str, peer: str | None, ratio: float | None, **more: object) -> dict[str, object]:
    line = {
        "measure": measure, "value": 90.0, "unit": "tokens/s", "peer": peer, "peer_value": ratio and 90 / ratio,
        "ratio": ratio, "model": "m", "threads": 2, "quick": False, "date": "2026-01-02", "machine": "a CPU",
        "limits": {"read_gb_per_second": 10, "float32_gflop_per_second": 80, "int8_gop_per_second": 200},
    }  # fmt: skip
    return line | more


def test_the_table_names_the_best_peer_and_keeps_remarks() -> None:
    slower = {"read_gb_per_second": 8, "float32_gflop_per_second": 80, "int8_gop_per_second": 199.6}
    lines = [
        _line("decode_1", "slow", 3.0, floor_fraction=0.5),
        _line("decode_1", "fast", 1.5, floor_fraction=0.5),
        _line("train_memory", None, None, unit="bytes", value=2.0**30, limits=slower),
    ]
    table = markdown(lines, {"decode_1": "attention"}).splitlines()  # type: ignore[arg-type]
    assert table[2] == (
        "| `decode_1` m | `python -m tests.bench decode_1` | 90 tokens/s | fast: 60 tokens/s | 1.50 | "
        ">= 1.4, >= 65% of the floor | 50% | attention |"
    )
    assert "| `train_memory` m | `python -m tests.bench train` | 1.00 GiB |  |  | >= 2 |  |  |" in table
    assert "| `embed` | `python -m tests.bench embed` | not measured |  |  | >= 1.4 |  |  |" in table
    assert table[-1] == "2026-01-02, a CPU, 2 threads: reads 8 to 10 GB/s, float32 80 GFLOP/s, int8 200 GOP/s."
    remarks = remarks_of("\n".join(table))
    assert remarks.keys() == AIMS.keys()
    assert {measure: remark for measure, remark in remarks.items() if remark} == {"decode_1": "attention"}


def test_a_quick_run_makes_no_table(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(_line("decode_1", None, None, quick=True)), encoding="utf-8")
    with pytest.raises(SystemExit):
        print_table([str(path)])
