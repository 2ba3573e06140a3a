"""How many threads torch's own operations take on the CPU.

They divide their work among OpenMP's threads, which wait for each other at its end. That pays for work of a
millisecond; work of some microseconds costs as much to hand out, and where another process is busy on a core each
operation waits until the scheduler gives all threads their turn: with one such process a core, two threads took 8 s
for a LoRA step of 4 x 12 tokens of SmolLM2-135M and one took 1.2. MKL's do so even for a few numbers (``sqrt``). The
engine's own kernels have threads of their own, of which none waits for one that has not begun
(engine/ops/cpu/pool.cpp).
"""

from __future__ import annotations

from types import TracebackType

import torch

SMALL = 1 << 18
"""Elements up to which an operation is small: 1 MiB of float32, some 50 microseconds of one thread."""


class threads_for:
    """Within the block, torch's operations take one thread if they are small; nests. For one thread of a process, whose
    others run no operations of torch: those that begin within the block would keep its number.

    Args:
        num_elements: of what they work on, one operation at a time.
    """

    __slots__ = ("_before", "_is_small")

    def __init__(self, num_elements: int) -> None:
        self._is_small = num_elements <= SMALL

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._is_small and self._before > 1:
            torch.set_num_threads(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)
