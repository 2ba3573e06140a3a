"""All layers of an encoder in one call give what their operations give in float64, at every instruction level."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel

from engine.context import packed_context
from engine.models.bert import BertModel as Bert
from engine.ops import cpu
from engine.ops.cpu.gemm import rounded
from engine.ops.elementwise import ACTIVATIONS
from tests.parity.loading import randomize, through_our_loader

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

LENGTHS = [1, 17, 2, 40, 16]


def stored(kind: str, outputs: int, inputs: int) -> tuple[cpu.StoredWeight, Tensor]:
    """A random weight of a storage, and its values in float64."""
    if kind == "int8":
        q, scale = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs, 1) / 600
        return cpu.StoredWeight(q, scale), q.double() * scale.double()
    if kind == "int4":
        packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        scale = torch.rand(outputs, inputs // 32) / 60
        q = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(outputs, -1).double() - 8
        return cpu.StoredWeight(packed, scale), q * scale.double().repeat_interleave(32, dim=1)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to({"float32": torch.float32, "bf16": torch.bfloat16}[kind])
    return cpu.StoredWeight(weight), weight.double()


class Layers:
    """Random layers, for the kernels and in float64. ``kinds`` are those of the six weights."""

    def __init__(self, count: int, width: int, inner: int, kinds: list[str], biased: bool = True) -> None:
        self.packed: list[cpu.EncoderWeights] = []
        self.plain: list[tuple[list[Tensor], list[Tensor | None], list[Tensor]]] = []
        for _ in range(count):
            shapes = [(width, width)] * 4 + [(inner, width), (width, inner)]
            weights = [stored(kind, *shape) for kind, shape in zip(kinds, shapes, strict=True)]
            biases = [torch.randn(shape[0]) if biased else None for shape in shapes]
            norms = [torch.randn(width) + shift for shift in (1.0, 0.0, 1.0, 0.0)]
            packed = (cpu.PackedWeight(w, shape[1]) for (w, _), shape in zip(weights, shapes, strict=True))
            self.packed.append(cpu.EncoderWeights(tuple(packed), tuple(biases), tuple(norms)))
            wide = [None if b is None else b.double() for b in biases]
            self.plain.append(([w for _, w in weights], wide, [n.double() for n in norms]))
        self.kinds = kinds

    def run(self, x: Tensor, lengths: list[int], heads: int, activation: str = "gelu", rounds: bool = False) -> Tensor:
        return cpu.encoder_layers(
            x.clone(),
            cpu.EncoderStack(self.packed),
            torch.tensor([0, *itertools.accumulate(lengths)]),
            heads=heads,
            eps=1e-5,
            scale=0.2,
            activation=activation,
            rounds=rounds,
        )

    def reference(
        self, x: Tensor, lengths: list[int], heads: int, activation: str = "gelu", rounds: bool = False
    ) -> Tensor:
        x = x.double()
        for weights, biases, norms in self.plain:

            def linear(x: Tensor, i: int, weights: Any = weights, biases: Any = biases) -> Tensor:
                x = rounded(x.float()) if rounds and self.kinds[i].startswith("int") else x
                return F.linear(x, weights[i], biases[i])

            q, k, v = (linear(x, i).unflatten(1, (heads, -1)).transpose(0, 1) for i in range(3))
            parts = zip(*(y.split(lengths, dim=1) for y in (q, k, v)), strict=True)
            attended = [F.scaled_dot_product_attention(*part, scale=0.2).transpose(0, 1).flatten(1) for part in parts]
            x = F.layer_norm(linear(torch.cat(attended), 3) + x, x.shape[1:], norms[0], norms[1], 1e-5)
            inner = ACTIVATIONS[activation](linear(x, 4))
            x = F.layer_norm(linear(inner, 5) + x, x.shape[1:], norms[2], norms[3], 1e-5)
        return x


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("width", "inner", "heads"), [(48, 80, 4), (40, 33, 5), (64, 96, 1), (96, 64, 3)])
def test_layers_of_floats(level: None, width: int, inner: int, heads: int) -> None:
    """Widths of heads that fill vectors and that do not, sequences longer and shorter than tiles, and a short batch."""
    torch.manual_seed(0)
    layers = Layers(2, width, inner, ["float32"] * 6)
    for lengths in (LENGTHS, [5], [130, 1]):
        x = torch.randn(sum(lengths), width)
        assert_close(layers.run(x, lengths, heads), layers.reference(x, lengths, heads))


@pytest.mark.parametrize("activation", sorted(cpu.ACTIVATIONS))
def test_activations_without_biases(activation: str) -> None:
    torch.manual_seed(0)
    layers = Layers(1, 64, 96, ["float32"] * 6, biased=False)
    x = torch.randn(sum(LENGTHS), 64)
    assert_close(layers.run(x, LENGTHS, 2, activation), layers.reference(x, LENGTHS, 2, activation))


@pytest.mark.parametrize(
    "kinds",
    [["int8"] * 6, ["int4"] * 6, ["bf16"] * 6, ["int8", "int4", "float32", "bf16", "int4", "int8"]],
    ids=["int8", "int4", "bf16", "mixed"],
)
@pytest.mark.parametrize("lengths", [LENGTHS, [3], [9, 2]], ids=["many", "few", "some"])
def test_stored_weights_and_rounded_activations(level: None, kinds: list[str], lengths: list[int]) -> None:
    """What is rounded is x alone, and only where a weight has integers. A value at the edge between two integers may
    fall to either side, so that the mean counts."""
    torch.manual_seed(0)
    layers = Layers(1, 64, 96, kinds)
    x = torch.randn(sum(lengths), 64)
    exact = layers.reference(x, lengths, 2)
    assert_close(layers.run(x, lengths, 2), exact)
    got, wanted = (f(x, lengths, 2, rounds=True) for f in (layers.run, layers.reference))
    if kinds == ["bf16"] * 6:
        assert_close(got, exact)
    else:
        assert (got - wanted).abs().mean() < 0.05 * (got - exact).abs().mean()


def test_sequences_shared_by_threads(level: None) -> None:
    """Each thread with sequences of its own, or too few for that: the result is the same."""
    torch.manual_seed(0)
    layers = Layers(2, 32, 64, ["int8"] * 6)
    for lengths in ([25, 31, 2, 40] * 5, [100, 3], [600, 20, 40]):
        x = torch.randn(sum(lengths), 32)
        cpu.set_num_threads(1)
        alone = layers.run(x, lengths, 2, rounds=True)
        cpu.set_num_threads(3)
        assert torch.equal(layers.run(x, lengths, 2, rounds=True), alone)
        assert_close(layers.run(x, lengths, 2), layers.reference(x, lengths, 2))
    cpu.set_num_threads(1)


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    torch.manual_seed(0)
    layers = Layers(1, 64, 96, ["float32"] * 6)
    x = torch.randn(sum(LENGTHS), 64)
    clean = layers.run(x, LENGTHS, 2)
    x[5, 3], x[20, 7] = torch.nan, torch.inf
    got = layers.run(x, LENGTHS, 2)
    wrong = torch.zeros(len(x), dtype=torch.bool)
    wrong[1:18] = wrong[20:60] = True
    assert torch.equal(got[~wrong], clean[~wrong])
    assert not got[wrong].isfinite().any()


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Bert:
    config = BertConfig(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    model = through_our_loader(randomize(BertModel(config), 1), Path(tmp_path_factory.mktemp("bert")))
    assert isinstance(model, Bert)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the tokens of each call of all layers."""
    seen: list[int] = []
    original = cpu.encoder_layers

    def counted(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(x))
        return original(x, *args, **options)

    monkeypatch.setattr(cpu, "encoder_layers", counted)
    return seen


