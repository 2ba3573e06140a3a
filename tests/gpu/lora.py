"""Low-rank updates of rows by slot, against the reference in float64 on the CPU."""

from __future__ import annotations

import itertools

import torch

from engine.lora.adapter import Adapter
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
