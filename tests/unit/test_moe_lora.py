"""Routed experts with adapters: mixed batches, the products that are made, what is kept for the backward, targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelConfig
from engine.context import packed_context
from engine.errors import InvalidArgumentError
from engine.jobs import LoRAParams
from engine.layers.moe import Experts
from engine.lora.adapter import Adapter, LoRABatch
from engine.lora.combine import combine
from engine.lora.targets import LinearLike, StackedTarget
from engine.training.lora_init import new_adapter, select_targets, validate_lora

torch.set_num_threads(1)
E, K, D, WIDTH = 16, 2, 6, 4
NAME = "model.layers.0.mlp.experts"
CONFIG = ModelConfig(
    model_type="qwen3_5_moe_text",
    vocab_size=11,
    hidden_size=D,
    intermediate_size=5,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=32,
    norm_eps=1e-6,
    layer_types=("full_attention",),
)


def make_experts() -> Experts:
    experts = Experts(CONFIG, NAME, E, WIDTH, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def make_adapter(name: str, seed: int, targets: list[str], rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = make_experts().lora_targets()
    modules = {
        f"{NAME}.{t}": (
            random(E, rank, shapes[f"{NAME}.{t}"].in_features),
            random(E, shapes[f"{NAME}.{t}"].out_features, rank),
        )
        for t in targets
    }
    return Adapter(name=name, version=1, rank=rank, alpha=3.0, modules=modules)


def routed(tokens: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights and experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, E, generator=generator, dtype=torch.float64)
    weights, experts = scores.topk(K)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64), weights, experts


def test_a_merged_weight_computes_the_same() -> None:
    """Each expert with its own update equals experts whose weights have delta_weight added."""
    adapter = make_adapter("a", 1, ["gate_up_proj", "down_proj"])
    experts, merged = make_experts(), make_experts()
    for name in ("gate_up_proj", "down_proj"):
        getattr(merged, name).add_(adapter.delta_weight(f"{NAME}.{name}"))
    x, weights, chosen = routed(9)
    ctx = packed_context([9], lora=LoRABatch([(adapter, 0, 9)], 9))
    expected = merged(x, weights, chosen, packed_context([9]))
    torch.testing.assert_close(experts(x, weights, chosen, ctx), expected, atol=1e-10, rtol=1e-10)
    assert (expected - experts(x, weights, chosen, packed_context([9]))).abs().max() > 0.1


def test_adapters_of_experts_are_combined() -> None:
    """By "cat" the updates' weighted sum, exactly; by "linear" the weighted sums of A and of B."""
    name = f"{NAME}.gate_up_proj"
    first, second = make_adapter("a", 1, ["gate_up_proj", "down_proj"]), make_adapter("b", 2, ["gate_up_proj"])
    weighted = [(first, 0.7), (second, -1.5)]
    made = combine("sum", weighted, "cat")
    assert (made.rank_of(name), made.rank_of(f"{NAME}.down_proj"), made.scaling(name)) == (4, 2, 1.0)
    expected = 0.7 * first.delta_weight(name) - 1.5 * second.delta_weight(name)
    torch.testing.assert_close(made.delta_weight(name), expected, atol=1e-12, rtol=1e-12)
    (a, b), (a1, b1), (a2, b2) = (
        adapter.modules[name] for adapter in (combine("l", weighted, "linear"), first, second)
    )
    roots = (0.7 * 1.5) ** 0.5, (1.5 * 1.5) ** 0.5
    torch.testing.assert_close(a, roots[0] * a1 - roots[1] * a2, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(b, roots[0] * b1 + roots[1] * b2, atol=1e-12, rtol=1e-12)
    with pytest.raises(InvalidArgumentError, match="ranks 2, 5"):
        combine("x", [(first, 1.0), (make_adapter("c", 3, ["gate_up_proj"], rank=5), 1.0)], "linear")


@pytest.mark.parametrize("grad", [False, True])
def test_a_mixed_batch_equals_each_alone(grad: bool) -> None:
    """The base, two adapters of the experts with other ranks, one of one parameter and one of none, one of them twice:
    each sequence's rows are those that it has alone."""
    experts = make_experts()
    both = make_adapter("both", 1, ["gate_up_proj", "down_proj"])
    wide = make_adapter("wide", 2, ["gate_up_proj", "down_proj"], rank=5)
    one, none = make_adapter("one", 4, ["down_proj"]), make_adapter("none", 5, [])
    lengths, order = [4, 3, 1, 5, 2, 6], [both, None, wide, one, none, both]
    x, weights, chosen = routed(sum(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    segments = [(a, s, s + n) for a, s, n in zip(order, starts, lengths, strict=True) if a is not None]
    with torch.set_grad_enabled(grad):
        together = experts(x, weights, chosen, packed_context(lengths, lora=LoRABatch(segments, sum(lengths))))
    for adapter, start, length in zip(order, starts, lengths, strict=True):
        rows = slice(start, start + length)
        lora = None if adapter is None else LoRABatch([(adapter, 0, length)], length)
        alone = experts(x[rows], weights[rows], chosen[rows], packed_context([length], lora=lora))
        torch.testing.assert_close(together[rows], alone, atol=1e-12, rtol=1e-12)


def test_gradients_of_a_mixed_batch() -> None:
    """float64 gradcheck with respect to the input and every A and B of two adapters, the base between them."""
    experts, (x, weights, chosen) = make_experts(), routed(7)
    shapes = [make_adapter("a", 1, ["gate_up_proj", "down_proj"], rank=1), make_adapter("b", 2, ["gate_up_proj"])]
    factors = [factor for adapter in shapes for pair in adapter.modules.values() for factor in pair]

    def forward(x: Tensor, *factors: Tensor) -> Tensor:
        left = iter(factors)
        first, second = (replace(a, modules={name: (next(left), next(left)) for name in a.modules}) for a in shapes)
        lora = LoRABatch([(first, 0, 3), (second, 4, 6), (first, 6, 7)], 7)
        return experts(x, weights, chosen, packed_context([3, 1, 2, 1], lora=lora))  # type: ignore[no-any-return]

    inputs = tuple(t.requires_grad_() for t in (x, *factors))
    assert torch.autograd.gradcheck(forward, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    gradients = torch.autograd.grad(forward(*inputs).square().sum(), inputs)
    assert all(gradient.norm() > 1e-3 for gradient in gradients)


def test_only_experts_that_are_hit_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of K experts: K products by each parameter and each of its factors, however many experts there are."""
    calls = []
    right = F.linear

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        calls.append(weight.shape)
        return right(x, weight, *rest)

    monkeypatch.setattr(F, "linear", counted)
    adapter = make_adapter("a", 1, ["gate_up_proj", "down_proj"])
    make_experts()(*routed(1), packed_context([1], lora=LoRABatch([(adapter, 0, 1)], 1)))
    assert len(calls) == 6 * K


def test_what_a_backward_keeps() -> None:
    """Of the base's weights nothing is copied, and no gradient is made; the factors' gradients are made once, not once
    for each expert."""
    experts = make_experts()
    adapter = make_adapter("a", 1, ["gate_up_proj", "down_proj"])
    for pair in adapter.modules.values():
        for factor in pair:
            factor.requires_grad_()
    kept: dict[int, int] = {}
    shared = {t.untyped_storage().data_ptr() for t in experts.parameters()}
    shared |= {t.untyped_storage().data_ptr() for pair in adapter.modules.values() for t in pair}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 32
    x, weights, chosen = routed(tokens)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = experts(x, weights, chosen, packed_context([tokens], lora=LoRABatch([(adapter, 0, tokens)], tokens)))
    rows = tokens * K
    # Inputs of both parameters, gate, up and act(gate), the low-rank rows, the weighted sum's terms, and indices.
    assert sum(kept.values()) <= 8 * rows * (D + WIDTH + 3 * WIDTH + 2 * 2 + D + 8)
    out.sum().backward()
    assert all(parameter.grad is None for parameter in experts.parameters())
    hit = torch.bincount(chosen.flatten(), minlength=E) > 0
    for pair in adapter.modules.values():
        for factor in pair:
            assert factor.grad is not None
            assert ((factor.grad != 0).flatten(1).any(1) == hit).all(), "only experts that were taken get a gradient"


class Linear:
    in_features = 6
    out_features = 4


TARGETS: dict[str, LinearLike] = {
    f"model.layers.{layer}.{name}": StackedTarget(E, 6, 8) if "experts" in name else Linear()
    for layer in range(2)
    for name in ("q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj")
}


@pytest.mark.parametrize(
    ("modules", "parameters", "layers", "expected"),
    [
        ([], [], [1], ["q_proj", "mlp.shared_expert.down_proj"]),
        (["down_proj"], [], [1], ["mlp.shared_expert.down_proj"]),
        ([], ["down_proj"], [1], ["mlp.experts.down_proj"]),
        (["q_proj"], ["experts.gate_up_proj"], [1], ["q_proj", "mlp.experts.gate_up_proj"]),
        (["all-linear"], ["mlp.experts.down_proj"], [1],
         ["q_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"]),
    ],
)  # fmt: skip
def test_experts_are_adapted_where_they_are_named(
    modules: list[str], parameters: list[str], layers: list[int], expected: list[str]
) -> None:
    """target_modules never reaches them, target_parameters alone adapts nothing else, a layer window holds for both."""
    lora = LoRAParams(target_modules=modules, target_parameters=parameters, layers=layers)
    assert select_targets(TARGETS, lora) == [f"model.layers.1.{name}" for name in expected]


def test_what_cannot_be_adapted_is_named() -> None:
    """Unknown names tell what would be accepted; a dense model has nothing; dropout is refused as in PEFT."""
    with pytest.raises(
        InvalidArgumentError, match=r"'up_proj'; accepted: mlp\.experts\.down_proj, mlp\.experts\.gate"
    ) as e:
        select_targets(TARGETS, LoRAParams(target_parameters=["up_proj"]))
    assert e.value.field == "lora.target_parameters"
    with pytest.raises(
        InvalidArgumentError, match=r"'gate_up_proj'; accepted: down_proj, q_proj, or 'all-linear' alone"
    ):
        select_targets(TARGETS, LoRAParams(target_modules=["gate_up_proj"]))
    dense: dict[str, LinearLike] = {"model.layers.0.q_proj": Linear()}
    with pytest.raises(InvalidArgumentError, match="accepted: none, since the model has no stacked experts"):
        select_targets(dense, LoRAParams(target_parameters=["experts.down_proj"]))
    with pytest.raises(InvalidArgumentError, match=r"dropout is 0\.1; accepted: 0 with target_parameters"):
        validate_lora(LoRAParams(target_parameters=["experts.down_proj"], dropout=0.1))


def test_a_new_update_is_zero() -> None:
    """B is zero, so the update is, whatever A is."""
    adapter = new_adapter("a", TARGETS, LoRAParams(rank=3, target_parameters=["experts.down_proj"]), 0, "cpu")
    name = "model.layers.0.mlp.experts.down_proj"
    assert adapter.delta_weight(name).shape == (E, 8, 6)
    assert not adapter.delta_weight(name).any()
    assert adapter.num_parameters() == 2 * E * 3 * (6 + 8)