def forward(model: Bert) -> Tensor:
    token_ids = torch.arange(sum(LENGTHS)) % 101
    return model(token_ids, packed_context(LENGTHS, causal=False))  # type: ignore[no-any-return]


def test_a_model_runs_its_layers_at_once_unless_someone_looks(bert: Bert, calls: list[int]) -> None:
    with torch.no_grad():
        at_once = forward(bert)
        assert calls == [sum(LENGTHS)]
        seen: list[Tensor] = []
        handle = bert.encoder.layer[0].register_forward_hook(lambda *given: seen.append(given[-1]))
        one_by_one = forward(bert)
        handle.remove()
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(forward(bert), one_by_one, rtol=1e-5, atol=1e-5)
    assert (len(calls), len(seen)) == (1, 1)


def test_replaced_tensors_are_heard(bert: Bert, calls: list[int]) -> None:
    """Of each kind: a weight, a bias, a norm."""
    last = bert.encoder.layer[-1]
    with torch.no_grad():
        for parameter in (last.output.dense.weight, last.intermediate.dense.bias, last.output.LayerNorm.weight):
            before, kept = forward(bert), parameter.data
            parameter.data = kept * 2.0
            assert not torch.allclose(forward(bert), before)
            parameter.data = kept
            assert torch.equal(forward(bert), before)
    assert len(calls) == 9
