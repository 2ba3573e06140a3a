"""Low-rank updates of rows by slot, against the reference in float64 on the CPU."""

from __future__ import annotations

import itertools

import torch

from engine.lora.adapter import Adapter, LoRABatch
from engine.lora.slots import AdapterSlots, SlotLoRA, add_rows_reference
from tests.gpu.checks import Worst, check
from tests.gpu.elementwise import needs_triton
from tests.gpu.kernels import ROUNDING, TYPES, Numbers, wide


@check
def rows_of_adapters(device: torch.device) -> float:
    """Rows of several adapters and of none, ranks that differ, an adapter that does not touch the module, strided x;
    rows without an update stay as they were."""
    needs_triton(device)
    worst = Worst()
    # (inputs, outputs, ranks, slots' owners by row)
    cases = [(24, 40, (3, 8), (0, -1, 1, 1, 0)), (1300, 17, (1,), (0, 0)), (600, 300, (20, 5, 2), (2, -1, 0, 1, 3))]
    if device.type == "cuda":
        cases += [(3584, 1024, (16, 64), tuple(row % 3 - 1 for row in range(128))), (1024, 6144, (8,), (0,))]
    for (inputs, outputs, ranks, rows), dtype in itertools.product(cases, TYPES):
        draw = Numbers(device, inputs)
        adapters = [
            Adapter(
                name=str(i),
                version=1,
                rank=rank,
                alpha=3.0,
                modules={
                    "m": (
                        draw.normal(rank, inputs, dtype=dtype, scale=inputs**-0.5),
                        draw.normal(outputs, rank, dtype=dtype),
                    )
                },
            )
            for i, rank in enumerate(ranks)
        ]
        other = Adapter(name="o", version=1, rank=4, alpha=1.0, modules={"other": adapters[0].modules["m"]})
        given = [*adapters, other]
        slots = AdapterSlots(["first", "m", "other"], device, dtype)
        assigned = slots.assign([None if row < 0 else given[row] for row in rows])
        assert assigned is not None
        of_rows, reach = assigned
        x = draw.normal(len(rows), 2 * inputs, dtype=dtype)[:, :inputs]
        y = draw.normal(len(rows), outputs, dtype=dtype)
        x_, y_ = wide(x, y)
        factors = {
            slot: ((wide(*a.modules["m"])[0], wide(*a.modules["m"])[1]), a.scaling("m"))
            for slot, a in enumerate(slots.held)
            if a is not None and "m" in a.modules
        }
        expected = add_rows_reference(y_, x_, of_rows, factors)
        with torch.inference_mode():
            got = SlotLoRA(slots, torch.tensor(of_rows, device=device), reach).add("m", x, y)
        what = f"{inputs} to {outputs}, ranks {ranks}, {dtype}"
        worst.compare(got, expected, ROUNDING[dtype], what)
        without = [i for i, row in enumerate(rows) if row < 0 or row == len(ranks)]
        assert torch.equal(got[without].cpu().double(), y_[without]), f"rows without the module changed, {what}"
    return worst.figure


@check
def segments_of_adapters(device: torch.device) -> float:
    """Runs of rows with and without an adapter, of one row and of several tiles, ranks that differ, an adapter that
    does not touch the module; y is a part of wider rows, of which nothing else changes."""
    needs_triton(device)
    worst = Worst()
    # (inputs, outputs, ranks, lengths of the runs, adapter of each)
    cases = [
        (24, 40, (3, 8), (5, 1, 70, 2, 33), (0, -1, 1, 0, 1)),
        (1300, 17, (1,), (2, 3, 40), (-1, 0, 1)),
        (60, 130, (20, 70), (64, 1, 1), (0, 1, -1)),
    ]
    if device.type == "cuda":
        cases += [
            (3584, 1024, (16, 64), (700, 1, 1300, 5), (0, -1, 1, 0)),
            (1024, 6144, (8, 256, 4), (1, 2000, 47), (2, 1, 0)),
        ]
    for (inputs, outputs, ranks, lengths, owners), dtype in itertools.product(cases, TYPES):
        draw = Numbers(device, inputs)
        adapters = []
        for i, rank in enumerate((*ranks, 4)):
            a = draw.normal(rank, inputs, dtype=dtype, scale=inputs**-0.5)
            b = draw.normal(outputs, rank, dtype=dtype)
            # The last is of another module.
            modules = {"other" if i == len(ranks) else "m": (a, b)}
            adapters.append(Adapter(name=str(i), version=1, rank=rank, alpha=3.0, modules=modules))
        starts = [0, *itertools.accumulate(lengths)]
        runs = [(adapters[o], starts[i], starts[i + 1]) for i, o in enumerate(owners) if o >= 0]
        batch = LoRABatch(runs, starts[-1])
        x = draw.normal(starts[-1], 2 * inputs, dtype=dtype)[:, :inputs]
        around = draw.normal(starts[-1], outputs + 6, dtype=dtype)
        before = around.clone()
        x_, expected = wide(x, before)
        for adapter, begin, end in runs:
            if "m" in adapter.modules:
                a_, b_ = wide(*adapter.modules["m"])
                expected[begin:end, 3:-3] += x_[begin:end] @ a_.T @ b_.T * adapter.scaling("m")
        with torch.inference_mode():
            got = batch.add("m", x, around[:, 3:-3])
        what = f"{inputs} to {outputs}, ranks {ranks}, runs {lengths}, {dtype}"
        assert batch._table is not None, f"{what}: one by one"
        # The narrow product is rounded before the second.
        worst.compare(got, expected[:, 3:-3], ROUNDING[dtype], what)
        worst.compare(around, expected, ROUNDING[dtype], what)
        still = torch.ones(starts[-1], dtype=torch.bool)
        for adapter, begin, end in runs:
            still[begin:end] = "m" not in adapter.modules
        assert torch.equal(around.cpu()[still], before.cpu()[still]), f"rows without the module changed, {what}"
        assert torch.equal(around[:, :3], before[:, :3]), f"beside y, {what}"
    return worst.figure
