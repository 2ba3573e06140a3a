"""The benchmark of the delta rule works: a line of JSON for each measure, with the ratio of its two numbers."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench.delta_rule import main


def test_a_quick_run_prints_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--quick", "--rounds", "1"])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["measure"] for line in lines] == ["delta_rule_forward", "delta_rule_training"]
    for line in lines:
        assert line["ratio"] == pytest.approx(line["tokens_per_second"] / line["transformers"])
