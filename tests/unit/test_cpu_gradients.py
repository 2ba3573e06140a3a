"""Operations that the CPU kernels take in both directions: forward as serving's, gradient as autograd's of the plain
form in float64, at every level of instructions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.context import packed_context
from engine.layers.rope import apply_rope, apply_rope_reference
from engine.ops import cpu
from engine.ops.attention import attention
from engine.ops.causal_conv import causal_conv_sequences, taps_reference
from engine.ops.delta_rule import gates, l2_normalize, recurrent_gated_delta_rule
from engine.ops.delta_rule_gradient import gated_delta_sequences
from engine.ops.elementwise import gated_activation, gated_activation_reference
from engine.ops.norm import gated_rms_norm, rms_norm
from engine.ops.root_norm import root_norm_reference

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

WIDTHS = (7, 17, 64, 576)


def check(function: Callable[..., Tensor], plain: Callable[..., Tensor], *tensors: Tensor, atol: float = 5e-6) -> None:
    """Of all tensors; the gradient that comes in is no constant, and may have strides."""
    with torch.no_grad():
        served = function(*tensors)
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*inputs)
    assert torch.equal(out, served)
    wide = [t.double().requires_grad_() for t in tensors]
    for seeds in (torch.randn(out.shape), torch.randn(*out.shape[:-1], 2 * out.shape[-1])[..., ::2]):
        found = torch.autograd.grad(out, inputs, seeds, retain_graph=True)
        wanted = torch.autograd.grad(plain(*wide), wide, seeds.double())
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shifted", [False, True])
def test_rms_norm(level: None, shifted: bool) -> None:
    for width in WIDTHS:
        weight = torch.randn(width)
        wide = weight.double() + (1.0 if shifted else 0.0)
        for shape in ((5, width), (2, 3, width)):
            check(
                lambda x, w=weight: rms_norm(x, w, 1e-6, shifted=shifted),
                lambda x, w=wide, n=width: root_norm_reference(x, w, count=n, eps=1e-6),
                torch.randn(shape) + 0.5,
            )


def test_gated_rms_norm(level: None) -> None:
    for width in WIDTHS:
        weight = torch.randn(width)

        def plain(x: Tensor, gate: Tensor, weight: Tensor = weight) -> Tensor:
            normed = root_norm_reference(x, weight.double(), count=x.shape[-1], eps=1e-6)
            return normed * torch.nn.functional.silu(gate)

        tensors = torch.randn(2, 3, width) + 0.5, 2 * torch.randn(2, 3, width)
        check(lambda x, gate, w=weight: gated_rms_norm(x, gate, w, 1e-6), plain, *tensors)


@pytest.mark.parametrize("name", cpu.ACTIVATIONS_WITH_GRADIENT)
def test_gated_activation(level: None, name: str) -> None:
    for width in WIDTHS:
        check(
            lambda gate, up: gated_activation(gate, up, name),
            lambda gate, up: gated_activation_reference(gate, up, name),
            6 * torch.randn(3, width),
            torch.randn(3, width),
            atol=3e-5 if "gelu" in name else 5e-6,  # 1 - tanh^2 of a large number loses digits, and x multiplies it
        )
    gate = torch.tensor([0.0, -0.0, 1e-30, 50.0, -50.0, 1e4, -1e4], requires_grad=True)
    (found,) = torch.autograd.grad(gated_activation(gate, torch.ones_like(gate), name).sum(), gate)
    (wanted,) = torch.autograd.grad(gated_activation_reference(gate, torch.ones_like(gate), name).sum(), gate)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (64, 64), (40, 20)])
def test_rotation(level: None, width: int, rotated: int) -> None:
    angles = torch.randn(5, rotated // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    check(
        lambda x: apply_rope(x, cos, sin),
        lambda x: apply_rope_reference(x, cos.double(), sin.double()),
        torch.randn(5, 3, width),
    )


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 3, 32), (9, 3, 64), (4, 1, 96)])
def test_attention(level: None, heads: int, kv_heads: int, width: int) -> None:
    """Lengths around those of tiles and blocks; each sequence by itself."""
    lengths = [1, 2, 21, 47, 48, 49, 64, 130]
    starts = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    ctx = packed_context(lengths)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = itertools.pairwise(starts)
        return torch.cat([reference(q[a:b], k[a:b], v[a:b]) for a, b in bounds])

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1).transpose(0, 1), v.repeat_interleave(group, 1).transpose(0, 1)
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        scores = (q.transpose(0, 1) @ k.mT * 0.3).masked_fill(later, -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(0, 1)

    tensors = [torch.randn(starts[-1], count, width) for count in (heads, kv_heads, kv_heads)]
    check(lambda q, k, v: attention(q, k, v, ctx, 0, scale=0.3), plain, *tensors, atol=1e-4)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "taps"), [(7, 4), (300, 2), (64, 8)])
def test_convolution(level: None, channels: int, taps: int, silu: bool) -> None:
    """Sequences shorter than the taps, and each by itself."""
    starts = [0, 1, 3, 20, 21]
    weight = torch.randn(channels, taps)

    def plain(x: Tensor) -> Tensor:
        parts = (torch.nn.functional.pad(x[a:b], (0, 0, taps - 1, 0)) for a, b in itertools.pairwise(starts))
        y = torch.cat([taps_reference(part, weight.double()) for part in parts])
        return torch.nn.functional.silu(y) if silu else y

    check(lambda x: causal_conv_sequences(x, weight, starts, silu=silu), plain, torch.randn(21, channels), atol=2e-5)


@pytest.mark.parametrize(("key_heads", "value_heads", "k", "v"), [(2, 2, 16, 16), (1, 3, 32, 48), (1, 1, 128, 128)])
def test_delta_rule(level: None, key_heads: int, value_heads: int, k: int, v: int) -> None:
    """Against autograd of the recurrence: sequences around the length of a chunk, gates that are shut, open and far
    beyond, and inputs that are parts of one tensor."""
    starts = [0, 1, 32, 65, 134]
    tokens, sizes = starts[-1], [key_heads * k, key_heads * k, value_heads * v]
    a, b = 5 * torch.randn(tokens, value_heads) - 4, torch.randn(tokens, value_heads)
    a[3], b[5], b[70], b[71] = 30.0, -100.0, 100.0, -20.0
    a_log, dt_bias = torch.randn(value_heads), torch.randn(value_heads)

    def parts(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_, k_, v_ = mixed.split(sizes, dim=-1)
        return q_.view(tokens, -1, k), k_.view(tokens, -1, k), v_.view(tokens, -1, v)

    def plain(mixed: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q_, k_, v_ = parts(mixed)
        inputs = (l2_normalize(q_, scale=k**-0.5), l2_normalize(k_), v_, *gates(a, b, a_log.double(), dt_bias.double()))
        return recurrent_gated_delta_rule(*inputs, starts)[0]

    check(
        lambda mixed, a, b: gated_delta_sequences(*parts(mixed), a, b, a_log, dt_bias, starts),
        plain,
        torch.randn(tokens, sum(sizes)),
        a,
        b,
        atol=2e-5,
    )


def test_rows_are_shared_by_threads() -> None:
    cpu.set_num_threads(3)
    weight = torch.randn(576)
    check(
        lambda x: rms_norm(x, weight, 1e-6),
        lambda x: root_norm_reference(x, weight.double(), count=576, eps=1e-6),
        torch.randn(301, 576),
    )
    check(
        lambda gate, up: gated_activation(gate, up, "silu"),
        lambda gate, up: gated_activation_reference(gate, up, "silu"),
        torch.randn(301, 576),
        torch.randn(301, 576),
    )
    cpu.set_num_threads(1)
