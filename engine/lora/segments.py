"""Where the factors of a batch's adapters lie, for kernels that multiply all its runs of rows at once.

Shapes: T rows, I in_features, O out_features, r rank, S runs, M modules, N tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.ops.backends import uses_triton_forward
from engine.ops.transfer import to_device

if TYPE_CHECKING:
    from engine.lora.adapter import Adapter


class SegmentTable:
    """Tables on the device, made once for a batch and read by every module.

    Args:
        segments: (adapter, first row, one past the last row).
        device, dtype: of the rows and factors.
    """

    def __init__(self, segments: Sequence[tuple[Adapter, int, int]], device: torch.device, dtype: torch.dtype) -> None:
        from engine.ops.triton.lora_segments import MAX_RANK, TILE_ROWS

        pairs = [{n: p for n, p in adapter.modules.items() if p[0].dim() == 2} for adapter, _, _ in segments]
        names = sorted({name for modules in pairs for name in modules})
        self._index = {name: i for i, name in enumerate(names)}
        self._rows = (device, dtype)
        self._max_rank = max((p[0].shape[0] for modules in pairs for p in modules.values()), default=1)
        self._is_taken = self._max_rank <= MAX_RANK and all(
            factor.dtype == dtype and factor.device == device and factor.is_contiguous()
            for modules in pairs
            for pair in modules.values()
            for factor in pair
        )
        if not self._is_taken or not names:
            return
        addresses: list[float] = []
        ranks: list[float] = []
        scalings: list[float] = []
        for (adapter, _, _), modules in zip(segments, pairs, strict=True):
            for name in names:
                a, b = modules.get(name, (None, None))
                addresses += (0, 0) if a is None or b is None else (a.data_ptr(), b.data_ptr())
                ranks.append(0 if a is None else a.shape[0])
                scalings.append(0.0 if a is None else adapter.scaling(name))
        shape = (len(segments), len(names))
        self._addresses = to_device(addresses, device).view(*shape, 2)
        self._ranks = to_device(ranks, device).view(shape)
        self._scalings = to_device(scalings, device, torch.float32).view(shape)
        tiles = [
            number
            for run, (_, begin, end) in enumerate(segments)
            for start in range(begin, end, TILE_ROWS)
            for number in (run, start, end)
        ]
        self._tiles = to_device(tiles, device).view(-1, 3)

    def add(self, name: str, x: Tensor, y: Tensor) -> bool:
        """Adds the updates for x [T, I] to y [T, O] in place. Returns whether it could."""
        if not self._is_taken or (x.device, x.dtype) != self._rows or y.dtype != x.dtype:
            return False
        if x.dim() != 2 or x.stride(1) != 1 or y.stride(1) != 1:
            return False
        if name in self._index:
            from engine.ops.triton import lora_segments

            i = self._index[name]
            table = (self._addresses[:, i], self._ranks[:, i], self._scalings[:, i])
            lora_segments.add_segments(y, x, self._tiles, *table, self._max_rank)
        return True


def takes_rows(x: Tensor, y: Tensor) -> bool:
    """Whether kernels may multiply these rows: none computes gradients."""
    return not torch.is_grad_enabled() and uses_triton_forward(x, y)
