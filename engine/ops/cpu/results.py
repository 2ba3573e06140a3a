"""Memory for large results of the kernels while a training run lasts, apart from the allocator's.

A layer's forward leaves blocks of a few sizes behind for the backward, and between them frees others. glibc loses much
of what lies between: to align a block it takes 96 bytes more and gives the rest back, in pieces that small allocations
then take, so that a freed block is too short for the next of its own size. With SmolLM2-135M, 4 x 256 tokens, that was
280 MB beside 810 MB that were in use. Here a result takes the smallest hole that holds it, and nothing small is among
them. The system clears each page once a run, as with ``engine.core.heap``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from bisect import bisect
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_BYTES = 256 << 10
"""Of a result that is large."""

REGION_BYTES = 64 << 20
"""That are mapped at a time; what no result has touched takes no memory."""

LINE_BYTES = 64
"""Of the processor's cache, which results begin with."""

_Block = tuple[int, int, int]
"""Number of a region, first byte in it, bytes."""


class ResultMemory:
    """Regions of which tensors are lent blocks; the block of a tensor is free when nothing shows it any more."""

    def __init__(self) -> None:
        self._regions: list[mmap.mmap] = []
        self._holes: list[_Block] = []  # in order, no two of them adjacent
        self._returned: deque[_Block] = deque()
        self._lent: dict[int, weakref.ref[NDArray[np.float32]]] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """That are mapped."""
        return sum(len(region) for region in self._regions)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """float32 of that shape, of which nothing is known.

        Raises:
            MemoryError: the system has none left to map.
        """
        size = -(-4 * math.prod(shape) // LINE_BYTES) * LINE_BYTES
        with self._lock:
            self._collect()
            region, start = self._reserve(size)
            array: NDArray[np.float32] = np.ndarray(shape, np.float32, self._regions[region], start)
            self._lend(array, (region, start, size))
        return torch.from_numpy(array)

    def _lend(self, array: NDArray[np.float32], block: _Block) -> None:
        key = id(array)

        # Runs wherever the last reference is dropped, maybe within ``take``; so it does no more than this.
        def give_back(_: weakref.ref[NDArray[np.float32]]) -> None:
            del self._lent[key]
            self._returned.append(block)

        self._lent[key] = weakref.ref(array, give_back)

    def _reserve(self, size: int) -> tuple[int, int]:
        """Region and first byte of so many."""
        index = min(
            (index for index, hole in enumerate(self._holes) if hole[2] >= size),
            key=lambda index: self._holes[index][2],
            default=None,
        )
        if index is None:
            index = len(self._holes)
            self._holes.append((len(self._regions), 0, self._map(size)))
        region, start, room = self._holes[index]
        if room == size:
            del self._holes[index]
        else:
            self._holes[index] = (region, start + size, room - size)
        return region, start

    def _map(self, size: int) -> int:
        """Another region, of so many bytes at least: how many it has."""
        size = max(size, REGION_BYTES)
        try:
            self._regions.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        except OSError as error:
            raise MemoryError(f"there are no {size} bytes to map for results of the CPU kernels: {error}") from error
        return size

    def _collect(self) -> None:
        """Makes holes of what was given back."""
        while self._returned:
            region, start, size = self._returned.popleft()
            index = bisect(self._holes, (region, start, size))
            if index < len(self._holes) and self._holes[index][:2] == (region, start + size):
                size += self._holes.pop(index)[2]
            if index:
                before = self._holes[index - 1]
                if before[0] == region and before[1] + before[2] == start:
                    index -= 1
                    start, size = before[1], before[2] + size
                    del self._holes[index]
            self._holes.insert(index, (region, start, size))

    def release(self) -> None:
        """Gives the system what no tensor shows. What one still shows goes when it does."""
        with self._lock:
            self._collect()
            for region, start, size in self._holes:
                first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
                pages = (start + size - first) // mmap.PAGESIZE
                if pages > 0:
                    self._regions[region].madvise(mmap.MADV_DONTNEED, first, pages * mmap.PAGESIZE)


_lock = threading.Lock()
_holders = 0
_memory: ResultMemory | None = None


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Within the block, or within several at a time, large results of the kernels lie apart, those of all threads;
    after the last one what they took is given back."""
    global _holders, _memory
    with _lock:
        _holders += 1
        if _memory is None:
            _memory = ResultMemory()
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                memory, _memory = _memory, None
                memory.release()


def empty(shape: tuple[int, ...]) -> Tensor:
    """float32 on the CPU, of which nothing is known: apart from the allocator's memory where it is large, and within
    ``results_apart``."""
    memory = _memory
    if memory is None or 4 * math.prod(shape) < LEAST_BYTES:
        return torch.empty(shape)
    return memory.take(shape)
