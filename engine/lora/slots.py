"""Adapters in slots: what a captured step needs to serve whichever adapters its rows have.

A batch names its adapters by slot, one number a row, and a table on the device says where the factors of each slot lie.
So the operations of a step are the same for any adapters that touch the same modules at about the same rank; which
those are is the batch's ``Reach``, one of which a captured step is for.

Shapes: T rows, I in_features, O out_features, r rank, N slots, M modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.context import FrozenProduct
from engine.lora.adapter import Adapter
from engine.ops import cpu
from engine.ops.backends import uses_triton_forward
from engine.ops.transfer import to_device

NUM_SLOTS = 32
"""Adapters of one step at most."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What some adapters touch.

    Attributes:
        modules: names of the linears that any of them updates.
        max_rank: a power of 2, and at least 8, so that few ranks differ in it; no rank is larger.
    """

    modules: frozenset[str]
    max_rank: int


class AdapterSlots:
    """The adapters of the last step, held as long as it is the last.

    Args:
        modules: names of all linears that adapters may target.
        device, dtype: of the factors that it takes.
    """

    def __init__(self, modules: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        self.index = {name: i for i, name in enumerate(modules)}
        self.held: list[Adapter | None] = [None] * NUM_SLOTS
        self._device = device
        self._dtype = dtype
        # Ranks and scalings by module, as they may differ from one to the next.
        self.addresses = torch.zeros(NUM_SLOTS, len(modules), 2, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(NUM_SLOTS, len(modules), dtype=torch.int64, device=device)
        self.scalings = torch.zeros(NUM_SLOTS, len(modules), dtype=torch.float32, device=device)
        self._reach: Reach | None = None

    def assign(self, adapters: Sequence[Adapter | None]) -> tuple[list[int], Reach] | None:
        """Takes in the adapters of a step, one a row, and lets go of others.

        Returns: the slot of each row, -1 without adapter, and what they reach; None if they cannot be in slots: there
            are too many, or one has factors of experts, of another type or elsewhere.
        """
        wanted = {id(adapter): adapter for adapter in adapters if adapter is not None}
        places = {id(adapter): slot for slot, adapter in enumerate(self.held) if adapter is not None}
        if wanted.keys() != places.keys():
            if len(wanted) > NUM_SLOTS or not all(self._takes(adapter) for adapter in wanted.values()):
                return None
            for gone in places.keys() - wanted.keys():
                self.held[places.pop(gone)] = None
            free = [slot for slot, adapter in enumerate(self.held) if adapter is None]
            for slot, (key, adapter) in zip(free, ((k, a) for k, a in wanted.items() if k not in places), strict=False):
                self._write(slot, adapter)
                places[key] = slot
            self._reach = None
        if self._reach is None:
            self._reach = _reach(list(wanted.values()))
        return [-1 if adapter is None else places[id(adapter)] for adapter in adapters], self._reach

    def _takes(self, adapter: Adapter) -> bool:
        return adapter.dropout == 0.0 and all(
            name in self.index
            and factor.dim() == 2
            and factor.dtype == self._dtype
            and factor.device == self._device
            and factor.is_contiguous()
            for name, pair in adapter.modules.items()
            for factor in pair
        )

    def _write(self, slot: int, adapter: Adapter) -> None:
        count = len(self.index)
        addresses, ranks, scalings = [0] * (2 * count), [0] * count, [0.0] * count
        for name, (a, b) in adapter.modules.items():
            i = self.index[name]
            addresses[2 * i : 2 * i + 2] = a.data_ptr(), b.data_ptr()
            ranks[i], scalings[i] = adapter.rank_of(name), adapter.scaling(name)
        self.addresses[slot].copy_(to_device(addresses, self._device).view(count, 2))
        self.ranks[slot].copy_(to_device(ranks, self._device))
        self.scalings[slot].copy_(to_device(scalings, self._device, torch.float32))
        self.held[slot] = adapter


def _reach(adapters: Sequence[Adapter]) -> Reach:
    modules = frozenset(name for adapter in adapters for name in adapter.modules)
    rank = max((adapter.rank_of(name) for adapter in adapters for name in adapter.modules), default=1)
    return Reach(modules, max(8, 1 << (rank - 1).bit_length()))


class SlotLoRA:
    """The adapters of a batch by slot (engine.context.LoRADelta).

    Args:
        rows: [T] int64, the slot of each row; -1: none.
        reach: of all adapters that the rows may have.
    """

    def __init__(self, slots: AdapterSlots, rows: Tensor, reach: Reach) -> None:
        self._slots = slots
        self._rows = rows
        self._reach = reach

    def linear(self, name: str, x: Tensor, layer: FrozenProduct) -> Tensor:
        """The layer's product for x [T, I] plus each row's update: [T, O]."""
        return self.add(name, x, layer.product(x))

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y [T, O] plus each row's update for x [T, I]; y is used up."""
        if name not in self._reach.modules:
            return y
        slots, i = self._slots, self._slots.index[name]
        if uses_triton_forward(x, y):
            from engine.ops.triton import lora_rows

            table = (slots.addresses[:, i], slots.ranks[:, i], slots.scalings[:, i])
            lora_rows.add_rows(y, x, self._rows, *table, self._reach.max_rank)
            return y
        if cpu.takes(x, y) and x.is_contiguous() and y.is_contiguous():
            cpu.lora_rows(y, x, self._rows, slots.addresses[:, i], slots.ranks[:, i], slots.scalings[:, i])
            return y
        factors = {s: (a.modules[name], a.scaling(name)) for s, a in enumerate(slots.held) if a and name in a.modules}
        return add_rows_reference(y, x, self._rows.tolist(), factors)

    def add_grouped(self, name: str, x: Tensor, y: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        """y: adapters with factors of experts have no slot."""
        return y


def add_rows_reference(
    y: Tensor, x: Tensor, rows: Sequence[int], factors: Mapping[int, tuple[tuple[Tensor, Tensor], float]]
) -> Tensor:
    """y [T, O] plus scaling B A x of each row's slot, if that has ((A [r, I], B [O, r]), scaling) in ``factors``."""
    y = y.clone()
    for row, slot in enumerate(rows):
        if slot in factors:
            (a, b), scaling = factors[slot]
            y[row] += b @ (a @ x[row]) * scaling
    return y
