"""``whet-server verify`` on tiny models: what passes, what a fault fails, what is skipped and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from engine.engine import Engine
from engine.jobs import QuantizeSpec
from server.cli import main
from tests.engine.test_quantize_job import CONFIG
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.unit.loading_files import llama_metadata, llama_tensors, write_gguf

OPTIONS = ["--num-threads", "1", "--tokens", "60", "--json"]
GROUPS = "abcd"


def run(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(main, ["verify", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


def report(result: Result, status: int) -> dict[str, Any]:
    assert result.exit_code == status, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    for count in ("passed", "failed", "skipped"):
        assert found[count] == sum(figure["status"] == count for figure in found["figures"])
    return found


def by_status(found: dict[str, Any], status: str) -> list[str]:
    return [f"{figure['group']} {figure['name']}" for figure in found["figures"] if figure["status"] == status]


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sliding and a full layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.1,
    )
    directory = tmp_path_factory.mktemp("verify") / "gemma"
    Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    directory = tmp_path_factory.mktemp("verify") / "bert"
    BertModel(BertConfig(vocab_size=97, max_position_embeddings=64, **sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With smaller matrices than the other tests' one, where another order of a convolution's sum in float32 moves
    gradients of the shared expert's gate by 1e-4."""
    return save_tiny_hybrid(tmp_path_factory.mktemp("verify") / "moe", experts=True, initializer_range=0.1)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gemma", "tiny_hybrid", "tiny_moe"])
def test_every_family_passes_in_all_groups(kind: str, request: pytest.FixtureRequest) -> None:
    """Nothing is skipped where transformers and peft are installed, and each kind of layer has its gradient check."""
    path: Path = request.getfixturevalue(kind)
    found = report(run(path, *OPTIONS), 0)
    assert (found["failed"], found["skipped"]) == (0, 0)
    assert found["tokens"] == "random"
    assert found["num_tokens"] == 60
    figures = found["figures"]
    assert {figure["group"] for figure in figures} == set(GROUPS)
    for figure in figures:
        assert 0 <= figure["value"] <= figure["accepted"]
        assert figure["detail"]
    layers = {"tiny_llama": ["full_attention"], "tiny_gemma": ["sliding_attention", "full_attention"]}
    experts = "mixture of experts" if kind == "tiny_moe" else "MLP"
    expected = [f"{mixer}, {experts}" for mixer in layers.get(kind, ["linear_attention", "full_attention"])]
    checked = [figure["name"].partition(": ")[2] for figure in figures if figure["name"].startswith("layer ")]
    assert checked == expected


def test_the_first_layers_alone(tiny_hybrid: Path) -> None:
    """--layers 2 leaves the last ones unread, here and in transformers."""
    found = report(run(tiny_hybrid, "--layers", 2, *OPTIONS), 0)
    assert found["num_layers"] == 2
    assert (found["failed"], found["skipped"]) == (0, 0)
    (layers,) = [figure for figure in found["figures"] if figure["name"].startswith("every layer")]
    assert "2 layers" in layers["detail"]


def test_an_encoder(tiny_bert: Path) -> None:
    """(a) and (c) run; (b) and (d) are skipped with the reason."""
    found = report(run(tiny_bert, *OPTIONS), 0)
    assert {name[0] for name in by_status(found, "passed")} == {"a", "c"}
    assert {name[0] for name in by_status(found, "skipped")} == {"b", "d"}
    assert found["failed"] == 0
    assert any(figure["name"] == "layer 0: encoder layer" for figure in found["figures"])
    for figure in found["figures"]:
        assert (figure["value"] is None) == (figure["status"] == "skipped")


