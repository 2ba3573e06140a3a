"""Each operation of the CPU kernels gives what its torch form gives, at every instruction level that this CPU has.

The torch form is the path that the same function takes for float64 inputs, which the kernels refuse.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import RopeConfig
from engine.context import DecodeInputs, ForwardContext, PagedCache
from engine.evaluation.scoring import token_nll
from engine.layers.rope import RotaryEmbedding, apply_rope
from engine.ops import cpu
from engine.ops.attention import attention, attention_reference
from engine.ops.causal_conv import causal_conv, causal_conv_step_slots
from engine.ops.delta_rule import (
    gated_delta_sequence,
    gated_delta_step_slots,
    gates,
    l2_normalize,
    recurrent_gated_delta_rule,
)
from engine.ops.elementwise import ACTIVATIONS, add, bias_activation, gated_activation
from engine.ops.norm import gated_rms_norm, layer_norm, rms_norm
from engine.sampling.sampler import likeliest

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

WIDTHS = [1, 7, 16, 40, 576]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_same(function: Callable[..., Tensor], *tensors: Tensor, atol: float = 2e-6) -> None:
    """The kernel's result for float32 inputs against torch's for the same in float64."""
    assert cpu.takes(*tensors)
    wanted = function(*(t.double() for t in tensors))
    torch.testing.assert_close(function(*tensors).double(), wanted, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shifted", [False, True])
def test_rms_norm(level: None, width: int, shifted: bool) -> None:
    weight = torch.randn(width)
    for x in (torch.randn(5, width), torch.randn(3, 4, 2 * width)[..., :width], torch.randn(2, 3, 2, width)):
        assert_same(lambda x, w: rms_norm(x, w, 1e-6, shifted=shifted), x, weight)


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_rms_norm(level: None, width: int) -> None:
    x, gate = torch.randn(3, 4, width), 5 * torch.randn(3, 4, width)
    assert_same(lambda x, gate, w: gated_rms_norm(x, gate, w, 1e-6), x, gate, torch.randn(width), atol=1e-5)


def test_norms_of_many_rows_are_shared_by_threads(level: None) -> None:
    cpu.set_num_threads(3)
    assert_same(lambda x, w: rms_norm(x, w, 1e-6), torch.randn(301, 576), torch.randn(576))
    cpu.set_num_threads(1)


@pytest.mark.parametrize("name", sorted(cpu.ACTIVATIONS))
def test_gated_activation(level: None, name: str) -> None:
    for width in WIDTHS:
        gate, up = torch.randn(3, 4, 2 * width).chunk(2, dim=-1)
        assert_same(lambda g, u: gated_activation(g, u, name), 6 * gate, up, atol=5e-6)
    gate = torch.tensor([[0.0, -0.0, 1e-30, 50.0, -50.0, 1e4, -1e4, torch.inf, torch.nan]])
    result = gated_activation(gate, torch.ones_like(gate), name)
    torch.testing.assert_close(result, ACTIVATIONS[name](gate), rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(level: None, width: int) -> None:
    """Rows far from 0, whose variance would drown if it were the difference of two means; any of the terms."""
    x, residual = torch.randn(2, 5, width) + 30.0
    weight, bias, added = torch.randn(3, width)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, *terms: Tensor) -> Tensor:
        given = {"added" if term.dim() == 1 else "residual": term for term in terms}
        return layer_norm(x, weight, bias, 1e-5, **given)

    for terms in ((), (added,), (residual,), (added, residual)):
        assert_same(norm, x, weight, bias, *terms, atol=5e-5)
    rows = norm(x, weight, bias, added, residual)
    assert torch.equal(norm(x[3:4], weight, bias, added, residual[3:4]), rows[3:4])


def test_likelihood_of_tokens(level: None) -> None:
    """Rows within wider ones, far from 0, and shorter than a vector; what is not finite stays so."""
    for rows, width in ((3, 5), (7, 1000), (2, 49157)):
        logits = 4 * torch.randn(rows, width + 3)[:, :width] + 1000.0
        targets = torch.randint(0, width, (rows,))
        wanted = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
        torch.testing.assert_close(token_nll(logits, targets), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(token_nll(logits[1:2], targets[1:2]), token_nll(logits, targets)[1:2])
    logits = torch.zeros(4, 40)
    logits[0, 3], logits[1, 39], logits[2, 5], logits[3, 7:] = torch.nan, torch.nan, torch.inf, -torch.inf
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([5, 5, 5, 5]), reduction="none").double()
    torch.testing.assert_close(token_nll(logits, torch.tensor([5, 5, 5, 5])), wanted, equal_nan=True)
    assert token_nll(logits[3:], torch.tensor([9])).tolist() == [torch.inf]
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            token_nll(logits, torch.full((4,), wrong))


@pytest.mark.parametrize("width", [1, 7, 300, 16384, 49157])
def test_likeliest_tokens(level: None, width: int) -> None:
    """The first of equals wherever it lies, beside tokens that cannot be; a NaN is not passed over."""
    logits = torch.randn(5, width)
    logits[1, width // 2 :] = 9.0
    logits[2] = logits[2].round()
    logits[3, : width - 1] = -torch.inf
    logits[4] = -3e38
    best, tokens = likeliest(logits)
    assert (
        cpu.choose(logits).tolist()
        == tokens.tolist()
        == [int((r == b).nonzero()[0]) for r, b in zip(logits, best, strict=True)]
    )
    for place in {0, width // 3, width - 1}:
        for wrong in (torch.nan, torch.inf):
            for other in (0.0, -torch.inf):
                row = torch.full((1, width), other)
                row[0, place] = wrong
                assert cpu.choose(row).tolist() == [-1]
    assert cpu.choose(torch.full((2, width), -torch.inf)).tolist() == [-1, -1]


@pytest.mark.parametrize("name", sorted(cpu.ACTIVATIONS))
def test_bias_and_activation(level: None, name: str) -> None:
    for width in WIDTHS:
        x, bias = 6 * torch.randn(3, width), torch.randn(width)
        assert_same(lambda x, b: bias_activation(x.clone(), b, name), x, bias, atol=5e-6)
        assert_same(lambda x: bias_activation(x.clone(), None, name), x, atol=5e-6)
    apart = torch.randn(3, 8)[:, :4]
    torch.testing.assert_close(bias_activation(apart, None, name), ACTIVATIONS[name](apart))


def test_add(level: None) -> None:
    for width in WIDTHS:
        a = torch.randn(3, width)
        assert_same(add, a, torch.randn(3, width))
        assert_same(add, a, torch.randn(width))
    a, b = torch.randn(3, 8), torch.randn(1, 8)
    assert torch.equal(add(a, b), a + b)  # of another shape: torch's
    assert torch.equal(gated_activation(a, b, "silu"), torch.nn.functional.silu(a) * b)


@pytest.mark.parametrize(("width", "fraction"), [(8, 1.0), (64, 1.0), (40, 0.5), (256, 0.25)])
def test_rotation(level: None, width: int, fraction: float) -> None:
    rotary = RotaryEmbedding(RopeConfig(theta=10000.0, partial_rotary_factor=fraction), width, 4096)
    ctx = ForwardContext(torch.tensor([0, 1, 77, 4095]), torch.tensor([0, 4]), [0, 4], [4])
    cos, sin = rotary.cos_sin(ctx)
    angles = ctx.positions[:, None].float() * rotary._inv_freq
    torch.testing.assert_close(cos, torch.cat((angles, angles), dim=-1).cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin, torch.cat((angles, angles), dim=-1).sin(), rtol=0, atol=2e-7)
    assert_same(apply_rope, torch.randn(4, 3, 2 * width)[..., :width], cos, sin)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (9, 3, 64), (8, 2, 40), (2, 1, 256)])
@pytest.mark.parametrize("window", [None, 5, 300])
def test_decode_attention(level: None, heads: int, kv_heads: int, width: int, window: int | None) -> None:
    """Lengths around the span of a softmax, over scattered blocks that hold NaN where no token of a sequence lies."""
    size, lens = 16, [2, 3, 17, 255, 256, 257, 600]
    tables = torch.zeros(len(lens), 40, dtype=torch.int32)
    free = torch.randperm(200).tolist()
    cache = PagedCache(*([torch.full((200, size, kv_heads, width), torch.nan)] for _ in range(2)), size)
    keys = [torch.randn(n, kv_heads, width) for n in lens]
    values = [torch.randn(n, kv_heads, width) for n in lens]
    slots = []
    for row, n in enumerate(lens):
        for block in range(-(-n // size)):
            tables[row, block] = free.pop()
        for position in range(n):
            block = int(tables[row, position // size])
            if position == n - 1:
                slots.append(block * size + position % size)
                continue
            cache.keys[0][block, position % size] = keys[row][position]
            cache.values[0][block, position % size] = values[row][position]
    q = torch.randn(len(lens), heads, width)
    count = len(lens)
    ctx = ForwardContext(
        torch.tensor(lens) - 1,
        torch.arange(count + 1),
        range(count + 1),
        lens,
        cache=cache,
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        decode=DecodeInputs(torch.arange(count), torch.tensor(lens), None),
        scratch={},
    )
    k, v = torch.stack([k[-1] for k in keys]), torch.stack([v[-1] for v in values])
    with cpu.capture(cpu.Arena()) as program:
        out = attention(q, k, v, ctx, 0, scale=0.3, window=window)
    assert len(program) == 1
    for row in range(count):
        wanted = attention_reference(q[row : row + 1], keys[row], values[row], scale=0.3, window=window)
        torch.testing.assert_close(out[row : row + 1], wanted, rtol=1e-5, atol=2e-6)
    alone = ForwardContext(
        ctx.positions[-1:],
        torch.arange(2),
        range(2),
        lens[-1:],
        cache=cache,
        block_tables=tables[-1:],
        slot_mapping=ctx.slot_mapping[-1:],  # type: ignore[index]
        decode=DecodeInputs(torch.arange(1), torch.tensor(lens[-1:]), None),
        scratch={},
    )
    assert torch.equal(attention(q[-1:], k[-1:], v[-1:], alone, 0, scale=0.3, window=window), out[-1:])


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (9, 3, 64), (8, 2, 40), (2, 1, 256), (64, 1, 17)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_tiled_attention(level: None, heads: int, kv_heads: int, width: int, causal: bool, window: int | None) -> None:
    """Whole sequences with lengths around those of tiles, heads within wider rows; each as it is alone."""
    lengths = [1, 2, 63, 64, 65, 130, 33]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.randn(int(starts[-1]), heads * 2, width)[:, :heads]
    k, v = torch.randn(2, len(q), kv_heads, width)
    options = {"scale": width**-0.5, "causal": causal, "window": window}
    cpu.set_num_threads(3)
    out = cpu.tiled_attention(q, k, v, starts, torch.tensor(lengths), **options)
    cpu.set_num_threads(1)
    for s, n in enumerate(lengths):
        of = slice(int(starts[s]), int(starts[s + 1]))
        wanted = attention_reference(q[of], k[of], v[of], **options)
        torch.testing.assert_close(out[of], wanted, rtol=1e-5, atol=1e-5)
        alone = cpu.tiled_attention(q[of], k[of], v[of], torch.tensor([0, n]), torch.tensor([n]), **options)
        assert torch.equal(alone, out[of])


@pytest.mark.parametrize("window", [None, 100])
def test_tiled_attention_over_blocks(level: None, window: int | None) -> None:
    """New tokens after cached ones, in scattered blocks that hold NaN where no token of a sequence lies; a prompt that
    is cut into parts gets what it gets as a whole."""
    size, kv_heads, width, lens, new = 16, 2, 32, [200, 64, 17, 129], [200, 1, 5, 70]
    tables = torch.randperm(60)[: 4 * 13].view(4, 13).int()
    keys, values = torch.full((2, 60, size, kv_heads, width), torch.nan)
    k, v = torch.randn(2, 4, 200, kv_heads, width)
    slots, new_k, new_v = [], [], []
    for s, (n, count) in enumerate(zip(lens, new, strict=True)):
        position = torch.arange(n)
        blocks, offsets = tables[s, position // size].long(), position % size
        keys[blocks[:-count], offsets[:-count]] = k[s, : n - count]
        values[blocks[:-count], offsets[:-count]] = v[s, : n - count]
        slots.append((blocks * size + offsets)[-count:])
        new_k.append(k[s, n - count : n])
        new_v.append(v[s, n - count : n])
    starts = torch.tensor([0, *new]).cumsum(0)
    q = torch.randn(int(starts[-1]), 6, width)
    options = {"scale": 0.2, "causal": True, "window": window}
    cache = (keys, values, tables, torch.cat(slots))
    out = cpu.tiled_attention(q, torch.cat(new_k), torch.cat(new_v), starts, torch.tensor(lens), cache=cache, **options)
    for s, n in enumerate(lens):
        of = slice(int(starts[s]), int(starts[s + 1]))
        wanted = attention_reference(q[of], k[s, :n], v[s, :n], **options)
        torch.testing.assert_close(out[of], wanted, rtol=1e-5, atol=1e-5)
    for begin, end in ((0, 1), (1, 90), (90, 200)):
        ends = (torch.tensor([0, end - begin]), torch.tensor([end]))
        cache = (keys, values, tables[:1], slots[0][begin:end])
        part = cpu.tiled_attention(q[begin:end], k[0, begin:end], v[0, begin:end], *ends, cache=cache, **options)
        assert torch.equal(part, out[begin:end])


@pytest.mark.parametrize(("channels", "taps"), [(6, 4), (40, 2), (2100, 4)])
def test_convolution_step(level: None, channels: int, taps: int) -> None:
    x, weight = torch.randn(3, channels), torch.randn(channels, taps)
    windows, slots = torch.randn(6, taps - 1, channels), torch.tensor([4, 1, 5])
    wide = windows.double()
    wanted = causal_conv_step_slots(x.double(), weight.double(), wide, slots)
    result = causal_conv_step_slots(x, weight, windows, slots)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=2e-6)
    assert torch.equal(windows.double(), wide)


@pytest.mark.parametrize(
    ("key_heads", "value_heads", "k", "v"), [(2, 2, 8, 8), (2, 6, 16, 24), (1, 3, 128, 128), (2, 2, 5, 70)]
)
def test_delta_step(level: None, key_heads: int, value_heads: int, k: int, v: int) -> None:
    """Against the recurrence, token by token, in float64; all tokens of the batch, and some of them."""
    for rows in (torch.arange(3), torch.tensor([0, 2])):
        mixed = torch.randn(3, 2 * key_heads * k + value_heads * v)
        q_, k_, v_ = mixed.split([key_heads * k, key_heads * k, value_heads * v], dim=-1)
        q_, k_, v_ = q_.view(3, -1, k), k_.view(3, -1, k), v_.view(3, -1, v)
        a, b = torch.randn(3, value_heads) * 10, torch.randn(3, value_heads)
        a_log, dt_bias = torch.randn(value_heads), torch.randn(value_heads)
        matrices, slots = torch.randn(5, value_heads, k, v), torch.tensor([4, 0, 2])[: len(rows)]
        before = matrices.clone()
        out = torch.full((3, value_heads, v), 7.0)
        gated_delta_step_slots(q_, k_, v_, a, b, a_log, dt_bias, matrices, rows, slots, out)
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            one = slice(row, row + 1)
            wanted, state = recurrent_gated_delta_rule(
                l2_normalize(q_[one].double(), scale=k**-0.5),
                l2_normalize(k_[one].double()),
                v_[one].double(),
                *gates(a[one].double(), b[one].double(), a_log.double(), dt_bias.double()),
                [0, 1],
                before[slot][None].double(),
            )
            torch.testing.assert_close(out[one].double(), wanted, rtol=1e-5, atol=5e-6)
            torch.testing.assert_close(matrices[slot].double(), state[0], rtol=1e-5, atol=5e-6)
        untouched = [i for i in range(5) if i not in slots]
        assert torch.equal(matrices[untouched], before[untouched])
        assert bool((out[[i for i in range(3) if i not in rows]] == 7.0).all())


@pytest.mark.parametrize(("channels", "taps"), [(6, 4), (40, 2), (1100, 4), (16, 8)])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution(level: None, channels: int, taps: int, silu: bool) -> None:
    """Sequences longer and shorter than the window, whose inputs lie in wider rows; what the windows become."""
    starts = [0, 1, 40, 42, 43 + taps]
    x, weight = torch.randn(starts[-1], channels + 3)[:, :channels], torch.randn(channels, taps)
    windows, captures = torch.randn(4, taps - 1, channels), [(1, 1), (1, 20), (3, taps + 1)]
    wanted = causal_conv(x.double(), weight.double(), starts, windows.double(), captures, silu=silu)
    found = causal_conv(x, weight, starts, windows, captures, silu=silu)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=4e-6)
    assert torch.equal(found[1].double(), wanted[1])
    assert all(torch.equal(a.double(), b) for a, b in zip(found[2], wanted[2], strict=True))
    alone = causal_conv(x, weight, starts, silu=silu)[0]
    wanted_alone = causal_conv(x.double(), weight.double(), starts, silu=silu)[0]
    torch.testing.assert_close(alone.double(), wanted_alone, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize(("key_heads", "value_heads", "k", "v"), [(2, 2, 16, 16), (1, 3, 32, 48), (1, 1, 128, 128)])
def test_delta_rule_of_a_sequence(level: None, key_heads: int, value_heads: int, k: int, v: int) -> None:
    """Against the recurrence, token by token, in float64: chunks that are full and not, and decays of all sizes."""
    for tokens in (2, 31, 64, 69):
        mixed = torch.randn(tokens, 2 * key_heads * k + value_heads * v)
        q_, k_, v_ = mixed.split([key_heads * k, key_heads * k, value_heads * v], dim=-1)
        q_, k_, v_ = q_.view(tokens, -1, k), k_.view(tokens, -1, k), v_.view(tokens, -1, v)
        a, b = torch.randn(tokens, value_heads) * 5 - 4, torch.randn(tokens, value_heads)
        a_log, dt_bias = torch.randn(value_heads), torch.randn(value_heads)
        state, out = torch.randn(value_heads, k, v), torch.empty(tokens, value_heads, v)
        wanted, after = recurrent_gated_delta_rule(
            l2_normalize(q_.double(), scale=k**-0.5),
            l2_normalize(k_.double()),
            v_.double(),
            *gates(a.double(), b.double(), a_log.double(), dt_bias.double()),
            [0, tokens],
            state[None].double(),
        )
        gated_delta_sequence(q_, k_, v_, a, b, a_log, dt_bias, state, out)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.double(), after[0], rtol=1e-4, atol=1e-5)


def test_a_capture_notices_what_torch_computes() -> None:
    x, weight = torch.randn(2, 32), torch.randn(32)
    with cpu.capture(cpu.Arena()) as program:
        rms_norm(x, weight, 1e-6).view(4, 16)[1:].unsqueeze(0)
    assert (len(program), program.foreign) == (1, None)
    for compute in (lambda: x * 2, lambda: x.T.contiguous(), lambda: x.sum().item(), lambda: x.zero_(), x.clone):
        with cpu.capture(cpu.Arena()) as program:
            compute()
            rms_norm(x, weight, 1e-6)
        assert program.foreign is not None
        with pytest.raises(AssertionError):
            program.replay()


def test_an_arena_shrinks_to_what_it_held() -> None:
    arena = cpu.Arena()
    arena.take((4,))
    held = len(arena)
    late = arena.take((2 * arena.MIN_NUMBERS,)).fill_(3.0)
    arena.shrink(held)
    assert len(arena) == held
    arena.rewind()
    for _ in range(3):
        arena.take((arena.MIN_NUMBERS,)).zero_()
    assert bool((late == 3.0).all())


@pytest.mark.parametrize("vocab_size", [1000, 49152, 248320])
def test_an_arena_grows_with_the_largest_program_and_not_with_their_number(vocab_size: int) -> None:
    """Steps of one stream more each time, as when one arrives after the other."""
    arena = cpu.Arena()
    for streams in range(1, 33):
        arena.rewind()
        for width in (1024, 4096, vocab_size):
            arena.take((streams, width))
    largest = 4 * 32 * (1024 + 4096 + vocab_size)
    assert arena.nbytes <= 4 * max(largest, 4 * arena.MIN_NUMBERS)


def test_small_operands_may_lie_apart_in_memory() -> None:
    """Weights, biases and angles that are views: every second number of something."""

    def apart(*shape: int) -> Tensor:
        return torch.randn(*shape, 2)[..., 0]

    x, weight, bias, added = torch.randn(3, 32), apart(32), apart(32), apart(32)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm(x.double(), weight.double(), 1e-6).float())
    wanted = F.layer_norm(x + added, (32,), weight, bias, 1e-6)
    torch.testing.assert_close(cpu.layer_norm(x, weight, bias, 1e-6, added, None), wanted)
    torch.testing.assert_close(cpu.bias_activation(x.clone(), bias, "gelu"), F.gelu(x + bias), rtol=1e-5, atol=1e-5)
    heads, cos, sin = torch.randn(3, 2, 32), apart(3, 32), apart(3, 32)
    torch.testing.assert_close(cpu.rope(heads, cos, sin), cpu.rope(heads, cos.contiguous(), sin.contiguous()))


def test_targets_that_do_not_fit_the_logits_are_not_read() -> None:
    for targets in (torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(AssertionError):
            cpu.token_nll(torch.randn(3, 8), targets)


def test_a_replay_reads_what_lies_in_the_same_places_now() -> None:
    x, weight, arena = torch.randn(2, 32), torch.randn(32), cpu.Arena()
    with cpu.capture(arena) as program:
        out = add(rms_norm(x, weight, 1e-6), x)
    x.copy_(torch.randn(2, 32))
    program.replay()
    assert torch.equal(out, rms_norm(x, weight, 1e-6) + x)
    with cpu.capture(arena) as other:  # over the same memory
        again = add(rms_norm(x, weight, 1e-6), x)
    assert again.data_ptr() == out.data_ptr()
    for each in (other, program):
        each.replay()
        assert torch.equal(out, rms_norm(x, weight, 1e-6) + x)
