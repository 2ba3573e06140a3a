"""Products by integers give exactly what the rounded activations and the stored weights give, at every level.

Levels that this CPU lacks are those of a library in which SIMDe computes their intrinsics.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.ops import cpu
from engine.ops.cpu import PackedWeight, StoredWeight, gemm, library
from tests.unit.test_cpu_kernels import stored as stored_in_32s

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

KINDS = [
    *("int8", "int8-offset", "int8-half", "int8-channel", "int8-zero", "int8-group16", "int8-group16-offset"),
    "int8-group96",
    *("int4", "int4-zero", "int4-offset-half", "int4-group128-zero"),
]


def use_level(number: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real library at that level, or the emulated one where the CPU lacks it."""
    found = library._library
    assert found is not None
    if not found.whet_cpu_gemm_has_level(number):
        found = request.getfixturevalue("emulated")
        monkeypatch.setattr(library, "_library", found)
    found.whet_cpu_gemm_force_level(number)
    yield
    found.whet_cpu_gemm_force_level(-1)
    found.whet_cpu_set_num_threads(1)


@pytest.fixture(params=range(1, len(gemm.LEVELS)), ids=gemm.LEVELS[1:])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from use_level(request.param, request, monkeypatch)


def stored(kind: str, outputs: int, inputs: int) -> tuple[StoredWeight, Tensor]:
    """A weight as it is stored, and its values in float64; groups of 32 unless the kind says otherwise."""
    if "group" not in kind:
        return stored_in_32s(kind, outputs, inputs)
    size = next(size for size in (16, 96, 128) if f"group{size}" in kind)
    # A weight in groups of 32 that reads its scales for another size.
    weight, _ = stored_in_32s(kind.replace(f"-group{size}", ""), outputs, inputs * 32 // size)
    q = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    if kind.startswith("int4"):
        q = q >> 4
    wide = q.double().view(outputs, -1, size)
    if weight.zeros is not None:
        wide = wide - weight.zeros.double()[..., None]
    assert weight.scales is not None
    wide = wide * weight.scales.double()[..., None]
    if weight.offsets is not None:
        wide = wide + weight.offsets.double()[..., None]
    halves = (q + 8).to(torch.uint8)
    data = q if kind.startswith("int8") else (halves[:, 0::2] | (halves[:, 1::2] << 4)).contiguous()
    return StoredWeight(data, weight.scales, weight.zeros, weight.offsets), wide.view(outputs, inputs)


def shapes(kind: str) -> list[tuple[int, int]]:
    if "group96" in kind:
        return [(1, 96), (37, 288), (130, 1536)]
    if "group128" in kind:
        return [(1, 128), (37, 384), (130, 1536)]
    if "group16" in kind:
        return [
            (1, 16),
            (37, 80),
            (130, 1552),
        ]  # odd numbers of groups, of which units of 32 do not hold a whole number
    return [(1, 32), (37, 96), (130, 1536)]


def group_of(kind: str) -> int:
    return 16 if "group16" in kind else 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_only_the_activations_are_rounded(level: None, kind: str, num_threads: int) -> None:
    torch.manual_seed(0)
    cpu.set_num_threads(num_threads)
    for outputs, inputs in shapes(kind):
        weight, values = stored(kind, outputs, inputs)
        packed = PackedWeight(weight, inputs)
        for rows in (1, 2, 3, 5, 8, 13):
            x = torch.randn(rows, inputs) * torch.rand(rows, inputs).exp()
            wanted = gemm.rounded(x, group_of(kind)) @ values.T
            scale = (x.double().abs() @ values.abs().T).max()
            assert (packed.linear(x, rounds=True) - wanted).abs().max() / scale < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(level: None, kind: str) -> None:
    torch.manual_seed(0)
    outputs, inputs = shapes(kind)[-1]
    packed = PackedWeight(stored(kind, outputs, inputs)[0], inputs)
    x = torch.randn(21, inputs)
    alone = torch.cat([packed.linear(row[None], rounds=True) for row in x])
    in_fives = torch.cat([packed.linear(x[[row, 0, 0, 0, 0]], rounds=True)[:1] for row in range(len(x))])
    for rows in range(2, 5):
        assert torch.equal(packed.linear(x[:rows], rounds=True), alone[:rows])
    for rows in (*range(5, 10), 21):
        assert torch.equal(packed.linear(x[:rows], rounds=True), in_fives[:rows])
    # A few rows are multiplied in another order: the same integers, whose sums are added up with other roundings.
    assert ((alone - in_fives).abs().amax(1) <= 1e-5 * in_fives.abs().amax(1)).all()


def test_more_rows_than_are_packed_at_a_time() -> None:
    torch.manual_seed(0)
    for kind in ("int8", "int4"):
        packed = PackedWeight(stored(kind, 40, 3072)[0], 3072)
        x = torch.randn(803, 3072)
        parts = torch.cat([packed.linear(part, rounds=True) for part in x.split(7)])
        assert torch.equal(packed.linear(x, rounds=True), parts)


@pytest.mark.parametrize("group", [16, 32])
def test_rounding_is_that_of_the_reference_to_the_bit(level: None, group: int) -> None:
    """Weights of the identity show the rounded activations."""
    torch.manual_seed(0)
    scales = torch.ones(96, 96 // group)
    packed = PackedWeight(StoredWeight(torch.eye(96, dtype=torch.int8), scales), 96)
    x = torch.randn(50, 96) * torch.logspace(-20, 20, 50)[:, None]
    x[7, :40], x[8], x[9], x[10, 3] = 0.0, -0.0, 1e-31, 3e38
    x[11] = torch.arange(96) + 0.5  # with 127.5 as the largest of a group: values halfway between two integers
    x[11, ::16] = 127.0
    assert torch.equal(packed.linear(x, rounds=True), gemm.rounded(x, group).float())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_integers_neither_saturate_nor_wrap(level: None, bits: int) -> None:
    inputs = 1024
    for w in (-128, -127, 127) if bits == 8 else (-8, 7):
        for sign in (-1, 1):
            q = torch.full((3, inputs), w, dtype=torch.int8)
            q[1, ::2] = -q[1, ::2] - (1 if w < 0 else 0)
            halves = (q + 8).to(torch.uint8)
            data = q if bits == 8 else (halves[:, 0::2] | (halves[:, 1::2] << 4)).contiguous()
            x = torch.full((5, inputs), 127.0 * sign)  # scales of 1
            result = PackedWeight(StoredWeight(data, torch.ones(3, inputs // 32)), inputs).linear(x, rounds=True)
            assert torch.equal(result.double(), x.double() @ q.double().T)


def test_rows_that_are_not_finite_are_nan_and_no_others(level: None) -> None:
    torch.manual_seed(0)
    for kind in ("int8-offset", "int4-zero"):
        weight, values = stored(kind, 20, 64)
        x = torch.randn(6, 64)
        x[1, 5], x[2, 40], x[3, 63] = torch.nan, torch.inf, -torch.inf
        x[4] = 0.0
        result = PackedWeight(weight, 64).linear(x, rounds=True)
        assert bool(result[1:4].isnan().all())
        assert torch.equal(result[4], torch.zeros(20))
        wanted = gemm.rounded(x) @ values.T
        torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_products_are_rounded_only_where_that_is_allowed() -> None:
    x = torch.randn(4, 32)
    assert not gemm.takes_rounded(x)
    elsewhere: list[bool] = []
    with gemm.int8_activations(True):
        assert gemm.takes_rounded(x)
        assert gemm.takes_rounded(torch.randn(2, 3, 32))
        assert not gemm.takes_rounded(x.double())
        assert not gemm.takes_rounded(torch.empty(0, 32))
        assert not gemm.takes_rounded(x.clone().requires_grad_())
        with torch.no_grad():
            assert gemm.takes_rounded(x.clone().requires_grad_())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not gemm.takes_rounded(x)
        with gemm.int8_activations(False):
            assert not gemm.takes_rounded(x)
        assert gemm.takes_rounded(x)
        thread = threading.Thread(target=lambda: elsewhere.append(gemm.takes_rounded(x)))
        thread.start()
        thread.join()
    assert elsewhere == [False]
    assert not gemm.takes_rounded(x)


def test_a_generator_computes_within_the_block_and_its_caller_does_not() -> None:
    x = torch.randn(4, 32)

    def inside() -> Iterator[bool]:
        yield gemm.takes_rounded(x)
        yield gemm.takes_rounded(x)

    for allowed in (True, False):
        seen = [(item, gemm.takes_rounded(x)) for item in gemm.with_int8_activations(allowed, inside())]
        assert seen == [(allowed, False)] * 2
