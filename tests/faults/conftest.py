"""Fixtures of the fault tests: a tiny random Llama, and a pool of one worker that serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.workers.pool import WorkerPool
from tests.faults.workers import CONTEXT, MODEL, running_pool
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with a context long enough to be killed in the middle of."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=CONTEXT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pool(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerPool]:
    """One worker for those tests of a module that leave it as they found it. They run on the module's loop, and one
    after the other: while that loop stands, the pool hears nothing of its worker."""
    async with running_pool({MODEL: tiny_llama}, tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerPool]:
    """Two workers, likewise."""
    async with running_pool({MODEL: tiny_llama}, tmp_path_factory.mktemp("pair"), workers=2) as running:
        yield running


@pytest.fixture
async def pool(tiny_llama: Path, tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """One worker, with the tiny model loaded."""
    async with running_pool({MODEL: tiny_llama}, tmp_path) as running:
        yield running
