"""LoRA on routed experts against transformers and peft's target_parameters: files both ways, gradients, AdamW steps.

A rounding can change which experts a token takes, and from there nothing is comparable. What is compared here was seen
to route alike (fixed seeds, few tokens), or every token takes all experts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.errors import FormatError
from engine.jobs import LoRAParams, TrainFinished, TrainStarted, TrainStep
from engine.lora.peft import WEIGHTS_NAME, load_adapter, unstack
from engine.lora.peft_config import CONFIG_NAME
from engine.lora.targets import stored_paths
from engine.training.batching import BatchOrder, MicroBatch
from engine.training.data import Examples
from engine.training.forward import TrainingForward
from tests.parity import test_peft_adapters as llama
from tests.tiny import save_tiny_hybrid
from tests.training_runs import events_of, load_tiny, losses, make_spec, of_type, random_examples

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = random_examples([12, 40, 9, 33])
PROMPTS = [example.token_ids for example in EXAMPLES]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each token takes 2 of 6 experts; their width is such that gate_up_proj is square, where a transposed update would
    have the right shape."""
    return save_tiny_hybrid(tmp_path_factory.mktemp("moe") / "some", experts=True, initializer_range=0.1)


@pytest.fixture(scope="module")
def directory_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each token takes all experts."""
    path = tmp_path_factory.mktemp("moe") / "all"
    return save_tiny_hybrid(path, experts=True, initializer_range=0.1, num_experts_per_tok=6, moe_intermediate_size=24)


@pytest.fixture
def loaded(directory: Path, tmp_path: Path) -> LoadedModel:
    return load_tiny(directory, tmp_path / "state")


def assert_peft_computes_the_same(model: Any, loaded: LoadedModel, adapter: Any) -> None:
    """To 1e-4 in each logit; and the adapter has an effect."""
    ours, base = serving_logits(loaded, PROMPTS, adapter), serving_logits(loaded, PROMPTS)
    for prompt, logits, plain in zip(PROMPTS, ours, base, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0]
        assert (logits - expected).abs().max() < 1e-4
        assert (logits - plain).abs().max() > 0.05, "an adapter without effect would prove nothing"


SHAPES = {
    "experts alone": LoRAParams(rank=3, alpha=7.0, target_parameters=[GATE_UP, DOWN]),
    "one of the two": LoRAParams(rank=2, alpha=4.0, target_parameters=["experts.gate_up_proj"]),
    "with all linears, rsLoRA": LoRAParams(
        rank=2, alpha=3.0, use_rslora=True, target_modules=["all-linear"], target_parameters=[GATE_UP, DOWN]
    ),
    "layer window": LoRAParams(
        rank=2, alpha=4.0, target_modules=["up_proj"], target_parameters=["down_proj"], layers=[1, 2]
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_save_peft_loads(directory: Path, loaded: LoadedModel, shape: str) -> None:
    """A published adapter, loaded by peft from its directory, gives the logits that we serve with it."""
    from peft import PeftModel

    info = loaded.adapters.publish(llama.randomised(loaded, SHAPES[shape]))
    model = PeftModel.from_pretrained(llama.reference(directory), info.path).eval()
    adapter = loaded.adapters.get("tone")
    paths = set(stored_paths(adapter.modules, loaded.model.lora_targets()).values())
    assert {n.rsplit(".", 1)[0] for n in llama.peft_tensors(model)} == paths
    assert info.num_parameters == adapter.num_parameters()
    assert_peft_computes_the_same(model, loaded, adapter)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["q_proj", "in_proj_qkv"], "target_parameters": [GATE_UP, DOWN]},
    "experts alone": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "patterns": {
        "target_modules": ["gate_proj"], "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 5},
    },
    "irregular": {
        "target_modules": "all-linear", "use_rslora": True,
        "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj", "experts.down_proj"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_what_peft_saves_we_load(directory: Path, loaded: LoadedModel, tmp_path: Path, kind: str) -> None:
    """An adapter saved by peft, imported, gives peft's logits; published by us, it has the tensors of peft's file."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = get_peft_model(llama.reference(directory), LoraConfig(r=3, lora_alpha=7, **PEFT_CONFIGS[kind]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copytree(tmp_path / "theirs", tmp_path / "staged")
    info = loaded.adapters.import_staged("tone", tmp_path / "staged")
    given = PEFT_CONFIGS[kind]
    assert set(info.target_parameters) == {f"mlp.experts.{n.rsplit('.', 1)[1]}" for n in given["target_parameters"]}
    if isinstance(given["target_modules"], list):
        assert info.target_modules == sorted(given["target_modules"])
    assert_peft_computes_the_same(model.eval(), loaded, loaded.adapters.get("tone"))
    again = loaded.adapters.publish(loaded.adapters.get("tone"))
    theirs, ours = (load_file(str(Path(path) / WEIGHTS_NAME)) for path in (tmp_path / "theirs", again.path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_files_that_do_not_fit_are_refused(directory: Path, loaded: LoadedModel) -> None:
    """The key or tensor at fault is named; above all a layout before PEFT 0.19, whose factors are of other sides."""
    info = loaded.adapters.publish(llama.randomised(loaded, SHAPES["experts alone"]))
    targets, path = loaded.model.lora_targets(), Path(info.path)
    values = json.loads((path / CONFIG_NAME).read_text())
    for changes, message in (
        ({"peft_version": "0.18.1"}, "peft_version is '0.18.1'; accepted: 0.19"),
        ({"peft_version": None}, "peft_version is None"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"target_parameters": [GATE_UP]}, r"base_layer\.lora_A.* beyond those that target_parameters .*gate_up_proj"),
        (
            {"target_parameters": [GATE_UP, DOWN, "mlp.gate.weight"]},
            "mlp.gate.weight.* accepted: mlp.experts.down_proj",
        ),
        ({"target_modules": ["q_proj"]}, "lacks tensor '.*q_proj.lora_A.weight'"),
    ):
        (path / CONFIG_NAME).write_text(json.dumps(values | changes))
        with pytest.raises(FormatError, match=message):
            load_adapter(path, targets, name="tone")


@pytest.mark.parametrize("which", ["some", "all"])
def test_gradients(directory: Path, directory_all: Path, tmp_path: Path, which: str) -> None:
    """With a B that is not zero, every gradient of A and B, of experts as of linears, equals peft's to 1e-4 of its
    norm. No weight of the base gets one."""
    from peft import PeftModel

    path = directory if which == "some" else directory_all
    loaded = load_tiny(path, tmp_path / "state")
    adapter = llama.randomised(loaded, SHAPES["with all linears, rsLoRA"])
    model = PeftModel.from_pretrained(
        llama.reference(path), loaded.adapters.publish(adapter).path, is_trainable=True
    ).train()
    loss = llama.reference_loss(model, EXAMPLES)
    loss.backward()  # type: ignore[no-untyped-call]
    batch = MicroBatch.of(list(Examples.of(EXAMPLES)))
    forward = TrainingForward(loaded, torch.float32)
    ours = forward.nll_sum(forward.hidden(batch, adapter), batch) / batch.num_loss_tokens
    ours.backward()  # type: ignore[no-untyped-call]
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    expected, paths = llama.peft_tensors(model), stored_paths(adapter.modules, loaded.model.lora_targets())
    assert len(expected) == 2 * len(adapter.modules)
    assert sum(a.dim() == 3 for a, _ in adapter.modules.values()) == 8
    for module, pair in adapter.modules.items():
        for factor, value in zip(("lora_A", "lora_B"), pair, strict=True):
            gradient = expected[f"{paths[module]}.{factor}"].grad
            assert gradient is not None
            if value.dim() == 3:
                gradient = unstack(factor, gradient, 6)
            assert gradient.norm() > 1e-6
            assert (value.grad - gradient).norm() < 1e-4 * gradient.norm(), f"{module}.{factor}"
    assert all(p.grad is None for p in loaded.model.parameters())


def test_ten_steps(directory_all: Path, tmp_path: Path) -> None:
    """Losses, gradient norms and weights of ten AdamW steps are those of torch, transformers and peft. The run begins
    by comparing the training forward with the serving one."""
    from peft import PeftModel

    loaded = load_tiny(directory_all, tmp_path / "state")
    lora = LoRAParams(rank=2, alpha=6.0, target_modules=["q_proj", "out_proj"], target_parameters=[GATE_UP, DOWN])
    options = {"learning_rate": 5e-3, "batch_size": 3, "max_steps": 10, "seed": 5, "weight_decay": 0.1}
    events = events_of(make_spec(tmp_path, EXAMPLES, lora=lora, max_grad_norm=0.5, **options), loaded)
    [started] = of_type(events, TrainStarted)
    assert started.forward_difference < 1e-5
    assert (started.target_modules, started.target_parameters) == (["out_proj", "q_proj"], [DOWN, GATE_UP])
    initial = llama.new_adapter("initial", loaded.model.lora_targets(), lora, 5, "cpu")
    model = PeftModel.from_pretrained(
        llama.reference(directory_all), loaded.adapters.publish(initial).path, is_trainable=True
    ).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert started.num_trainable_parameters == sum(p.numel() for p in trainable)
    optimizer = torch.optim.AdamW(trainable, lr=5e-3, weight_decay=0.1)
    order, ours = BatchOrder(len(EXAMPLES), 3, 5, True), losses(events)
    for step in range(1, 11):
        loss = llama.reference_loss(model, [EXAMPLES[i] for i in order.batch(step)])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step][0] == pytest.approx(loss.item(), rel=1e-4), f"step {step}"
        assert ours[step][1] == pytest.approx(norm.item(), rel=1e-3), f"step {step}"
    assert of_type(events, TrainStep)[-1].loss < of_type(events, TrainStep)[0].loss
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    saved = load_adapter(Path(finished.adapter_path), loaded.model.lora_targets(), name="tone")
    expected, paths = llama.peft_tensors(model), stored_paths(saved.modules, loaded.model.lora_targets())
    for module, pair in saved.modules.items():
        for factor, value in zip(("lora_A", "lora_B"), pair, strict=True):
            theirs = expected[f"{paths[module]}.{factor}"].detach()
            theirs = unstack(factor, theirs, 6) if value.dim() == 3 else theirs
            torch.testing.assert_close(value, theirs, atol=2e-4, rtol=1e-3)


def test_initialisation_is_that_of_peft(directory: Path, loaded: LoadedModel) -> None:
    """A has the bounds and the spread of peft's own, whatever the number of experts; B is zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules=[], target_parameters=[GATE_UP, DOWN])
    theirs = llama.peft_tensors(get_peft_model(llama.reference(directory), config))
    lora = LoRAParams(rank=16, target_parameters=[GATE_UP, DOWN])
    adapter = llama.new_adapter("tone", loaded.model.lora_targets(), lora, 0, "cpu")
    for module, path in stored_paths(adapter.modules, loaded.model.lora_targets()).items():
        a, b = adapter.modules[module]
        expected = theirs[f"{path}.lora_A"]
        bound = expected.shape[1] ** -0.5
        assert a.shape == (6, 16, expected.shape[1])
        assert max(a.abs().max(), expected.abs().max()) <= bound
        assert a.std().item() == pytest.approx(expected.std().item(), rel=0.05)
        assert not b.any()
