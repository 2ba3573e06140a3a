"""Memory that a run or a forward frees is taken again without page faults; a run's is given back after it."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.core import heap
from engine.core.heap import freed_memory_kept, keep_for_forwards

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or heap._glibc() is None, reason="the settings are glibc's"
)

ROOT = Path(__file__).parents[2]
BYTES, BLOCKS = 24 << 20, 6
PAGES = BYTES * BLOCKS // resource.getpagesize()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def faults(count: int = BLOCKS) -> int:
    """Page faults while so many blocks of BYTES are made, written and freed."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [library.malloc(BYTES) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, BYTES)
    for block in blocks:
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def check() -> None:
    """In a process that has done nothing else: what was freed is taken again without faults; afterwards the process is
    as small as before. Blocks within each other count as one."""
    with freed_memory_kept():
        with freed_memory_kept():
            faults()
        held = resident_bytes()
        assert faults() < PAGES // 10
        assert resident_bytes() >= held - BYTES
    assert resident_bytes() < held - BYTES * BLOCKS // 2
    faults()
    assert faults() > PAGES // 2


def check_forwards() -> None:
    """Likewise: two blocks are taken again without faults, from the first time on, and six are given back."""
    keep_for_forwards()
    faults(2)
    assert faults(2) < PAGES // 100
    before = resident_bytes()
    faults()
    assert resident_bytes() < before + BYTES


@pytest.mark.parametrize("check", ["check", "check_forwards"])
def test_freed_memory_is_taken_again_and_given_back_at_the_end(check: str) -> None:
    """Elsewhere, as where this process's heap ends is up to the tests before."""
    code = f"from tests.unit.test_heap import {check}; {check}()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
