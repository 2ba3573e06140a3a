"""What this machine can do, measured now: how fast it reads memory and multiplies matrices, by torch's own operations.

A floor is the time that some work takes if it does nothing but read its bytes, or nothing but multiply, at these
rates. A shared machine is half as fast in some minutes as in others, so limits are measured in each round of a measure,
in turn with what is measured, and the median of the rounds counts, as it does there. In a round a limit is the best of
a few repetitions.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

from engine.core.huge_pages import prefer_huge_pages


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates at the number of threads that the run has.

    Attributes:
        int8_operations_per_second: the better of ``torch._int_mm`` and oneDNN's int8 linear. Without VNNI the former is
            a plain loop.
    """

    read_bytes_per_second: float
    float32_flops_per_second: float
    int8_operations_per_second: float

    @staticmethod
    def median(rounds: Sequence[Limits]) -> Limits:
        """The median of each rate."""
        return Limits(*map(statistics.median, zip(*map(astuple, rounds), strict=True)))

    def rounded(self) -> dict[str, float]:
        """For a line of JSON: in GB/s, GFLOP/s and GOP/s."""
        names = ("read_gb_per_second", "float32_gflop_per_second", "int8_gop_per_second")
        return {name: round(value / 1e9, 1) for name, value in zip(names, asdict(self).values(), strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a piece of work cannot do without.

    Attributes:
        read_bytes: from memory, each time anew.
        flops: of matrix products; a multiplication and an addition are two.
    """

    read_bytes: float = 0.0
    flops: float = 0.0

    def seconds(self, limits: Limits, *, int8: bool = False) -> float:
        """The shortest time: reading and multiplying overlap."""
        rate = limits.int8_operations_per_second if int8 else limits.float32_flops_per_second
        return max(self.read_bytes / limits.read_bytes_per_second, self.flops / rate)


def measure_limits(*, quick: bool = False) -> Limits:
    """Measures with the threads that torch has; a second or two.

    Args:
        quick: on small tensors, which shows that it works and no more.
    """
    values, square = _operands(quick)
    repeats = 2 if quick else 3
    rows = values.view(-1, 4096)
    ones = torch.ones(4096)
    return Limits(
        read_bytes_per_second=values.nbytes
        / min(_seconds(read, repeats) for read in (values.sum, lambda: rows @ ones)),
        float32_flops_per_second=2 * len(square) ** 3 / _seconds(lambda: square @ square, repeats),
        int8_operations_per_second=max(_int_mm_rate(len(square), repeats), _onednn_rate(len(square), repeats)),
    )


@functools.cache
def _operands(quick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read, 256 MiB, and a square matrix. They are kept: making them takes as long as measuring with them."""
    size, count = (256, 1 << 20) if quick else (2048, 1 << 26)
    return _on_huge_pages(torch.ones(count)), torch.randn(size, size)


def _on_huge_pages(values: torch.Tensor) -> torch.Tensor:
    """The tensor, where the engine's weights lie: from pages of 4 KiB memory is read more slowly."""
    holder = torch.nn.Module()
    holder.register_buffer("values", values)
    if (asked := prefer_huge_pages(holder)) is not None:
        asked.join()
    return values


def _int_mm_rate(size: int, repeats: int) -> float:
    """Operations per second of torch._int_mm; of a small matrix where that shows already that it is a plain loop, of
    some 2e9, which would take half a minute for a large one."""
    small = _square(256)
    rate = 2 * 256**3 / _seconds(lambda: torch._int_mm(small, small), 2)
    if size == 256 or rate < 2e10:
        return rate
    matrix = _square(size)
    return 2 * size**3 / _seconds(lambda: torch._int_mm(matrix, matrix), repeats)


def _onednn_rate(size: int, repeats: int) -> float:
    """Operations per second of oneDNN's linear layer over uint8 rows and int8 weights; 0 where torch lacks it."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return 0.0
    rows = torch.randint(0, 255, (size, size), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(_square(size), [size, size])
    scales, zeros = torch.full((size,), 0.01), torch.zeros(size, dtype=torch.int64)

    def multiply() -> None:
        torch.ops.onednn.qlinear_pointwise(
            rows, 0.01, 128, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return 2 * size**3 / _seconds(multiply, repeats)


def _square(size: int) -> torch.Tensor:
    return torch.randint(-127, 127, (size, size), dtype=torch.int8)


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some repetitions, after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def machine_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
