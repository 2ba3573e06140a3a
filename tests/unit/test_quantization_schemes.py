"""Schemes on a single module: values, gradients, kernels, and LoRA over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import engine.ops.quantized as ops
from engine.context import packed_context
from engine.errors import FormatError
from engine.layers.linear import Embedding, Linear
from engine.lora.adapter import Adapter, LoRABatch
from engine.quantization.base import UNQUANTIZED, LinearScheme
from engine.quantization.int4 import Int4Grouped
from engine.quantization.int8 import Int8PerChannel
from engine.quantization.packing import pack, pack_outputs
from engine.quantization.quantize import quantize_rows

OUT, IN = 24, 64
SCHEMES: list[LinearScheme] = [
    Int8PerChannel("int-quantized"),
    Int8PerChannel("pack-quantized"),
    Int4Grouped(32),
    Int4Grouped(64, symmetric=False),
]
IDS = ["q8-int", "q8-packed", "q4", "q4-asymmetric"]


def fill(module: torch.nn.Module, scheme: LinearScheme, seed: int = 0) -> Tensor:
    """Gives a module a random weight as a checkpoint would; returns the weight [O, I] that its tensors stand for."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = torch.randn(out_features, in_features, generator=generator) + 0.5
    dtype = module.get_parameter("weight_scale").dtype
    four = isinstance(scheme, Int4Grouped)
    rows = quantize_rows(
        weight,
        bits=4 if four else 8,
        group_size=scheme.group_size if isinstance(scheme, Int4Grouped) else None,
        symmetric=scheme.symmetric if isinstance(scheme, Int4Grouped) else True,
        scale_dtype=dtype,
    )
    stored = {"weight_scale": rows.scale}
    if isinstance(scheme, Int8PerChannel) and scheme.stored == "int-quantized":
        stored["weight"] = rows.values
    else:
        stored["weight_packed"] = pack(rows.values, 4 if four else 8)
        stored["weight_shape"] = torch.tensor([out_features, in_features])
    if rows.zero is not None:
        stored["weight_zero_point"] = pack_outputs(rows.zero, 4)
    missing, unexpected = module.load_state_dict(stored, strict=False)
    assert not unexpected
    assert [name for name in missing if name != "bias"] == []
    scheme.after_loading(module)
    return rows.dequantize()


