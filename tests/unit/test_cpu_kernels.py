"""The CPU kernels give what torch gives for the same stored weight, at every instruction level that this CPU has."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.linear import Linear
from engine.ops import causal_attention, cpu
from engine.ops.cpu import PackedWeight, StoredWeight, gemm

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

GROUP = 32


def stored(kind: str, outputs: int, inputs: int) -> tuple[StoredWeight, Tensor]:
    """A weight as it is stored, and its values in float64."""
    if kind in ("float32", "bfloat16", "float16"):
        data = torch.randn(outputs, inputs).to(getattr(torch, kind))
        return StoredWeight(data), data.double()
    bits, scale_type, has_offset = int(kind[3]), torch.float16 if "half" in kind else torch.float32, "offset" in kind
    group = inputs if "channel" in kind else GROUP
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), dtype=torch.int8)
    scales = (torch.rand(outputs, inputs // group) * 0.1).to(scale_type)
    offsets = torch.randn(outputs, inputs // group).to(scale_type) if has_offset else None
    zeros = torch.randint(-8, 8, (outputs, inputs // group)).to(scale_type) if "zero" in kind else None
    wide = q.double().view(outputs, -1, group)
    if zeros is not None:
        wide = wide - zeros.double()[..., None]
    wide = wide * scales.double()[..., None]
    if offsets is not None:
        wide = wide + offsets.double()[..., None]
    data = q
    if bits == 4:
        halves = (q + 8).to(torch.uint8)
        data = (halves[:, 0::2] | (halves[:, 1::2] << 4)).contiguous()
    return StoredWeight(data, scales, zeros, offsets), wide.view(outputs, inputs)


KINDS = [
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int8-offset",
    "int8-half",
    "int8-channel",
    "int4",
    "int4-zero",
    "int4-offset-half",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_products_are_those_of_the_stored_values(level: None, kind: str, num_threads: int) -> None:
    torch.manual_seed(0)
    cpu.set_num_threads(num_threads)
    for outputs, inputs in ((1, GROUP), (37, 3 * GROUP), (300, 576)):
        weight, values = stored(kind, outputs, inputs)
        assert weight.is_supported(inputs)
        packed = PackedWeight(weight, inputs)
        for rows in (1, 2, 3, 5, 8, 13):
            x = torch.randn(rows, inputs)
            wanted = x.double() @ values.T
            scale = (x.double().abs() @ values.abs().T).max()
            assert ((packed.linear(x) - wanted).abs().max() / scale) < 1e-6
    cpu.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_many_rows_are_those_of_the_stored_values_and_so_are_their_gradients(
    level: None, kind: str
) -> None:
    """Rows that fill tiles and blocks or do not, parts of what is summed, whole panels of columns and parts of one."""
    torch.manual_seed(0)
    cpu.set_num_threads(2)
    for rows, outputs, inputs, start, end in (
        (1, 1, 32, 0, 1),
        (13, 37, 96, 0, 37),
        (300, 70, 576, 3, 70),
        (11, 4200, 64, 5, 4150),
        (7, 33, 4160, 0, 33),
    ):
        weight, values = stored(kind, outputs, inputs)
        packed, values = PackedWeight(weight, inputs), values[start:end]
        for multiply, factor in ((packed.product, values.T), (packed.product_transposed, values)):
            x = torch.randn(rows, len(factor) + 5)[:, 2:-3]  # rows that do not lie end to end
            scale = (x.double().abs() @ factor.abs()).max()
            assert ((multiply(x, start, end) - x.double() @ factor).abs().max() / scale) < 1e-6
            assert multiply(x[:0], start, end).shape == (0, factor.shape[1])
    cpu.set_num_threads(1)


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_a_row_of_many_does_not_depend_on_the_others(level: None, kind: str) -> None:
    torch.manual_seed(0)
    packed = PackedWeight(stored(kind, 50, 320)[0], 320)
    for multiply, width in ((packed.product, 320), (packed.product_transposed, 50)):
        x = torch.randn(300, width)
        together = multiply(x)
        for start, end in ((0, 1), (3, 10), (250, 300)):
            assert torch.equal(multiply(x[start:end]), together[start:end])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(level: None, kind: str) -> None:
    torch.manual_seed(0)
    packed = PackedWeight(stored(kind, 50, 192)[0], 192)
    x = torch.randn(32, 192)
    alone = torch.cat([packed.linear(row[None]) for row in x])
    for rows in (*range(1, 12), 32):
        assert torch.equal(packed.linear(x[:rows]), alone[:rows])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int")])
def test_rows_are_the_stored_values_to_one_rounding(level: None, kind: str) -> None:
    torch.manual_seed(0)
    weight, values = stored(kind, 41, 5 * GROUP)
    packed = PackedWeight(weight, 5 * GROUP)
    for start, end in ((0, 41), (7, 8), (40, 41)):
        assert torch.equal(packed.widen(start, end), values[start:end].float())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int")])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_integer_products_are_those_of_a_rounded_row(level: None, kind: str, num_threads: int) -> None:
    """Whole blocks of groups and parts of them, vectors of two groups and a last half. Many rows: test_cpu_gemm."""
    torch.manual_seed(0)
    cpu.set_num_threads(num_threads)
    for outputs, inputs in ((1, 32), (37, 96), (303, 576), (9, 65 * 32)):
        weight, values = stored(kind, outputs, inputs)
        packed = PackedWeight(weight, inputs)
        x = torch.randn(1, inputs)
        x[0, :16] = 0
        scale = (x.double().abs() @ values.abs().T).max()
        assert ((packed.linear(x, rounds=True) - gemm.rounded(x) @ values.T).abs().max() / scale) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_exactly(level: None, dtype: torch.dtype) -> None:
    """All of them: zeros, subnormals, infinities and NaN as well."""
    data = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).view(-1, 256)
    packed = PackedWeight(StoredWeight(data), 256)
    torch.testing.assert_close(packed.widen(0, 256), data.float(), rtol=0, atol=0, equal_nan=True)
    finite = data[data.isfinite().all(dim=1)]
    one_each = torch.eye(256)
    for multiply in (PackedWeight(StoredWeight(finite), 256).product, PackedWeight(StoredWeight(finite), 256).linear):
        assert torch.equal(multiply(one_each).T, finite.float())


def test_extreme_integers_do_not_saturate(level: None) -> None:
    x = torch.ones(1, 64)
    x[0, 1::2] = -1
    for q, scale in ((torch.full((3, 64), -128), 1.0), (torch.full((3, 64), 127), 1.0)):
        weight = StoredWeight(q.to(torch.int8), torch.full((3, 2), scale))
        for signs in (x, x.abs()):
            wanted = signs.double() @ q.double().T
            torch.testing.assert_close(PackedWeight(weight, 64).linear(signs, rounds=True).double(), wanted)


def test_extreme_values_of_4_bits_do_not_saturate(level: None) -> None:
    """Whole blocks of groups and what is left of them, at 15 x 127 for each value."""
    inputs = 18 * GROUP
    for bits in (0xFF, 0x0F, 0xF0):
        data = torch.full((5, inputs // 2), bits, dtype=torch.uint8)
        weight = StoredWeight(data, torch.ones(5, inputs // GROUP, dtype=torch.float16), shift=0)
        values = torch.stack([data & 15, data >> 4], dim=-1).view(5, inputs).double()
        for x in (torch.ones(1, inputs), -torch.ones(1, inputs)):
            result = PackedWeight(weight, inputs).linear(x, rounds=True)
            torch.testing.assert_close(result.double(), x.double() @ values.T)


def test_a_rounded_row_that_is_not_finite_gives_nan(level: None) -> None:
    weight, _ = stored("int8", 5, 64)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(1, 64)
        x[0, 40] = bad
        assert bool(PackedWeight(weight, 64).linear(x, rounds=True).isnan().all())


@pytest.mark.parametrize("inputs", [1, 15, 31, 100])
def test_floats_need_no_round_number_of_inputs(level: None, inputs: int) -> None:
    for kind in ("float32", "bfloat16", "float16"):
        weight, values = stored(kind, 5, inputs)
        x = torch.randn(3, inputs)
        packed = PackedWeight(weight, inputs)
        for multiply in (packed.linear, packed.product):
            torch.testing.assert_close(multiply(x).double(), x.double() @ values.T, rtol=1e-5, atol=1e-5)
        assert torch.equal(packed.linear(x[:1]), packed.linear(x)[:1])
        y = torch.randn(3, 5)
        torch.testing.assert_close(packed.product_transposed(y).double(), y.double() @ values, rtol=1e-5, atol=1e-5)


def test_rows_by_number_are_the_stored_values(level: None) -> None:
    torch.manual_seed(0)
    for kind in KINDS:
        weight, values = stored(kind, 41, 96)
        ids = torch.tensor([40, 0, 7, 7])
        assert torch.equal(PackedWeight(weight, 96).gather(ids), values[ids].float())
    for bad in (-1, 41):
        with pytest.raises(IndexError):
            PackedWeight(weight, 96).gather(torch.tensor([0, bad]))


def test_nan_and_infinity_stay_where_they_belong(level: None) -> None:
    weight = torch.ones(3, 48)
    weight[1, 5] = torch.inf
    x = torch.zeros(2, 48)
    x[1, 7] = torch.nan
    result = PackedWeight(StoredWeight(weight), 48).linear(x)
    wanted = F.linear(x, weight)
    assert torch.equal(result.isnan(), wanted.isnan())
    assert result[0, 0] == 0.0


def linear() -> Linear:
    module = Linear(64, 20, name="proj")
    module.weight = torch.nn.Parameter(torch.randn(20, 64), requires_grad=False)
    return module


def test_a_replaced_weight_is_packed_again_and_a_copy_packs_its_own() -> None:
    module, x = linear(), torch.randn(1, 64)
    module.scheme.apply(module, x)
    other = copy.deepcopy(module)
    other.weight.mul_(2.0)
    module.weight = torch.nn.Parameter(torch.randn(20, 64), requires_grad=False)
    for each in (module, other):
        torch.testing.assert_close(each.scheme.apply(each, x), F.linear(x, each.weight), rtol=1e-5, atol=1e-5)


def test_rows_of_another_width_are_refused_and_none_are_none() -> None:
    weight, _ = stored("int8", 20, 64)
    packed = PackedWeight(weight, 64)
    with pytest.raises(AssertionError):
        packed.linear(torch.randn(2, 48))
    for rounds in (False, True):
        assert packed.linear(torch.empty(0, 64), rounds=rounds).shape == (0, 20)


def test_training_attention_stands_aside_for_heads_that_are_too_wide() -> None:
    for width, fits in ((512, True), (544, False), (48, False)):
        heads = torch.randn(3, 2, width, requires_grad=True)
        assert causal_attention.takes(heads, heads, heads) == fits


def test_kernels_stand_aside_for_gradients_autocast_and_many_rows() -> None:
    assert cpu.takes_rows(torch.randn(8, 4))
    assert cpu.takes_rows(torch.randn(2, 4, 4))
    assert not cpu.takes_rows(torch.randn(17, 4))
    assert cpu.takes_rows(torch.randn(17, 4), cpu.MAX_ROWS_OF_INTEGERS)
    assert not cpu.takes_rows(torch.empty(0, 4))
    wants_gradient = torch.randn(1, 4, requires_grad=True)
    assert cpu.takes(torch.randn(99, 4))
    assert not cpu.takes(torch.randn(1, 4).double())
    assert not cpu.takes(wants_gradient)
    assert not cpu.takes(torch.randn(1, 4), wants_gradient)
    with torch.no_grad():
        assert cpu.takes(wants_gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu.takes(torch.randn(1, 4))
        assert not cpu.takes_ids(torch.zeros(1, dtype=torch.int64))


def test_threads_share_the_work_of_many_calls_without_losing_a_piece() -> None:
    """The pool's hand-over: thousands of small jobs, after pauses in which its threads fall asleep and without."""
    torch.manual_seed(0)
    cpu.set_num_threads(4)
    weight, values = stored("float32", 512, 256)
    packed, x = PackedWeight(weight, 256), torch.randn(1, 256)
    wanted = packed.linear(x)
    torch.testing.assert_close(wanted.double(), x.double() @ values.T, rtol=1e-4, atol=1e-4)
    for call in range(3000):
        if call % 500 == 0:
            torch.randn(1 << 20).sort()  # long enough for the threads to sleep
        assert torch.equal(packed.linear(x), wanted)
    cpu.set_num_threads(1)
