"""The regression check finds what fell, and its loop computes what transformers does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bench import check
from tests.bench.__main__ import main
from tests.bench.fixed_loop import FixedLoop, shape_of
from tests.bench.models import load_reference
from tests.bench.setup import Bench
from tests.tiny import save_tiny_llama


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    before = torch.get_num_threads()
    made = Bench(tmp_path, quick=True, threads=1)
    yield made
    made.release()
    torch.set_num_threads(before)


@pytest.mark.parametrize("tied", [False, True])
def test_the_fixed_loop_gives_the_logits_of_transformers(tmp_path: Path, tied: bool) -> None:
    model = load_reference(save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied))
    loop = FixedLoop(model.state_dict(), shape_of(model.config), 64)
    ids = list(range(5, 45))
    for _ in range(2):
        loop.forward(ids[:30])
        loop.forward(ids[30:38])  # a chunk behind a context
        loop.forward(ids[38:39])
        logits = loop.forward(ids[39:])
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1]
        assert (logits - wanted).abs().max() < 1e-4
        loop.reset()


def test_a_record_is_what_a_later_check_compares_with(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"another machine": {"torch": "1", "ratios": {"decode_1": 5.0}}}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"no ratios to compare with .* there are those of: another machine"):
        check.check(bench, path=path)
    check.record(bench, path)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written.keys() == {"another machine", check.conditions(bench)}
    ratios = written[check.conditions(bench)]["ratios"]
    assert ratios.keys() == check.measures(bench).keys()
    assert min(ratios.values()) > 0
    # What this machine cannot fall short of, and what it cannot reach.
    written[check.conditions(bench)]["ratios"] = dict.fromkeys(ratios, 1e-6) | {"prefill": 1e6}
    path.write_text(json.dumps(written), encoding="utf-8")
    (message,) = check.check(bench, path=path)
    assert message.startswith("prefill: the ratio to the fixed loop is ")


def test_only_what_fell_by_more_than_the_margin_is_told() -> None:
    reference = {"a": 1.0, "b": 2.0, "c": 4.0, "gone": 1.0}
    assert check.fallen({"a": 0.8, "b": 1.4, "c": 9.0, "new": 0.1}, reference, 0.25) == [
        "b: the ratio to the fixed loop is 1.400, 30% below 2.000; the margin is 25%"
    ]


def test_the_exit_status_says_whether_something_fell(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for messages in ([], ["prefill fell"]):
        monkeypatch.setattr("tests.bench.__main__.check", lambda bench, margin, found=messages: found)
        assert main(["--check"]) == len(messages)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arguments", [["--check", "--quick"], ["--check", "--margin", "1"], ["--record", "decode_1"]])
def test_options_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
