"""Copying a checkpoint into a model that was built on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.errors import FormatError, ShapeError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.weights import load_weights, match_names
from tests.unit.loading_files import write_directory

CPU = torch.device("cpu")


class Inner(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 4, dtype=dtype)
        self.norm = nn.Linear(4, 2, bias=False, dtype=dtype)
        self.register_buffer("packed", torch.empty(2, 2, dtype=torch.int32))


class Toy(nn.Module):
    """Names like a language model's, on the meta device."""

    def __init__(self, dtype: torch.dtype, head: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Inner(dtype)
            if head:
                self.lm_head = nn.Linear(4, 3, bias=False, dtype=dtype)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": torch.randn(3, 4),
        "model.norm.weight": torch.randn(2, 4),
        "model.packed": torch.arange(4, dtype=torch.int32).view(2, 2),
    }


def load(path: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    return load_weights(model, open_checkpoint(path), dtype, CPU)


def test_matching_types_stay_views_of_the_file(tmp_path: Path) -> None:
    """No second copy: values lie in the mapped file itself; parameters want no gradients."""
    stored = tensors()
    path = write_directory(tmp_path, stored)
    model = Toy(torch.float32)
    checkpoint = open_checkpoint(path)
    assert load_weights(model, checkpoint, torch.float32, CPU) == 4 * (12 + 8 + 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name])
        assert value.data_ptr() == checkpoint.get(name).data_ptr()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_floats_are_cast_and_integers_are_not(tmp_path: Path) -> None:
    stored = tensors()
    model = Toy(torch.bfloat16)
    load(write_directory(tmp_path, stored), model, torch.bfloat16)
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"].to(torch.bfloat16))
    assert model.get_buffer("model.packed").dtype == torch.int32


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    model = Toy(torch.float32, head=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    load(write_directory(tmp_path, tensors()), model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.removeprefix("model."),
        lambda n: "language_model." + n,
        lambda n: "model.language_model." + n.removeprefix("model."),
    ],
)
def test_prefixes_of_other_checkpoints_are_understood(tmp_path: Path, rename) -> None:  # type: ignore[no-untyped-def]
    stored = tensors()
    model = Toy(torch.float32)
    load(write_directory(tmp_path, {rename(name): value for name, value in stored.items()}), model)
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"])


def test_computed_and_foreign_tensors_are_passed_over(tmp_path: Path) -> None:
    """A stored head of a tied model, rotary buffers, vision towers and multi-token prediction."""
    extra = {
        name: torch.zeros(1)
        for name in ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.fc.weight",
                     "vision_tower.x.weight", "model.multi_modal_projector.y")
    }  # fmt: skip
    load(write_directory(tmp_path, {**tensors(), **extra}), Toy(torch.float32))


def test_missing_and_unexpected_names_are_named(tmp_path: Path) -> None:
    stored = tensors()
    del stored["model.norm.weight"]
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        load(write_directory(tmp_path / "a", stored), Toy(torch.float32))
    with pytest.raises(FormatError, match=r"model\.layers\.7\.x"):
        load(write_directory(tmp_path / "b", {**tensors(), "model.layers.7.x": torch.zeros(1)}), Toy(torch.float32))
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        load(write_directory(tmp_path / "c", tensors()), Toy(torch.float32, head=True))


def test_wrong_shapes_and_types_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"model\.norm\.weight.*\[4, 2\].*\[2, 4\]"):
        load(write_directory(tmp_path / "a", {**tensors(), "model.norm.weight": torch.zeros(4, 2)}), Toy(torch.float32))
    bad = {**tensors(), "model.packed": torch.zeros(2, 2)}
    with pytest.raises(FormatError, match=r"model\.packed"):
        load(write_directory(tmp_path / "b", bad), Toy(torch.float32))


def test_two_spellings_of_one_name_are_refused() -> None:
    with pytest.raises(FormatError, match="both"):
        match_names(["model.norm.weight", "norm.weight"], {"model.norm.weight": None})


def test_encoder_heads_are_passed_over_for_encoders_alone() -> None:
    stored = ["bert.encoder.x", "cls.predictions.bias", "bert.pooler.dense.weight", "bert.LayerNorm.gamma"]
    wanted = {"encoder.x": None, "LayerNorm.weight": None}
    assert match_names(stored, wanted, encoder=True) == {
        "encoder.x": "bert.encoder.x",
        "LayerNorm.weight": "bert.LayerNorm.gamma",
    }
    with pytest.raises(FormatError, match=r"cls\.predictions\.bias"):
        match_names(stored, wanted)