@pytest.fixture(scope="module")
def tiny_q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in four bits."""
    directory = tmp_path_factory.mktemp("verify")
    engine = Engine(CONFIG)
    engine.load_model("tiny", save_tiny_llama(directory / "source", intermediate_size=128))
    output = directory / "q4"
    engine.start_job(
        QuantizeSpec(job_id="1", model="tiny", scheme="q4", output_name="q4", output_dir=str(output), load=False)
    )
    while engine.has_jobs():
        engine.advance_jobs()
    return output


def test_a_quantized_model(tiny_q4: Path) -> None:
    """(b) and (c) run over weights of four bits; (a) and (d) are skipped."""
    found = report(run(tiny_q4, *OPTIONS), 0)
    assert {name[0] for name in by_status(found, "passed")} == {"b", "c"}
    assert {name[0] for name in by_status(found, "skipped")} == {"a", "d"}


def test_blocks_of_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves is compared with what all other figures are of; a scheme that reads its blocks wrongly fails."""
    from engine.quantization.gguf import GGUFBlocks

    tensors = llama_tensors()
    types = {name: gguf.GGMLQuantizationType.Q4_1 for name, t in tensors.items() if t.ndim == 2}
    path = write_gguf(tmp_path / "m.gguf", tensors, "llama", llama_metadata(), types)
    name = "b logits of weights as the file has them = of wide ones"
    # transformers needs a tokenizer in the file to read it at all.
    assert name in by_status(report(run(path, *OPTIONS), 0), "passed")

    def wrong(self: GGUFBlocks, module: torch.nn.Module, x: Tensor) -> Tensor:
        return 1.001 * x @ self.dequantize(module).T

    monkeypatch.setattr(GGUFBlocks, "apply", wrong)
    assert by_status(report(run(path, *OPTIONS), 1), "failed") == [name]


