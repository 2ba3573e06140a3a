"""Linears that are multiplied as one give what they give one by one, and stay themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import EngineConfig
from engine.context import packed_context
from engine.core.model_loader import load_model
from engine.layers.joint import JointLinears, join_linears
from engine.layers.linear import Linear
from engine.lora.adapter import Adapter, LoRABatch
from engine.ops import backends, cpu
from engine.quantization.int8 import Int8PerChannel
from tests.tiny import save_tiny_hybrid, save_tiny_llama


def linears(bias: bool) -> list[Linear]:
    made = [Linear(6, size, name=f"l{size}", bias=bias) for size in (4, 7, 1)]
    generator = torch.Generator().manual_seed(0)
    for linear in made:
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_outputs(bias: bool) -> None:
    """With adapters of some of them, on some of the rows."""
    made = linears(bias)
    joint = JointLinears(*made)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    modules = {name: (torch.ones(2, 6), torch.ones(int(name[1:]), 2)) for name in ("l4", "l1")}
    adapter = Adapter(name="a", version=1, rank=2, alpha=2.0, modules=modules)
    ctx = packed_context([2, 3], lora=LoRABatch([(adapter, 2, 5)], 5))
    with torch.inference_mode():
        wanted = joint(x, ctx)
        before = {name: p.clone() for linear in made for name, p in linear.named_parameters(prefix=linear.name)}
        assert joint.join()
        got = joint(x, ctx)
        for y, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(y, expected)
        assert got[0].untyped_storage().data_ptr() != wanted[0].untyped_storage().data_ptr()
    after = {name: p for linear in made for name, p in linear.named_parameters(prefix=linear.name)}
    assert all(torch.equal(before[name], p) for name, p in after.items())
    # One product, and no second copy of the weights.
    assert len({linear.get_parameter("weight").untyped_storage().data_ptr() for linear in made}) == 1


def test_who_changes_a_weight_is_heard() -> None:
    made = linears(False)
    joint = JointLinears(*made)
    assert joint.join()
    for linear in made:
        linear.get_parameter("weight").data = torch.zeros_like(linear.get_parameter("weight"))
    with torch.inference_mode():
        assert all(not y.any() for y in joint(torch.ones(2, 6), packed_context([2])))


def test_training_takes_them_one_by_one() -> None:
    """The update of a product is written into it, which cannot be done to a part of one."""
    made = linears(False)
    joint = JointLinears(*made)
    assert joint.join()
    outputs = joint(torch.ones(2, 6, requires_grad=True), packed_context([2]))
    assert not any(y._is_view() for y in outputs)


def test_what_is_not_joined() -> None:
    first, second, _ = linears(False)
    assert not JointLinears(first, Linear(6, 4, name="q", scheme=Int8PerChannel("int-quantized"))).join()
    assert not JointLinears(first, linears(True)[0]).join()
    assert not JointLinears(first, second.to(torch.bfloat16)).join()


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_rounded_for_integers_is_rounded_once(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of linears of which one has floats; with an adapter, and in a program that runs again over other numbers."""
    generator = torch.Generator().manual_seed(0)
    scheme = Int8PerChannel("int-quantized")
    made = [Linear(64, size, name=f"l{size}", bias=bias, scheme=scheme) for size in (24, 40)]
    made.insert(1, Linear(64, 8, name="l8", bias=bias))
    for linear in made:
        for parameter in linear.parameters():
            integers = torch.randint(-127, 128, parameter.shape, generator=generator, dtype=torch.int8)
            parameter.data = (
                integers if parameter.dtype == torch.int8 else torch.rand(parameter.shape, generator=generator)
            )
    adapter = Adapter(name="a", version=1, rank=2, alpha=2.0, modules={"l24": (torch.ones(2, 64), torch.ones(24, 2))})
    together: list[int] = []
    original = cpu.rounded_products

    def counted(x: torch.Tensor, weights: list[cpu.PackedWeight]) -> list[torch.Tensor]:
        together.append(len(weights))
        return original(x, weights)

    monkeypatch.setattr(cpu, "rounded_products", counted)
    joint = JointLinears(*made)
    x, other = torch.randn(2, 33, 64, generator=generator)
    with torch.inference_mode(), cpu.int8_activations(True):
        for ctx in (packed_context([33]), packed_context([30, 3], lora=LoRABatch([(adapter, 0, 30)], 33))):
            for y, linear in zip(joint(x, ctx), made, strict=True):
                assert torch.equal(y, linear(x, ctx))
        with cpu.capture(cpu.Arena()) as program:
            outputs = cpu.rounded_products(x, [p for p in (scheme.packed(made[0]), scheme.packed(made[2])) if p])
        wanted = [scheme.apply(linear, other) for linear in (made[0], made[2])]
        x.copy_(other)
        program.replay()
        assert all(torch.equal(y, expected) for y, expected in zip(outputs, wanted, strict=True))
        joint(x[:4], packed_context([4]))  # a few rows have a kernel of their own
    with torch.inference_mode():
        joint(x, packed_context([33]))  # nothing is rounded
    assert together == [2, 2, 2]


@pytest.mark.parametrize(("save", "saved"), [(save_tiny_llama, 3), (save_tiny_hybrid, 3)])
def test_models(save: object, saved: int, tmp_path: Path) -> None:
    """What joins on a GPU: per layer, q, k and v or the delta-net's four, and gate and up. The logits are the same."""
    assert callable(save)
    config = EngineConfig(device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=1 << 20)
    loaded = load_model("tiny", save(tmp_path / "model"), config, torch.device("cpu"), torch.float32)
    model = loaded.causal_lm()
    ids = torch.arange(3, 20)

    def logits() -> torch.Tensor:
        with torch.inference_mode(), backends.allow(triton=False):
            return model.compute_logits(model(ids, packed_context([10, 7])))

    wanted = logits()
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    assert join_linears(model) >= saved * len(layers)
    torch.testing.assert_close(logits(), wanted, rtol=1e-5, atol=1e-5)
