"""Adapters and LoRA training against transformers and peft: files both ways, gradients, and twenty optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.jobs import LoRAParams, TokenizedExample, TrainFinished, TrainStep
from engine.lora.peft import load_adapter
from engine.training.batching import BatchOrder, MicroBatch
from engine.training.data import Examples
from engine.training.forward import TrainingForward
from engine.training.lora_init import new_adapter
from engine.training.seeds import derive_seed
from tests.tiny import save_tiny_llama
from tests.training_runs import events_of, load_tiny, losses, make_spec, of_type, random_examples

EXAMPLES = random_examples([12, 20, 9, 17, 14, 11])
PROMPTS = [e.token_ids for e in EXAMPLES]

SHAPES = {
    "all modules": LoRAParams(rank=4, alpha=4.0),
    "alpha is not rank": LoRAParams(rank=4, alpha=11.0),
    "rsLoRA": LoRAParams(rank=4, alpha=6.0, use_rslora=True),
    "two modules": LoRAParams(rank=2, alpha=4.0, target_modules=["q_proj", "down_proj"]),
    "layer window": LoRAParams(rank=3, alpha=5.0, target_modules=["v_proj"], layers=[1]),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("peft") / "llama")


@pytest.fixture
def loaded(directory: Path, tmp_path: Path) -> LoadedModel:
    return load_tiny(directory, tmp_path / "state")


def reference(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def randomised(loaded: LoadedModel, lora: LoRAParams) -> Any:
    """An adapter whose B is not zero."""
    adapter = new_adapter("tone", loaded.model.lora_targets(), lora, 0, "cpu")
    generator = torch.Generator().manual_seed(3)
    for _, b in adapter.modules.values():
        b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return adapter


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """Module and factor to the parameter of a PeftModel."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            found[name.removeprefix("base_model.model.").replace(".default.weight", "")] = parameter
    return found


def reference_loss(model: Any, examples: list[TokenizedExample]) -> Tensor:
    """Mean over all tokens that count, each example in a forward of its own."""
    total, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor([example.token_ids])
        labels = ids.masked_fill(~torch.tensor([example.loss_mask]), -100)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    return total / count