def test_without_transformers_and_peft(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs them is skipped by name, never passed; without peft, (a) still runs."""
    find = importlib.util.find_spec

    def hide(*packages: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else find(name, *a))

    hide("transformers", "peft")
    found = report(run(tiny_llama, *OPTIONS), 0)
    assert {name[0] for name in by_status(found, "passed")} == {"b", "c"}
    reasons = {figure["detail"] for figure in found["figures"] if figure["status"] == "skipped"}
    assert reasons == {"transformers is not installed"}
    hide("peft")
    found = report(run(tiny_llama, *OPTIONS), 0)
    assert by_status(found, "skipped") == ["d gradients of every A and B = peft's"]
    assert {name[0] for name in by_status(found, "passed")} == {"a", "b", "c"}


def fault_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP of the forward with gradients is off by one part in a hundred."""
    from engine.layers.mlp import GatedMLP

    right = GatedMLP.forward

    def wrong(self: GatedMLP, x: Tensor, ctx: Any) -> Tensor:
        return right(self, x, ctx) * (1.01 if torch.is_grad_enabled() and x.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(GatedMLP, "forward", wrong)


def fault_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoded token's state decays a little less."""
    import engine.layers.gated_delta_net as layer

    right, right_of_slots = layer.gated_delta_step, layer.gated_delta_step_slots

    def wrong(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any, **options: Any) -> Any:
        return right(q, k, v, 0.99 * g, *rest, **options)

    def wrong_of_slots(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, *rest: Any) -> None:
        right_of_slots(q, k, v, a, b, a_log - 0.01, *rest)  # g = -exp(a_log) softplus(a + dt_bias)

    monkeypatch.setattr(layer, "gated_delta_step", wrong)
    monkeypatch.setattr(layer, "gated_delta_step_slots", wrong_of_slots)


def fault_in_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delta-net's gradient is one part in a hundred too large; its values are right."""
    from engine.layers.gated_delta_net import GatedDeltaNet

    right = GatedDeltaNet.forward

    def wrong(self: GatedDeltaNet, x: Tensor, ctx: Any) -> Tensor:
        out = right(self, x, ctx)
        return out.detach() + 1.01 * (out - out.detach()) if out.requires_grad else out

    monkeypatch.setattr(GatedDeltaNet, "forward", wrong)


def fault_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of the scores, everywhere alike: only a comparison with transformers can tell."""
    from engine.layers.attention import Attention

    right = Attention.__init__

    def wrong(self: Attention, *rest: Any, **options: Any) -> None:
        right(self, *rest, **options)
        self.scale *= 1.01

    monkeypatch.setattr(Attention, "__init__", wrong)


FAULTS = {
    "training": (
        fault_in_training,
        {"b NLL of training with a zero adapter = scoring", "b logits of training = serving"},
    ),
    "decoding": (fault_in_decoding, {"b logits of stepwise decoding = prefill"}),
    "backward": (
        fault_in_a_backward,
        {"c layer 0: linear_attention, MLP", "d gradients of every A and B = peft's"},
    ),
    "forward": (fault_in_the_forward, {"a logits = transformers'", "a every layer's output = transformers'"}),
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_in_one_place_fails(
    where: str, tiny_hybrid: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 1, and the figures that see it are those that fail."""
    break_it, expected = FAULTS[where]
    break_it(monkeypatch)
    path = tiny_llama if where == "forward" else tiny_hybrid
    found = report(run(path, "--layers", 1, *OPTIONS), 1)
    failed = set(by_status(found, "failed"))
    assert expected <= failed
    assert found["passed"] > 0
    if where in ("decoding", "forward"):
        assert not any(name.startswith("c") for name in failed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], "layers is 9; accepted: an integer in [1, 2]"),
        (["--layers", "0"], "layers is 0"),
        (["--tokens", "3"], "tokens is 3; accepted: at least 20"),
        (["--tokens", "5000"], "accepted: at most 426, as the model has 256 positions"),
        (["--adapter-rank", "0"], "adapter_rank is 0; accepted: an integer in [1, 4096]"),
        (["--num-threads", "-1"], "num_threads is -1; accepted: 0, for as many as cores, or more"),
    ],
)
def test_options_out_of_range(tiny_llama: Path, options: list[str], message: str) -> None:
    """One line that names the value and what is accepted; exit status 2."""
    result = run(tiny_llama, "--num-threads", 1, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("whet-server: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_paths_that_hold_no_model(tmp_path: Path, tiny_llama: Path) -> None:
    """Missing, empty, garbage, cut short, pickled: each is one line and exit status 2."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    (tmp_path / "pickled.bin").write_bytes(b"\x80\x04.")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (cut / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes()[:5000])
    for name in ("missing", "empty", "garbage.gguf", "pickled.bin", "cut"):
        result = run(tmp_path / name, *OPTIONS)
        assert result.exit_code == 2, (name, result.output, result.exception)
        assert result.stderr.startswith("whet-server: "), name
        assert result.stderr.count("\n") == 1, name
        assert result.stdout == ""


def test_memory(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not fit is refused with the layers that would; where only transformers' copy does not, what
    needs it is skipped."""
    from engine.verification import verify

    working = verify.WORKING_BYTES
    monkeypatch.setattr(verify, "free_bytes", lambda device: working + (700 << 10))
    result = run(tiny_llama, *OPTIONS)
    assert result.exit_code == 2
    assert "in float32 and" in result.stderr
    assert "--layers 1 would fit" in result.stderr
    assert run(tiny_llama, "--layers", 1, *OPTIONS).exit_code == 0
    monkeypatch.setattr(verify, "free_bytes", lambda device: working)
    assert "not even one of its layers would fit" in run(tiny_llama, *OPTIONS).stderr
    monkeypatch.setattr(verify, "free_bytes", lambda device: working + (2 << 20))
    found = report(run(tiny_llama, *OPTIONS), 0)
    skipped = [figure["detail"] for figure in found["figures"] if figure["status"] == "skipped"]
    assert len(skipped) == 3
    assert all("transformers' copy needs" in detail for detail in skipped)


def test_as_a_command(tiny_q4: Path) -> None:
    """A process of its own: the table, what is skipped in its last line, the exit status."""
    command = [sys.executable, "-m", "server", "verify", str(tiny_q4), *OPTIONS[:-1], "--layers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert "llama, 1 layer" in lines[0]
    assert "60 tokens of random ids" in lines[0]
    assert " passed, 0 failed, 3 skipped. Not run: (a) (d) the model is quantized" in lines[-1]


def test_the_table(tiny_bert: Path) -> None:
    """What is skipped of an encoder, and why, is its last line."""
    result = run(tiny_bert, *OPTIONS[:-1])
    assert result.exit_code == 0
    lines = result.stdout.strip().splitlines()
    assert "bert, 2 layers, 60 tokens of random ids" in lines[0]
    assert " passed, 0 failed, 5 skipped. Not run: (b) an encoder has one forward" in lines[-1]