def make(scheme: LinearScheme, dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[Linear, Tensor]:
    shape = {"in_features": IN, "out_features": OUT} | sizes
    module = Linear(**shape, name="layer.proj", scheme=scheme, dtype=dtype)
    return module, fill(module, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_product_and_rows_are_those_of_the_stored_weight(scheme: LinearScheme) -> None:
    module, weight = make(scheme)
    assert torch.equal(scheme.dequantize(module), weight)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(scheme.apply(module, x), F.linear(x, weight))
    assert scheme.apply(module, x[:, :0]).shape == (2, 0, OUT)
    table = Embedding(OUT, IN, name="embed_tokens", scheme=scheme)
    weight = fill(table, scheme)
    ids = torch.tensor([3, 0, 3, OUT - 1])
    assert torch.equal(table(ids), weight[ids])
    torch.testing.assert_close(table.project(x[0]), F.linear(x[0], weight))


@pytest.mark.parametrize("scheme", [*SCHEMES, UNQUANTIZED], ids=[*IDS, "float"])
def test_parts_of_the_product_are_the_product(scheme: LinearScheme) -> None:
    """Outputs taken in parts, and the gradients that they give, are those of the whole."""
    if scheme is UNQUANTIZED:
        module = Linear(IN, OUT, name="layer.proj")
        weight = torch.randn(OUT, IN)
        module.load_state_dict({"weight": weight})
    else:
        module, weight = make(scheme)
    x = torch.randn(40, IN, requires_grad=True)
    whole = F.linear(x, weight)
    parts = [scheme.apply_part(module, x, *bounds) for bounds in ((0, 7), (7, 8), (8, OUT))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    seeds = torch.randn(40, OUT)
    (expected,) = torch.autograd.grad(whole, x, seeds)
    sums = [torch.autograd.grad(p, x, s)[0] for p, s in zip(parts, seeds.split([7, 1, OUT - 8], 1), strict=True)]
    torch.testing.assert_close(sum(sums), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_chunks_of_the_weight_give_the_whole_product_and_gradient(
    scheme: LinearScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, weight = make(scheme)
    x = torch.randn(7, IN, requires_grad=True)
    out = torch.randn(7, OUT)
    monkeypatch.setattr(ops, "CPU_CHUNK_ELEMENTS", 5 * IN)
    y = scheme.apply(module, x)
    torch.testing.assert_close(y, F.linear(x, weight))
    (gradient,) = torch.autograd.grad(y, x, out)
    torch.testing.assert_close(gradient, out @ weight)


def gradient_is_right(scheme: LinearScheme, module: Linear) -> bool:
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(lambda x: scheme.apply(module, x), (x,), raise_exception=False)


@pytest.mark.parametrize("chunk", [1 << 20, 5 * IN], ids=["whole", "chunked"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_gradcheck_in_float64(scheme: LinearScheme, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CPU_CHUNK_ELEMENTS", chunk)
    assert gradient_is_right(scheme, make(scheme)[0])


@pytest.mark.parametrize(
    "mutate",
    [
        lambda backward, grad, rows: backward(grad, rows) * 1.01,
        lambda backward, grad, rows: backward(grad, rows).roll(1, -1),
        lambda backward, grad, rows: backward(grad.roll(1, -1), rows),
        lambda backward, grad, rows: backward(grad, lambda a, b, dtype: rows(a, b, dtype).sign()),
    ],
    ids=["scaled", "shifted input", "shifted output", "scales forgotten"],
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_gradcheck_catches_a_wrong_backward(scheme: LinearScheme, mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above is worth something: backwards that are slightly wrong fail it."""
    right = ops._backward
    monkeypatch.setattr(ops, "_backward", lambda grad, rows: mutate(right, grad, rows))
    assert not gradient_is_right(scheme, make(scheme)[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_nothing_of_the_wide_weight_is_kept_for_the_backward(scheme: LinearScheme) -> None:
    module, _ = make(scheme)
    saved: list[Tensor] = []
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scheme.apply(module, x).sum().backward()
    assert saved == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_lora_trains_over_a_quantized_base(scheme: LinearScheme) -> None:
    """Gradients of x, A and B through Linear equal those over a plain weight of the same values."""
    module, weight = make(scheme)
    plain = Linear(IN, OUT, name="layer.proj")
    plain.weight.data.copy_(weight)
    results = []
    for linear in (module, plain):
        torch.manual_seed(1)
        a, b = (torch.randn(4, IN) / 8).requires_grad_(), torch.randn(OUT, 4).requires_grad_()
        adapter = Adapter("tone", 1, rank=4, alpha=8.0, modules={"layer.proj": (a, b)})
        x = torch.randn(9, IN, requires_grad=True)
        ctx = packed_context([9], lora=LoRABatch([(adapter, 2, 7)], 9))
        linear(x, ctx).square().sum().backward()
        results.append((x.grad, a.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert all(not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 40])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_bfloat16_kernels_are_as_close_to_the_truth_as_the_reference(scheme: LinearScheme, num_rows: int) -> None:
    """Both round their result to bfloat16 (2^-9 relative); the kernel may add a rounding of its offset per group."""
    module, weight = make(scheme, torch.bfloat16, in_features=128, out_features=96)
    x = torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    truth = F.linear(x.double(), weight.double())
    size = F.linear(x.double().abs(), weight.double().abs())
    assert float(((scheme.apply(module, x).double() - truth).abs() / size).max()) < 2**-8


def test_float32_never_computes_narrower() -> None:
    """The error against float64 is that of float32 sums, for one row (where kernels would be tempting) and for many."""
    for scheme in SCHEMES:
        module, weight = make(scheme, in_features=128)
        for num_rows in (1, 40):
            x = torch.randn(num_rows, 128)
            y = scheme.apply(module, x)
            assert y.dtype == torch.float32
            truth = F.linear(x.double(), weight.double())
            assert float((y.double() - truth).abs().max() / truth.abs().max()) < 1e-6


def test_a_stored_shape_of_another_module_is_rejected() -> None:
    for scheme in (Int8PerChannel(), Int4Grouped(32)):
        module = Linear(IN, OUT, name="layer.proj", scheme=scheme)
        module.weight_shape.data.copy_(torch.tensor([IN, OUT]))  # type: ignore[union-attr,operator]
        with pytest.raises(FormatError, match=r"layer\.proj\.weight_shape is \[64, 24\]"):
            scheme.after_loading(module)


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(FormatError, match=r"layer\.proj has 48 inputs"):
        Linear(48, 8, name="layer.proj", scheme=Int4Grouped(32))


@pytest.mark.parametrize("chunk", [1 << 20, 5 * IN], ids=["whole", "chunked"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_autocast_computes_and_answers_in_its_own_type(
    scheme: LinearScheme, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a plain weight, whatever the size of the weight."""
    monkeypatch.setattr(ops, "CPU_CHUNK_ELEMENTS", chunk)
    module, weight = make(scheme)
    x = torch.randn(40, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = scheme.apply(module, x), F.linear(x, weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-1)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, weight.sum(dim=0).expand_as(x), rtol=2e-2, atol=2e-1)
