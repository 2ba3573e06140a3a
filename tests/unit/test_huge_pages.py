"""Weights come to lie on huge pages, and nothing else is touched."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.core.huge_pages import HUGE_PAGE_BYTES, prefer_huge_pages, spans


def test_spans_are_whole_pages_within_the_tensors() -> None:
    model = nn.Sequential(nn.Linear(3000, 3000), nn.Linear(3000, 300))
    storages = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in model.parameters()]
    found = list(spans(model))
    assert found
    for begin, end in found:
        assert begin % HUGE_PAGE_BYTES == end % HUGE_PAGE_BYTES == 0
        inside = sum(max(0, min(end, e) - max(begin, b)) for b, e in storages)
        assert inside > 0.9 * (end - begin), "the allocator's own bytes at most"
    assert prefer_huge_pages(nn.Linear(8, 8)) is None, "too small to matter"


def huge_bytes() -> int:
    """Of this process."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone is asked")
def test_weights_are_moved_and_stay_as_they_are() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system gives no huge pages")
    model = nn.Sequential(nn.Linear(3000, 3000), nn.Linear(3000, 300))
    before, kept = huge_bytes(), [p.detach().clone() for p in model.parameters()]
    thread = prefer_huge_pages(model)
    assert thread is not None
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
    if huge_bytes() <= before:
        pytest.skip("the system has no whole page of this size free, or moves pages in its own time")
