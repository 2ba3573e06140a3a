"""PEFT files: what is read and written, and that every fault is refused by the name of its key or tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.errors import EngineError, FormatError, NotFoundError, ShapeError
from engine.lora.adapter import Adapter
from engine.lora.peft import WEIGHTS_NAME, load_adapter, save_adapter
from engine.lora.peft_config import CONFIG_NAME, parse_config, read_config
from engine.lora.targets import describe_targets


@dataclass
class Shape:
    in_features: int
    out_features: int


LINEARS = {
    f"model.layers.{layer}.{block}": Shape(6, 4) if block.endswith("q_proj") else Shape(6, 8)
    for layer in range(3)
    for block in ("self_attn.q_proj", "mlp.up_proj")
}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def make_adapter(modules: list[str] | None = None, **overrides: Any) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {"name": "tone", "version": 3, "rank": 2, "alpha": 3.0}
    pairs = {
        name: (
            torch.randn(2, LINEARS[name].in_features, generator=generator),
            torch.randn(LINEARS[name].out_features, 2, generator=generator),
        )
        for name in modules or LINEARS
    }
    return Adapter(**(values | {"modules": pairs} | overrides))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(tmp_path, make_adapter(), LINEARS, base_model="tiny")
    return tmp_path


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(str(directory / WEIGHTS_NAME))
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, str(directory / WEIGHTS_NAME))


def load(directory: Path) -> Adapter:
    return load_adapter(directory, LINEARS, name="tone")


@pytest.mark.parametrize(
    "modules",
    [
        None,
        [name for name in LINEARS if name.endswith("q_proj")],
        [name for name in LINEARS if ".1." in name or ".2." in name],
        ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"],
    ],
    ids=["all", "one kind", "a layer window", "irregular"],
)
def test_round_trip(tmp_path: Path, modules: list[str] | None) -> None:
    """Every choice of modules comes back with the same tensors, rank, alpha and scaling."""
    adapter = make_adapter(modules, use_rslora=True, dropout=0.25)
    save_adapter(tmp_path, adapter, LINEARS, base_model="tiny")
    back = load(tmp_path)
    assert list(back.modules) == list(adapter.modules)
    for name, (a, b) in adapter.modules.items():
        assert torch.equal(back.modules[name][0], a)
        assert torch.equal(back.modules[name][1], b)
        assert back.scaling(name) == adapter.scaling(name) == 3.0 / 2**0.5
    assert (back.rank, back.alpha, back.use_rslora) == (2, 3.0, True)
    assert read_config(tmp_path).dropout == 0.25


def test_targets_are_described_in_the_shortest_way() -> None:
    """All layers, a window, and full names for an irregular choice."""
    assert describe_targets(LINEARS, LINEARS) == (["q_proj", "up_proj"], None)
    window = [name for name in LINEARS if ".1." in name]
    assert describe_targets(window, LINEARS) == (["q_proj", "up_proj"], [1])
    irregular = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
    assert describe_targets(irregular, LINEARS) == (irregular, None)


def test_alpha_is_read_not_assumed(saved: Path) -> None:
    """Alpha and rank are the file's; a file without them is refused, whatever its tensors' shapes say."""
    edit_config(saved, lora_alpha=7)
    assert load(saved).scaling("model.layers.0.self_attn.q_proj") == 3.5
    for key in ("lora_alpha", "r"):
        values = json.loads((saved / CONFIG_NAME).read_text())
        del values[key]
        with pytest.raises(FormatError, match=f"{key} is None"):
            parse_config(values)


def test_rank_and_alpha_patterns(saved: Path) -> None:
    """A module whose rank and alpha differ has its own scaling, and is written back with its patterns."""
    edit_config(saved, rank_pattern={"0.self_attn.q_proj": 1}, alpha_pattern={"layers.0.self_attn.q_proj": 5})
    edit_tensors(saved, {f"{Q0}.lora_A.weight": torch.ones(1, 6), f"{Q0}.lora_B.weight": torch.ones(4, 1)})
    adapter = load(saved)
    assert adapter.scaling("model.layers.0.self_attn.q_proj") == 5.0
    assert adapter.scaling("model.layers.1.self_attn.q_proj") == 1.5
    assert adapter.delta("model.layers.0.self_attn.q_proj", torch.ones(1, 6)).tolist() == [[30.0] * 4]  # type: ignore[union-attr]
    again = saved / "again"
    again.mkdir()
    save_adapter(again, adapter, LINEARS, base_model="tiny")
    assert load(again).scaling("model.layers.0.self_attn.q_proj") == 5.0


REFUSED_CONFIGS: dict[str, Any] = {
    "peft_type": "IA3",
    "bias": "all",
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "lora_bias": True,
    "target_parameters": ["x"],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "an_option_of_tomorrow": {"changes": "everything"},
    "init_lora_weights": "pissa_niter_16",
    "r": 0,
    "lora_alpha": float("nan"),
    "lora_dropout": 1.0,
    "use_rslora": "yes",
    "target_modules": [],
    "layers_to_transform": ["0"],
    "rank_pattern": {".*q_proj": 4},
    "alpha_pattern": {"q_proj": True},
}


@pytest.mark.parametrize("key", REFUSED_CONFIGS)
def test_configurations_that_would_compute_otherwise_are_refused(saved: Path, key: str) -> None:
    """The error names the key; nothing is loaded."""
    edit_config(saved, **{key: REFUSED_CONFIGS[key]})
    with pytest.raises(FormatError, match=key):
        load(saved)


REFUSED_TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing B": ({f"{Q0}.lora_B.weight": None}, r"lacks tensor '.*layers\.0.*lora_B"),
    "missing module": (
        {f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None},
        r"lacks tensor '.*layers\.0.*q_proj",
    ),
    "unknown module": ({Q0.replace("q_proj", "w_proj") + ".lora_A.weight": torch.ones(2, 6)}, "w_proj"),
    "head": ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 6)}, "lm_head"),
    "layer out of range": ({Q0.replace(".0.", ".9.") + ".lora_A.weight": torch.ones(2, 6)}, r"layers\.9"),
    "DoRA magnitude": ({f"{Q0}.lora_magnitude_vector": torch.ones(4)}, "lora_magnitude_vector"),
    "foreign prefix": ({"layers.0.q_proj.lora_A.weight": torch.ones(2, 6)}, "is no low-rank factor"),
    "integers": ({f"{Q0}.lora_A.weight": torch.ones(2, 6, dtype=torch.int32)}, "I32"),
    "infinite": ({f"{Q0}.lora_A.weight": torch.full((2, 6), torch.inf)}, r"q_proj\.lora_A.*not finite"),
}


@pytest.mark.parametrize("fault", REFUSED_TENSORS)
def test_faulty_tensors_are_named(saved: Path, fault: str) -> None:
    """The error names the tensor or module that is wrong or missing."""
    changes, message = REFUSED_TENSORS[fault]
    edit_tensors(saved, changes)
    with pytest.raises(FormatError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("factor", "shape"), [("lora_A", (3, 6)), ("lora_A", (2, 5)), ("lora_B", (4, 3)), ("lora_B", (2,))]
)
def test_shapes_are_those_of_the_model_and_the_rank(saved: Path, factor: str, shape: tuple[int, ...]) -> None:
    """The error names the tensor, its shape and the right one."""
    edit_tensors(saved, {f"{Q0}.{factor}.weight": torch.ones(shape)})
    with pytest.raises(ShapeError, match=rf"q_proj\.{factor}.*accepted: \[(2, 6|4, 2)\]"):
        load(saved)


def test_tensors_outside_of_the_declared_targets(saved: Path) -> None:
    """A tensor that the configuration does not target, and a target that the model does not have, are refused."""
    edit_config(saved, target_modules=["up_proj"])
    with pytest.raises(FormatError, match="q_proj"):
        load(saved)
    edit_config(saved, target_modules=["q_proj", "up_proj", "c_attn"])
    with pytest.raises(FormatError, match="c_attn"):
        load(saved)


def test_a_regular_expression_for_targets_is_not_run(saved: Path) -> None:
    """With one that would take forever to match, loading is immediate: the tensors tell the modules."""
    edit_config(saved, target_modules="(.*.*)*x" * 20)
    assert set(load(saved).modules) == set(LINEARS)


def test_missing_files(tmp_path: Path, saved: Path) -> None:
    """A directory without one of the files is not an adapter; a pickle beside it is never read."""
    with pytest.raises(NotFoundError, match=CONFIG_NAME):
        load(tmp_path / "nowhere")
    (saved / WEIGHTS_NAME).rename(saved / "adapter_model.bin")
    with pytest.raises(NotFoundError, match=WEIGHTS_NAME):
        load(saved)


def test_files_over_the_limits(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are looked at before anything is read."""
    monkeypatch.setattr("engine.lora.peft.MAX_WEIGHTS_BYTES", 10)
    with pytest.raises(FormatError, match="accepted: at most 10"):
        load(saved)
    monkeypatch.setattr("engine.lora.peft_config.MAX_CONFIG_BYTES", 5)
    with pytest.raises(FormatError, match="accepted: at most 5"):
        load(saved)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "exclude_modules", "init_lora_weights", "use_dora", "other",
    "target_parameters", "peft_version",
]  # fmt: skip


@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_configuration_is_read_or_refused(changes: dict[str, Any]) -> None:
    """Whatever JSON stands in the configuration, nothing but an EngineError comes out."""
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
    try:
        config = parse_config(values)
        for name in LINEARS:
            assert config.rank_of(name) >= 1
            assert config.alpha_of(name) > 0.0
            config.targets(name)
    except EngineError:
        pass


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(saved: Path, data: st.DataObject) -> None:
    """Flipped, cut and inserted bytes in either file: an adapter with the right shapes, or an EngineError."""
    name = data.draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
    original = (saved / name).read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, min(len(content) - 1, 2000))))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at:]
        else:
            content[at:at] = data.draw(st.binary(max_size=9))
    (saved / name).write_bytes(bytes(content))
    try:
        for module, (a, b) in load(saved).modules.items():
            assert a.shape[1] == LINEARS[module].in_features
            assert b.shape[0] == LINEARS[module].out_features
    except EngineError:
        pass
    finally:
        (saved / name).write_bytes(original)
