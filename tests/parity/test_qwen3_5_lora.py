"""LoRA over both kinds of layer of a hybrid against transformers and peft: names, gradients, optimizer steps, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.jobs import LoRAParams
from engine.training.batching import MicroBatch
from engine.training.data import Examples
from engine.training.forward import TrainingForward
from tests.parity import test_peft_adapters as llama
from tests.tiny import save_tiny_hybrid
from tests.training_runs import load_tiny, random_examples

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = random_examples([12, 40, 9, 70, 14, 33])  # below, at and beyond a chunk of 32


@pytest.fixture(scope="module", params=["dense", "moe"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / request.param
    return save_tiny_hybrid(path, experts=request.param == "moe", initializer_range=0.1)


@pytest.fixture
def loaded(directory: Path, tmp_path: Path) -> LoadedModel:
    return load_tiny(directory, tmp_path / "state")


def test_every_linear_has_its_hugging_face_path(directory: Path, loaded: LoadedModel) -> None:
    """Adapters may target just the linear modules that transformers has, the head left out, and of their shapes."""
    theirs = {
        name: (module.in_features, module.out_features)
        for name, module in llama.reference(directory).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {name: (m.in_features, m.out_features) for name, m in loaded.model.linears().items()} == theirs
    kinds = {name.rsplit(".", 1)[1] for name in theirs}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    delta_net = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
    assert attention | delta_net | {"gate_proj", "up_proj", "down_proj"} <= kinds


SHAPES = {
    "all modules": LoRAParams(rank=3, alpha=7.0),
    "delta-net": LoRAParams(rank=2, alpha=4.0, target_modules=["in_proj_qkv", "in_proj_b", "in_proj_a"]),
    "attention": LoRAParams(rank=2, alpha=4.0, target_modules=["q_proj"], layers=[3]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(directory: Path, loaded: LoadedModel, shape: str) -> None:
    """With a B that is not zero, every gradient of A and B equals peft's to 1e-4 of its norm: six packed examples here,
    six forwards there. The adapter comes to peft through its file, and serves the logits that peft has."""
    from peft import PeftModel

    adapter = llama.randomised(loaded, SHAPES[shape])
    info = loaded.adapters.publish(adapter)
    model = PeftModel.from_pretrained(llama.reference(directory), info.path, is_trainable=True).train()
    loss = llama.reference_loss(model, EXAMPLES)
    loss.backward()  # type: ignore[no-untyped-call]
    batch = MicroBatch.of(list(Examples.of(EXAMPLES)))
    forward = TrainingForward(loaded, torch.float32)
    ours = forward.nll_sum(forward.hidden(batch, adapter), batch) / batch.num_loss_tokens
    ours.backward()  # type: ignore[no-untyped-call]
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = llama.peft_tensors(model)
    assert len(expected) == 2 * len(adapter.modules)
    for module, pair in adapter.modules.items():
        for factor, value in zip(("lora_A", "lora_B"), pair, strict=True):
            gradient = expected[f"{module}.{factor}"].grad
            assert gradient is not None
            assert gradient.norm() > 1e-6
            assert (value.grad - gradient).norm() < 1e-4 * gradient.norm(), f"{module}.{factor}"
    prompts = [example.token_ids for example in EXAMPLES]
    served = serving_logits(loaded, prompts, loaded.adapters.get("tone"))
    for prompt, logits, plain in zip(prompts, served, serving_logits(loaded, prompts), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([prompt])).logits[0]
        assert (logits - wanted).abs().max() < 1e-3
        assert (logits - plain).abs().max() > 0.05, "an adapter without effect would prove nothing"


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_twenty_steps(tmp_path: Path, kind: str) -> None:
    """Losses, gradient norms and weights of twenty AdamW steps are those of torch, transformers and peft.

    Each token takes all experts: where it takes some, a rounding can change which, and from there runs part.
    """
    chosen = {"experts": True, "num_experts_per_tok": 6} if kind == "moe" else {}
    directory = save_tiny_hybrid(tmp_path / "model", initializer_range=0.1, **chosen)
    options = {"weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5}
    llama.test_twenty_steps(directory, load_tiny(directory, tmp_path / "state"), tmp_path, options)
