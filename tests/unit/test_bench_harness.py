"""The benchmark's harness: lines, turns, peers' processes, and the counts that floors follow from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.bench.counts import count
from tests.bench.machine import Limits, Work
from tests.bench.models import GENERATOR, convert_gguf
from tests.bench.peers import EMBEDDERS, LLAMA_CPP, Peers
from tests.bench.peers.process import PeerError, PeerProcess, end_process
from tests.bench.setup import OURS, Bench
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.unit.loading_files import llama_metadata, llama_tensors, write_gguf

LIMITS = Limits(read_bytes_per_second=10e9, float32_flops_per_second=100e9, int8_operations_per_second=400e9)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path, quick=True, threads=1)
    made._limits = [LIMITS]
    return made


# -------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    ("unit", "ours", "theirs", "ratio"),
    [("tokens/s", 30.0, 20.0, 1.5), ("seconds", 2.0, 3.0, 1.5), ("bytes", 4.0, 2.0, 0.5)],
)
def test_a_ratio_above_one_means_that_ours_is_better(
    bench: Bench, capsys: pytest.CaptureFixture[str], unit: str, ours: float, theirs: float, ratio: float
) -> None:
    bench.report("work", unit, GENERATOR, {OURS: [ours], "other 1": [theirs]})
    line = json.loads(capsys.readouterr().out)
    assert (line["value"], line["peer"], line["peer_value"], line["ratio"]) == (ours, "other 1", theirs, ratio)


def test_each_peer_has_a_line_with_medians_and_its_version(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.know_version("other", "7.1")
    samples = {OURS: [9.0, 4.0, 5.0], "other F16": [1.0, 2.0, 50.0], "torch": [5.0, 5.0, 5.0]}
    bench.report(
        "work", "tokens/s", GENERATOR, samples, floor=lambda limits: limits.read_bytes_per_second / 1e9, streams=3
    )
    other, of_torch = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (other["value"], other["peer_value"], other["ratio"]) == (5.0, 2.0, 2.5)
    assert (other["spread"], other["peer_spread"], other["rounds"]) == ([4.0, 9.0], [1.0, 50.0], 3)
    assert (other["floor"], other["floor_fraction"], other["streams"]) == (10.0, 0.5, 3)
    assert other["versions"]["other"] == "7.1"
    assert of_torch["versions"]["torch"] == torch.__version__
    assert other["limits"] == {"read_gb_per_second": 10, "float32_gflop_per_second": 100, "int8_gop_per_second": 400}


def test_a_floor_of_seconds_is_a_fraction_the_other_way_round(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.report("work", "seconds", GENERATOR, {OURS: [4.0]}, floor=lambda _: 1.0)
    line = json.loads(capsys.readouterr().out)
    assert (line["floor_fraction"], line["peer"], line["ratio"]) == (0.25, None, None)


def test_sides_take_turns_and_what_warms_up_does_not_count(bench: Bench) -> None:
    calls: list[str] = []

    def side(name: str, first: float) -> object:
        values = iter([1000.0, first, first + 1])
        return lambda: (calls.append(name), next(values))[1]

    taken = bench.samples({"a": side("a", 1.0), "b": side("b", 5.0)}, rounds=2, warm_up=1)  # type: ignore[dict-item]
    assert calls == ["a", "b"] * 3
    assert taken == {"a": [1.0, 2.0], "b": [5.0, 6.0]}


def test_limits_are_medians_of_what_each_round_of_a_measure_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([Limits(1.0, 60.0, 7.0), Limits(9.0, 40.0, 8.0), Limits(2.0, 50.0, 9.0), Limits(4.0, 4.0, 4.0)])
    monkeypatch.setattr("tests.bench.setup.measure_limits", lambda quick: next(found))
    bench.release()
    bench.samples({"a": lambda: 1.0}, rounds=3, warm_up=1)
    assert bench.limits == Limits(2.0, 50.0, 8.0)
    bench.release()
    assert bench.limits == Limits(4.0, 4.0, 4.0)


# -------------------------------------------------------------------------------------------------------------- peers


def test_a_peer_that_is_not_there_is_named_once_with_what_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = Peers(root=tmp_path)
    assert peers.binary("llama-bench") is None
    assert peers.binary("llama-server") is None
    assert not peers.has_module("no_such_module")
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert LLAMA_CPP in notes[0]
    assert "make bench-peers" in notes[0]
    assert "no_such_module" in notes[1]


def test_peers_are_found_in_their_folder_unless_they_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / LLAMA_CPP / "llama-bench", tmp_path / EMBEDDERS / "bin" / "python"):
        path.parent.mkdir(parents=True)
        path.touch()
    assert Peers(root=tmp_path).binary("llama-bench") == tmp_path / LLAMA_CPP / "llama-bench"
    assert Peers(root=tmp_path).python(EMBEDDERS) == tmp_path / EMBEDDERS / "bin" / "python"
    left_out = Peers(enabled=False, root=tmp_path)
    assert left_out.binary("llama-bench") is None
    assert not left_out.has_module("json")
    assert left_out.binary("llama-server") is None
    assert capsys.readouterr().err == ""


ANSWERING = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "bench" / "peers")!r})
from answering import serve
def answer(question):
    if question["do"] == "exit":
        print("what went wrong", file=sys.stderr, flush=True)
        raise SystemExit(3)
    print("noise of a library")
    return {{"half": question["number"] / 2}}
serve({{"version": "1.2"}}, answer)
"""


