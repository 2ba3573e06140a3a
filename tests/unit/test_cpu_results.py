"""Large results of the CPU kernels during a run: no two share memory, what is freed is taken again, and after the run
the system has it back."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from engine.ops.cpu import results
from engine.ops.cpu.results import LEAST_BYTES, REGION_BYTES, ResultMemory, results_apart

MIB = 1 << 20


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def of_bytes(size: int) -> tuple[int, ...]:
    return (size // 64, 16)


@pytest.fixture
def memory() -> Iterator[ResultMemory]:
    with results_apart():
        assert results._memory is not None
        yield results._memory


def test_no_two_results_share_memory(memory: ResultMemory) -> None:
    """A thousand results of changing sizes, most dropped again in a random order, some of them by a view that lives
    longer: each keeps the number that was written into it, to its last element."""
    choose = random.Random(0)
    alive: list[tuple[int, Tensor]] = []
    for number in range(1000):
        result = memory.take((choose.randrange(1, 200), choose.randrange(1, 200)))
        assert result.data_ptr() % 64 == 0
        assert not result._is_view()  # else in-place functions of autograd would refuse it
        alive.append((number, result.fill_(number)[choose.randrange(len(result)) :]))
        while len(alive) > choose.randrange(1, 60):
            kept, held = alive.pop(choose.randrange(len(alive)))
            assert bool((held == kept).all())
    assert all(bool((held == number).all()) for number, held in alive)
    assert memory.num_bytes == REGION_BYTES


def test_layers_need_no_more_than_they_keep(memory: ResultMemory) -> None:
    """Of each layer some results stay until the backward and others go, in sizes of which none divides another: all
    lie in what is kept and a tenth, forward and backward again and again."""
    sizes = [7 * MIB, 3 * MIB, 3 * MIB, 5 * MIB + 64, 5 * MIB + 64]
    kept = 10 * (sizes[1] + sizes[3] + sizes[4])
    for _ in range(3):
        layers = []
        for _ in range(10):
            results_of = [memory.take(of_bytes(size)) for size in sizes]
            layers.append([results_of[1], results_of[3], results_of[4]])
            del results_of
        while layers:
            gradients = [memory.take(of_bytes(size)) for size in sizes[:2]]
            layers.pop()
            del gradients
    assert memory.num_bytes <= 1.1 * kept + REGION_BYTES


def test_neighbours_become_one_hole(memory: ResultMemory) -> None:
    """Three results freed in any order leave room for one as large as all."""
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        taken: list[Tensor | None] = [memory.take(of_bytes(REGION_BYTES // 4)) for _ in range(3)]
        rest = memory.take(of_bytes(REGION_BYTES // 4))
        for index in order:
            taken[index] = None
        memory.take(of_bytes(REGION_BYTES // 4 * 3))
        del rest
    assert memory.num_bytes == REGION_BYTES
    assert memory.take(of_bytes(REGION_BYTES + 64)).numel() * 4 == REGION_BYTES + 64  # larger than any region
    assert memory.num_bytes == 2 * REGION_BYTES + 64


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_system_has_it_back() -> None:
    """After the last of blocks within each other; a result that lives longer keeps its value, and its pages alone."""
    with results_apart():
        before = resident_bytes()
        with results_apart():
            other = results.empty(of_bytes(40 * MIB)).zero_()
            longer = results.empty(of_bytes(LEAST_BYTES)).fill_(7.0)
            del other
        assert resident_bytes() > before + 35 * MIB
    assert resident_bytes() < before + 5 * MIB
    assert bool((longer == 7.0).all())
    assert results._memory is None
    ordinary = results.empty(of_bytes(LEAST_BYTES))
    assert ordinary.untyped_storage().resizable()  # torch's own


def test_threads_take_at_the_same_time(memory: ResultMemory) -> None:
    """Four threads, each of which finds in its results what it wrote."""
    wrong: list[int] = []

    def work(number: int) -> None:
        held = []
        for _ in range(300):
            held.append(memory.take((64, 64)).fill_(number))
            if len(held) > 5 and not bool((held.pop(0) == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_small_results_are_torchs(memory: ResultMemory) -> None:
    """They would lie among the large ones."""
    assert results.empty((16,)).untyped_storage().resizable()
    assert not results.empty(of_bytes(LEAST_BYTES)).untyped_storage().resizable()
    assert memory.num_bytes == REGION_BYTES


def test_what_cannot_be_mapped_is_an_error(memory: ResultMemory) -> None:
    """MemoryError, which is reported as OUT_OF_MEMORY; what was taken before is not hurt."""
    held = memory.take((64,)).fill_(1.0)
    with pytest.raises(MemoryError, match=str(1 << 60)):
        memory.take(of_bytes(1 << 60))
    assert bool((held == 1.0).all())
    assert bool((memory.take((64,)).fill_(2.0) == 2.0).all())
