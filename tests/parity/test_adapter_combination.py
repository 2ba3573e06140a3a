"""Combined adapters against peft's add_weighted_adapter, and against the sum of the updates in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core.chunked import serving_logits
from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.info import AdapterSource
from engine.jobs import LoRAParams, WeightedAdapter
from engine.lora.adapter import Adapter
from engine.lora.combine import combine, combine_adapters
from engine.training.lora_init import new_adapter
from tests.tiny import save_tiny_hybrid, save_tiny_llama
from tests.training_runs import load_tiny, random_examples

PROMPTS = [e.token_ids for e in random_examples([12, 20, 9])]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("combine") / "llama")


@pytest.fixture
def loaded(directory: Path, tmp_path: Path) -> LoadedModel:
    return load_tiny(directory, tmp_path / "state")


def publish(loaded: LoadedModel, name: str, seed: int, **lora: Any) -> Adapter:
    """An adapter with an effect, as stored."""
    params = LoRAParams(**({"rank": 4, "alpha": 8.0} | lora))
    adapter = new_adapter(name, loaded.model.linears(), params, seed, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for a, b in adapter.modules.values():
        a.data.copy_(0.2 * torch.randn(a.shape, generator=generator))
        b.data.copy_(0.2 * torch.randn(b.shape, generator=generator))
    loaded.adapters.publish(adapter)
    return loaded.adapters.read_exact(name)


def update(adapter: Adapter, module: str) -> Tensor:
    """What the adapter adds to W, in float64."""
    a, b = (factor.double() for factor in adapter.modules[module])
    return b @ a * adapter.scaling(module)


SOURCES: dict[str, list[dict[str, Any]]] = {
    "equal ranks": [{"alpha": 8.0}, {"alpha": 3.0}],
    # Not first: peft takes use_rslora of the first one over into the result, whose scaling then is not 1.
    "rsLoRA": [{"alpha": 5.0}, {"use_rslora": True}],
    "three": [{}, {"alpha": 1.0}, {"alpha": 2.5}],
    "other ranks": [{"rank": 4}, {"rank": 2, "alpha": 7.0}],
}
WEIGHTS = (0.7, -0.4, 1.5)


@pytest.mark.parametrize(("method", "kind"), [
    *(("cat", kind) for kind in SOURCES), *(("linear", kind) for kind in SOURCES if kind != "other ranks"),
])  # fmt: skip
def test_as_peft_combines(directory: Path, loaded: LoadedModel, method: str, kind: str) -> None:
    """The same factors as add_weighted_adapter's, module by module, and the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = WEIGHTS[: len(SOURCES[kind])]
    names = [f"source-{index}" for index in range(len(weights))]
    for index, (name, lora) in enumerate(zip(names, SOURCES[kind], strict=True)):
        publish(loaded, name, index, **lora)
    sources = [WeightedAdapter(name=name, weight=weight) for name, weight in zip(names, weights, strict=True)]
    info = combine_adapters(loaded.adapters, "mixed", sources, method)
    assert (info.combination, info.live, info.version) == (method, True, 1)
    assert info.sources == [AdapterSource(name=n, version=1, weight=w) for n, w in zip(names, weights, strict=True)]

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(loaded.adapters.path(names[0])), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(loaded.adapters.path(name)), adapter_name=name)
    model.add_weighted_adapter(names, list(weights), "mixed", combination_type=method)
    model.set_adapter("mixed")
    model.eval()
    ours = loaded.adapters.read_exact("mixed")
    tensors = dict(model.named_parameters())
    for module, (a, b) in ours.modules.items():
        for factor, value in (("lora_A", a), ("lora_B", b)):
            theirs = tensors[f"base_model.model.{module}.{factor}.mixed.weight"]
            assert torch.allclose(value, theirs, rtol=1e-5, atol=1e-7), (module, factor)
    for prompt, logits in zip(PROMPTS, serving_logits(loaded, PROMPTS, loaded.adapters.get("mixed")), strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0]
        assert (logits - expected).abs().max() < 1e-3
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), info.path
    ).eval()
    with torch.no_grad():
        assert (
            again(input_ids=torch.tensor([PROMPTS[0]])).logits - model(input_ids=torch.tensor([PROMPTS[0]])).logits
        ).abs().max() < 1e-4


