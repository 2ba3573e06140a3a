"""The benchmark works: every measure gives a number, in a line of JSON of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch

from tests.bench.__main__ import MEASURES, main

COMPARED = set(MEASURES) - {"grpc_overhead"}


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    """The number of threads is the whole process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_quick_run_prints_one_line(measure: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([measure, "--quick", "--threads", "1"])
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["measure"] == measure
    assert math.isfinite(line["value"])
    assert line["unit"]
    model = "tiny-qwen3.5" if measure.startswith("hybrid") else "tiny-llama"
    assert (line["model"], line["threads"], line["quick"]) == (model, 1, True)
    if measure in COMPARED:
        assert line["value"] > 0
        ratio = line["value"] / line["transformers"]
        assert line["ratio"] == pytest.approx(1 / ratio if line["unit"] == "seconds" else ratio, rel=0.01)
    else:
        assert line["ratio"] == pytest.approx(
            line["server_seconds_per_token"] / line["engine_seconds_per_token"], rel=0.01
        )


def test_an_unknown_measure_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "decode_1" in capsys.readouterr().err
