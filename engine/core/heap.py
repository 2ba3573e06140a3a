"""Freed memory stays with the process: some for the next forward, and that of a run until it ends.

A training step allocates and frees the same hundreds of megabytes again and again: what is kept for the backward,
logits, gradients. glibc gives large blocks back to the system as they are freed, and the system then clears every page
of them anew: with SmolLM2-135M, 4 x 256 tokens, that was 190,000 page faults a step and about a tenth of its time.

A forward does the same with tens of megabytes. There glibc's thresholds grow as blocks are freed, so whether it has no
page faults or thousands depends on what happened before.

The settings are those of mallopt(3), for the whole process. They change nothing where there is no glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt: bytes free at the top of the heap from which they are given back, and bytes of a block from which it is
mapped alone, and unmapped as it is freed."""

LARGEST = 32 << 20
"""The threshold of mapping, always: the largest that glibc sets by itself, once it has seen such a block freed. Beyond
it blocks stay mapped: freed into the heap, one of them may be a few bytes too short for the next of its size."""

USUAL = 2 * LARGEST
"""The threshold of trimming that glibc sets with that. It sets none any more once one was set by hand."""

KEPT = (1 << 31) - 1
"""That of a run: the most that mallopt takes."""

_lock = threading.Lock()
_holders = 0


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    # malloc_trim is glibc's own; musl has neither.
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_for_forwards() -> None:
    """From now on up to USUAL bytes that a forward frees stay for the next one; what loading has freed is given back
    first."""
    library = _glibc()
    if library is None:
        return
    with _lock:
        if _holders == 0:  # else a run keeps more, and ends with these settings
            library.malloc_trim(ctypes.c_size_t(0))
            library.mallopt(M_MMAP_THRESHOLD, LARGEST)
            library.mallopt(M_TRIM_THRESHOLD, USUAL)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, or within several at a time, freed memory stays; after the last one it is given back."""
    global _holders
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _holders += 1
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                library.mallopt(M_TRIM_THRESHOLD, USUAL)
                library.malloc_trim(ctypes.c_size_t(0))