@pytest.mark.parametrize("hybrid", [False, True])
def test_cat_is_the_sum_of_the_updates(tmp_path: Path, hybrid: bool) -> None:
    """Exactly, with weights of both signs, other ranks, other scalings and other modules; also in a hybrid."""
    save = save_tiny_hybrid if hybrid else save_tiny_llama
    loaded = load_tiny(save(tmp_path / "model"), tmp_path / "state")
    other = {"target_modules": ["in_proj_qkv", "in_proj_z", "out_proj"]} if hybrid else {"target_modules": ["up_proj"]}
    adapters = [
        publish(loaded, "a", 0, rank=4, alpha=8.0),
        publish(loaded, "b", 1, rank=3, alpha=2.0, use_rslora=True, layers=[1]),
        publish(loaded, "c", 2, rank=2, alpha=9.0, **other),
    ]
    weights = (0.5, -1.25, 3.0)
    sources = [WeightedAdapter(name=a.name, version=1, weight=w) for a, w in zip(adapters, weights, strict=True)]
    combine_adapters(loaded.adapters, "mixed", sources)
    mixed = loaded.adapters.read_exact("mixed")
    assert set(mixed.modules) == {module for adapter in adapters for module in adapter.modules}
    assert mixed.rank == 9
    assert len({a.shape[0] for a, _ in mixed.modules.values()}) > 2
    for module in mixed.modules:
        expected = sum(
            weight * update(adapter, module)
            for adapter, weight in zip(adapters, weights, strict=True)
            if module in adapter.modules
        )
        assert torch.allclose(update(mixed, module), torch.as_tensor(expected), rtol=1e-5, atol=1e-7), module


def test_one_adapter_with_weight_one_is_itself(loaded: LoadedModel) -> None:
    source = publish(loaded, "a", 0, use_rslora=True)
    for method in ("cat", "linear"):
        combined = combine("b", [(source, 1.0)], method)
        for module in source.modules:
            assert torch.allclose(update(combined, module), update(source, module), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("sources", "method", "field"), [
    ([], "cat", "sources"),
    ([("a", 1, 1.0)] * 65, "cat", "sources"),
    ([("a", 1, 1.0), ("b", 1, float("nan"))], "cat", "sources[1].weight"),
    ([("a", 1, float("inf"))], "linear", "sources[0].weight"),
    ([("../a", 1, 1.0)], "cat", "sources[0].adapter.name"),
    ([("a", 1, 1.0), ("b", 1, 1.0)], "linear", "sources"),
    ([("a", 1, 1.0), ("b", 1, 1.0)], "average", "method"),
    ([("a", 1, 1.0)] * 3, "cat", "sources"),
    ([("a", 1, 1e300)], "cat", "sources"),
    ([("a", 1, -1e300), ("a", 1, 1.0)], "linear", "sources"),
])  # fmt: skip
def test_what_cannot_be_combined(
    loaded: LoadedModel, sources: list[tuple[str, int, float]], method: str, field: str
) -> None:
    """No adapters, too many, weights that are no numbers, ranks that differ or are too high: nothing is published."""
    publish(loaded, "a", 0, rank=4)
    publish(loaded, "b", 1, rank=2)
    given = [WeightedAdapter(name=name, version=version, weight=weight) for name, version, weight in sources]
    with pytest.raises(InvalidArgumentError) as caught:
        combine_adapters(loaded.adapters, "mixed", given, method, max_rank=11)
    assert caught.value.field == field
    assert {info.name for info in loaded.adapters.list()} == {"a", "b"}


def test_adapters_of_other_bases_are_combined_by_force_alone(directory: Path, tmp_path: Path) -> None:
    loaded = load_tiny(directory, tmp_path / "state")
    publish(loaded, "a", 0)
    other = load_tiny(save_tiny_llama(tmp_path / "other", seed=1), tmp_path / "state")
    publish(other, "b", 1)
    sources = [WeightedAdapter(name="a"), WeightedAdapter(name="b")]
    with pytest.raises(FailedPreconditionError) as caught:
        combine_adapters(other.adapters, "mixed", sources)
    assert caught.value.reason == "ADAPTER_BASE_MISMATCH"
    info = combine_adapters(other.adapters, "mixed", sources, force=True)
    assert info.forced
    assert info.base_digest == other.info.weights_digest
    assert not combine_adapters(other.adapters, "plain", sources[1:]).forced
    assert combine_adapters(other.adapters, "again", [WeightedAdapter(name="mixed")]).forced
