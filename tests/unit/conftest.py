"""Fixtures of unit tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from engine.ops import cpu
from engine.ops.cpu import library
from tests.unit import emulated_kernels


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CPU kernels with every instruction level; see emulated_kernels."""
    if (missing := emulated_kernels.why_not()) is not None:
        pytest.skip(f"this CPU lacks the level, and it cannot be emulated: {missing}")
    return library.declare(emulated_kernels.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(params=range(1, len(cpu.LEVELS)), ids=cpu.LEVELS[1:])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU kernels at every instruction level in turn, emulated where the CPU lacks it."""
    found = library._library
    assert found is not None
    if request.param > cpu.LEVELS.index(cpu.level()):
        found = request.getfixturevalue("emulated")
        for name in ("_library", "_unlocked"):
            monkeypatch.setattr(library, name, found)
    found.whet_cpu_force_level(request.param)
    yield
    found.whet_cpu_force_level(-1)
    found.whet_cpu_set_num_threads(1)