@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_save_peft_loads(directory: Path, loaded: LoadedModel, shape: str) -> None:
    """A published adapter, loaded by peft from its directory, gives the logits that we serve with it."""
    from peft import PeftModel

    info = loaded.adapters.publish(randomised(loaded, SHAPES[shape]))
    model = PeftModel.from_pretrained(reference(directory), info.path).eval()
    assert {n.rsplit(".", 1)[0] for n in peft_tensors(model)} == set(loaded.adapters.get("tone").modules)
    ours = serving_logits(loaded, PROMPTS, loaded.adapters.get("tone"))
    base = serving_logits(loaded, PROMPTS)
    for prompt, logits, plain in zip(PROMPTS, ours, base, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0]
        assert (logits - expected).abs().max() < 1e-3
        assert (logits - plain).abs().max() > 0.05, "an adapter without effect would prove nothing"


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "up_proj"]},
    "rsLoRA": {"r": 4, "lora_alpha": 9, "use_rslora": True, "target_modules": ["o_proj"]},
    "regular expression": {"r": 2, "lora_alpha": 8, "target_modules": r".*\.(k_proj|gate_proj)"},
    "all linear": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    "layers": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"v_proj": 20},
    },
    "excluded": {
        "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_what_peft_saves_we_load(directory: Path, loaded: LoadedModel, tmp_path: Path, kind: str) -> None:
    """An adapter saved by peft, imported, gives peft's logits; exported again, it is peft's file."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(reference(directory), LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS[kind])).eval()
    for name, parameter in peft_tensors(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.1)
    staged = tmp_path / "staged"
    model.save_pretrained(staged)
    saved = (staged / "adapter_model.safetensors").read_bytes()
    info = loaded.adapters.import_staged("tone", staged)
    ours = serving_logits(loaded, PROMPTS, loaded.adapters.get("tone"))
    for prompt, logits in zip(PROMPTS, ours, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0]
        assert (logits - expected).abs().max() < 1e-3
    assert (Path(info.path) / "adapter_model.safetensors").read_bytes() == saved


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(directory: Path, loaded: LoadedModel, shape: str) -> None:
    """With a B that is not zero, every gradient of A and B equals peft's to 1e-4 of its norm: six packed examples here,
    six forwards there."""
    from peft import PeftModel

    adapter = randomised(loaded, SHAPES[shape])
    info = loaded.adapters.publish(adapter)
    model = PeftModel.from_pretrained(reference(directory), info.path, is_trainable=True).train()
    loss = reference_loss(model, EXAMPLES)
    loss.backward()  # type: ignore[no-untyped-call]
    batch = MicroBatch.of(list(Examples.of(EXAMPLES)))
    forward = TrainingForward(loaded, torch.float32)
    ours = forward.nll_sum(forward.hidden(batch, adapter), batch) / batch.num_loss_tokens
    ours.backward()  # type: ignore[no-untyped-call]
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = peft_tensors(model)
    assert len(expected) == 2 * len(adapter.modules)
    for module, pair in adapter.modules.items():
        for factor, value in zip(("lora_A", "lora_B"), pair, strict=True):
            gradient = expected[f"{module}.{factor}"].grad
            assert gradient is not None
            assert gradient.norm() > 1e-6
            assert (value.grad - gradient).norm() < 1e-4 * gradient.norm(), f"{module}.{factor}"


def test_initialisation_is_that_of_peft(directory: Path, loaded: LoadedModel) -> None:
    """A has the bounds and the spread of peft's own, B is zero; seeds differ, a seed repeats itself."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft_tensors(get_peft_model(reference(directory), config))
    lora = LoRAParams(rank=16, target_modules=["q_proj", "down_proj"])
    adapter = new_adapter("tone", loaded.model.lora_targets(), lora, 0, "cpu")
    for module, (a, b) in adapter.modules.items():
        expected = theirs[f"{module}.lora_A"]
        bound = expected.shape[1] ** -0.5
        assert a.abs().max() <= bound
        assert expected.abs().max() <= bound
        assert a.std().item() == pytest.approx(expected.std().item(), rel=0.08)
        assert a.mean().abs() < 0.1 * bound
        assert not b.any()
    again = new_adapter("tone", loaded.model.lora_targets(), lora, 0, "cpu")
    other = new_adapter("tone", loaded.model.lora_targets(), lora, 1, "cpu")
    name = next(iter(adapter.modules))
    assert torch.equal(again.modules[name][0], adapter.modules[name][0])
    assert not torch.equal(other.modules[name][0], adapter.modules[name][0])


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5},
        {"optimizer": "sgd", "momentum": 0.9, "max_grad_norm": 0.0, "learning_rate": 0.05},
    ],
    ids=["AdamW", "SGD"],
)
def test_twenty_steps(directory: Path, loaded: LoadedModel, tmp_path: Path, options: dict[str, Any]) -> None:
    """From the same A, in the same order, a plain loop of torch, transformers and peft has our losses and gradient
    norms at every step, and our weights at the end."""
    from peft import PeftModel
    from transformers import get_scheduler

    lora = LoRAParams(rank=4, alpha=10.0)
    options = {"learning_rate": 5e-3, "batch_size": 4, "max_steps": 20, "seed": 5, **options}
    spec = make_spec(tmp_path, EXAMPLES, lora=lora, **options)
    events = events_of(spec, loaded)
    initial = new_adapter("initial", loaded.model.lora_targets(), lora, 5, "cpu")
    model = PeftModel.from_pretrained(
        reference(directory), loaded.adapters.publish(initial).path, is_trainable=True
    ).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if options.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(trainable, lr=options["learning_rate"], momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(trainable, lr=options["learning_rate"], weight_decay=0.1)
    schedule = get_scheduler(options.get("schedule", "constant"), optimizer, options.get("warmup_steps", 0), 20)
    order = BatchOrder(len(EXAMPLES), 4, 5, True)
    ours = losses(events)
    for step in range(1, 21):
        loss = reference_loss(model, [EXAMPLES[i] for i in order.batch(step)])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trainable, options["max_grad_norm"] or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert ours[step][0] == pytest.approx(loss.item(), rel=1e-4), f"step {step}"
        assert ours[step][1] == pytest.approx(norm.item(), rel=1e-3), f"step {step}"
    assert of_type(events, TrainStep)[-1].loss < of_type(events, TrainStep)[0].loss
    finished = events[-1]
    assert isinstance(finished, TrainFinished)
    saved = load_adapter(Path(finished.adapter_path), loaded.model.lora_targets(), name="tone")
    expected = peft_tensors(model)
    for module, pair in saved.modules.items():
        for factor, value in zip(("lora_A", "lora_B"), pair, strict=True):
            torch.testing.assert_close(value, expected[f"{module}.{factor}"].detach(), atol=2e-4, rtol=1e-3)


def test_dropout_is_on_the_input_of_a_and_scaled(loaded: LoadedModel) -> None:
    """As in peft: each input element is dropped with that probability, the others are scaled up, the base path is not
    touched; the same generator state drops the same elements."""
    adapter = randomised(loaded, LoRAParams(rank=4, alpha=4.0, dropout=0.25))
    name = next(iter(adapter.modules))
    a, b = (factor.detach() for factor in adapter.modules[name])
    x = torch.ones(4000, a.shape[1])
    generator = torch.Generator().manual_seed(derive_seed(0, "dropout", 1))
    with torch.no_grad():
        delta = adapter.delta(name, x, generator)
        again = adapter.delta(name, x, torch.Generator().manual_seed(derive_seed(0, "dropout", 1)))
    assert delta is not None
    assert again is not None
    assert torch.equal(delta, again)
    plain = x[0] @ a.T @ b.T
    spread = ((a.T @ b.T) ** 2).sum(0) * 0.25 / 0.75
    standard_error = (spread / len(x)).sqrt()
    assert ((delta.mean(0) - plain).abs() < 5 * standard_error).all(), "the mean is the update without dropout"
    torch.testing.assert_close(delta.var(0), spread, rtol=0.15, atol=0.0)
