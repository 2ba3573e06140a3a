"""The benchmark works: every measure gives a number, in lines of JSON of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch

from tests.bench.__main__ import MEASURES, main
from tests.bench.setup import LOWER_IS_BETTER

SCHEMA = ["measure", "value", "unit", "peer", "peer_value", "ratio", "model", "threads", "versions"]
WITHOUT_PEER = {"decode_1_q8", "start", "front_end"}
"""Measures whose peers are not in this environment, or of which there is none."""

WITHOUT_FLOOR = {"start", "grpc_overhead", "grpc_64", "front_end"}


@pytest.fixture(autouse=True)
def restored_threads(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The number of threads is the whole process's; peers of this machine have no part in tests."""
    monkeypatch.setenv("WHET_BENCH_PEERS", str(tmp_path_factory.mktemp("peers")))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SAME_CODE = {
    "train",
    "train_qv",
    "hybrid_train_qv",
    "hybrid_train_qv_q8",
    "embed_q8",
    "prefill_q8",
    "hybrid_prefill_q8",
    "hybrid_decode_8",
    "decode_8",
}
"""Measures that differ from another one in numbers alone."""


@pytest.mark.parametrize(
    "measure", [pytest.param(name, marks=[pytest.mark.slow] if name in SAME_CODE else []) for name in MEASURES]
)
def test_a_quick_run_prints_a_line_of_the_schema(measure: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([measure, "--quick", "--threads", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["measure"] == measure
    assert {line["measure"] for line in lines[1:]} <= {f"{measure}_memory"}
    for line in lines:
        assert list(line)[: len(SCHEMA)] == SCHEMA
        assert math.isfinite(line["value"])
        assert line["value"] > 0
        model = "tiny-qwen3.5" if measure.startswith("hybrid") else "tiny-llama"
        assert line["model"].startswith(model)
        assert (line["threads"], line["quick"]) == (1, True)
        if measure in WITHOUT_PEER:
            assert (line["peer"], line["peer_value"], line["ratio"]) == (None, None, None)
        else:
            ratio = line["value"] / line["peer_value"]
            expected = 1 / ratio if line["unit"] in LOWER_IS_BETTER else ratio
            assert line["ratio"] == pytest.approx(expected, rel=0.01)
        if measure not in WITHOUT_FLOOR and not line["measure"].endswith("_memory"):
            # Even of a tiny model, no more than a machine can do. A small matrix underrates it, so there is a margin.
            assert 0 < line["floor_fraction"] < 3
            assert min(line["limits"].values()) > 0


def test_peers_that_are_left_out_have_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["decode_1", "--quick", "--threads", "1", "--no-compare"])
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (line["peer"], line["ratio"]) == (None, None)


def test_an_unknown_measure_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "decode_1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--threads", "--rounds"])
def test_a_number_that_makes_no_sense_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, "0"])
    assert f"{option} is 0; accepted: 1, 2, 3" in capsys.readouterr().err