@pytest.fixture
def peer() -> PeerProcess:
    process = PeerProcess([sys.executable, "-c", ANSWERING])
    yield process  # type: ignore[misc]
    process.close()
    assert process._process.returncode is not None


def test_a_peer_answers_line_by_line(peer: PeerProcess) -> None:
    assert peer.ready == {"version": "1.2"}
    assert peer.ask(do="halve", number=3) == {"half": 1.5}
    assert peer.ask(do="halve", number=4) == {"half": 2.0}


def test_an_error_of_a_peer_is_told_and_does_not_end_it(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="KeyError: 'number'"):
        peer.ask(do="halve")
    assert peer.ask(do="halve", number=4) == {"half": 2.0}


def test_a_peer_that_ends_is_told_with_its_last_words(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="status 3: what went wrong"):
        peer.ask(do="exit")
    with pytest.raises(PeerError, match="what went wrong"):
        peer.ask(do="halve", number=1)


def test_a_peer_that_does_not_start_is_told() -> None:
    with pytest.raises(PeerError, match=r"status 1: .*no such thing"):
        PeerProcess([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_a_process_that_does_not_listen_is_ended_by_force() -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    end_process(process, 0.2)
    process.stdout.close()
    assert process.returncode == -9


# ------------------------------------------------------------------------------------------------------------- counts


def _linear_elements(path: Path) -> int:
    """Elements of all linear layers that transformers makes of a directory, the head included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_a_llama_are_those_of_its_linear_layers(tmp_path: Path, tied: bool) -> None:
    path = save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    counts = count(path)
    assert counts.layer_weights + counts.head_weights == _linear_elements(path)
    norms = 5 * 64
    assert counts.weight_bytes == 4 * (_linear_elements(path) + norms)
    assert count(path, wide=True).weight_bytes == 4 * _linear_elements(path)
    assert counts.cache_bytes == 2 * 2 * 2 * 16 * 4
    assert counts.state_bytes == 0


def test_counts_of_a_hybrid_are_those_of_its_linear_layers(tmp_path: Path) -> None:
    path = save_tiny_hybrid(tmp_path / "model")
    counts = count(path)
    assert counts.layer_weights + counts.head_weights == _linear_elements(path)
    assert counts.state_bytes == 3 * 4 * 16 * 16 * 4


def test_flops_of_a_forward_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Attention is counted over the mean context; torch counts the whole square, which is twice that."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    path = save_tiny_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(3, 250, (1, 32))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(tokens, logits_to_keep=1, use_cache=False)
    counted = counter.get_total_flops()
    work = count(path).forward(32, context=32, heads=1)
    assert work.flops == pytest.approx(counted, rel=0.01)  # rotary tables are products, too


def test_a_floor_is_the_longer_of_reading_and_multiplying() -> None:
    assert Work(read_bytes=20e9, flops=100e9).seconds(LIMITS) == 2.0
    assert Work(read_bytes=20e9, flops=400e9).seconds(LIMITS) == 4.0
    assert Work(read_bytes=5e9, flops=400e9).seconds(LIMITS, int8=True) == 1.0


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_converted_file_holds_the_same_numbers_as_exactly_as_its_blocks_can(tmp_path: Path, kind: str) -> None:
    tensors = llama_tensors()
    types = {name: gguf.GGMLQuantizationType.Q4_1 for name in tensors if tensors[name].shape[-1] % 32 == 0}
    types = {name: kind_ for name, kind_ in types.items() if tensors[name].ndim == 2}
    source = write_gguf(tmp_path / "source.gguf", tensors, metadata=llama_metadata(), types=types)
    convert_gguf(source, tmp_path / "target.gguf", kind)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "target.gguf")
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        wanted = kind if len(old.shape) == 2 else "F32"
        assert new.tensor_type.name == wanted
        assert list(new.shape) == list(old.shape)
        values = gguf.quants.dequantize(old.data, old.tensor_type)
        got = gguf.quants.dequantize(new.data, new.tensor_type)
        steps = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.51 / 127}  # half a step of the largest of a block
        assert np.abs(values - got).max() <= steps[wanted] * np.abs(values).max() * 1.01
    for name, field in before.fields.items():
        if name.startswith(("llama.", "tokenizer.")):
            assert after.fields[name].contents() == field.contents()
