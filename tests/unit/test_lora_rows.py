"""Updates of rows that each have an adapter of their own, by the CPU kernel: those of the plain operations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engine.lora.adapter import Adapter
from engine.lora.slots import AdapterSlots, SlotLoRA, add_rows_reference
from engine.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels were not built or this CPU lacks AVX2")

RANKS = (1, 8, 19)


def adapters(inputs: int, outputs: int) -> list[Adapter]:
    """One of each rank for module "m", and one that does not touch it."""
    generator = torch.Generator().manual_seed(inputs)
    pairs = [(torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)) for r in RANKS]
    made = [
        Adapter(name=str(r), version=1, rank=r, alpha=3.0, modules={"m": pair, "first": pair})
        for r, pair in zip(RANKS, pairs, strict=True)
    ]
    return [*made, Adapter(name="other", version=1, rank=1, alpha=1.0, modules={"first": pairs[0]})]


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (64, 24), (577, 193)])
def test_the_updates_of_the_plain_operations(level: None, inputs: int, outputs: int) -> None:
    given = adapters(inputs, outputs)
    for rows in (
        [1],
        [-1, -1],
        [0, 1, 2, -1, 3, 1],
        [2] * 9 + [0] * 3 + [-1] + [2],
        [0, -1, 0],
        [0, 3, 0],
        [1, 1, -1, 1],
    ):
        slots = AdapterSlots(["first", "m"], torch.device("cpu"), torch.float32)
        assigned = slots.assign([None if row < 0 else given[row] for row in rows])
        assert assigned is not None
        of_rows, reach = assigned
        x, y = torch.randn(len(rows), inputs), torch.randn(len(rows), outputs)
        factors = {
            slot: ((a.modules["m"][0].double(), a.modules["m"][1].double()), a.scaling("m"))
            for slot, a in enumerate(slots.held)
            if a is not None and "m" in a.modules
        }
        wanted = add_rows_reference(y.double(), x.double(), of_rows, factors)
        before = y.clone()
        place = torch.tensor(of_rows)
        if "m" in reach.modules:
            cpu.lora_rows(y, x, place, slots.addresses[:, 1], slots.ranks[:, 1], slots.scalings[:, 1])
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
        without = [row for row, adapter in enumerate(rows) if adapter in (-1, 3)]
        assert torch.equal(y[without], before[without])
        if reach.modules:
            assert torch.equal(SlotLoRA(slots, place, reach).add("m", x, before.clone()), y)
        # A row's sums are those that it has alone.
        for row in range(len(rows)):
            alone = SlotLoRA(slots, place[row : row + 1], reach).add(
                "m", x[row : row + 1], before[row : row + 1].clone()
            )
            assert torch.equal(alone[0], y[row])


def test_rows_are_shared_by_threads() -> None:
    given = adapters(300, 200)
    rows = [0, 1, 1, 1, 1, 1, 2, 0, 2, 2]
    slots = AdapterSlots(["first", "m"], torch.device("cpu"), torch.float32)
    assigned = slots.assign([given[row] for row in rows])
    assert assigned is not None
    x, y = torch.randn(len(rows), 300), torch.randn(len(rows), 200)
    found = []
    try:
        for threads in (1, 2, 3):
            cpu.set_num_threads(threads)
            found.append(SlotLoRA(slots, torch.tensor(assigned[0]), assigned[1]).add("m", x, y.clone()))
    finally:
        cpu.set_num_threads(1)
    assert all(torch.equal(*pair) for pair in pairwise(found))


def test_other_strides_and_types_take_the_plain_operations() -> None:
    given = adapters(40, 24)
    slots = AdapterSlots(["first", "m"], torch.device("cpu"), torch.float32)
    assigned = slots.assign([given[1], None])
    assert assigned is not None
    lora = SlotLoRA(slots, torch.tensor(assigned[0]), assigned[1])
    wide, y = torch.randn(2, 80), torch.randn(2, 24)
    wanted = lora.add("m", wide[:, :40].contiguous(), y.clone())
    torch.testing.assert_close(lora.add("m", wide[:, :40], y.clone()), wanted)
