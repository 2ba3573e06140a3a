"""A model that a restarted worker cannot load again: its requests are told so, and loading it again may help."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from engine.errors import EngineError, UnavailableError
from server.workers.deployment import Deployment
from tests.faults.workers import MODEL, generate, request, running_pool, signal_worker, until

FRAGILE = "fragile"


async def test_requests_for_a_model_that_did_not_come_back_fail_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    """They name it and why; others are served; once its files are back, load_model brings it back."""
    files = tmp_path / "files"
    shutil.copytree(tiny_llama, files)
    async with running_pool({MODEL: tiny_llama, FRAGILE: files}, tmp_path) as pool:
        alone = await generate(pool, request(20))
        assert await generate(pool, request(20, model=FRAGILE)) == alone
        files.rename(tmp_path / "away")
        signal_worker(pool, signal.SIGKILL)
        # One that waits for the restart is told as well as one that comes later.
        await until(lambda: not pool.serves(FRAGILE))
        for _ in range(2):
            with pytest.raises(UnavailableError, match=FRAGILE) as lost:
                await asyncio.wait_for(generate(pool, request(8, model=FRAGILE)), 30)
            assert lost.value.reason == "MODEL_LOAD_FAILED"
            assert "files" in lost.value.message
        assert await generate(pool, request(20)) == alone
        assert not pool.serves(FRAGILE)

        with pytest.raises(EngineError, match="files"):
            await pool.load_model(FRAGILE, files)
        with pytest.raises(UnavailableError, match=FRAGILE):
            await generate(pool, request(8, model=FRAGILE))
        (tmp_path / "away").rename(files)
        info = await pool.load_model(FRAGILE, files)
        assert info.name == FRAGILE
        assert pool.serves(FRAGILE)
        assert await generate(pool, request(20, model=FRAGILE)) == alone


async def test_a_model_that_one_worker_lost_is_served_by_the_other(tiny_llama: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    shutil.copytree(tiny_llama, files)
    async with running_pool({FRAGILE: files}, tmp_path, workers=2) as pool:
        files.rename(tmp_path / "away")
        signal_worker(pool, signal.SIGKILL, worker=0)
        await until(lambda: pool.snapshot()[0].restarts == 1 and pool.snapshot()[0].state == "up")
        assert pool.snapshot()[0].models == []
        assert len(await generate(pool, request(8, model=FRAGILE))) == 8
        assert (await pool.load_model(FRAGILE, files)).name == FRAGILE


async def test_a_model_that_could_not_be_unloaded_is_what_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    """A refusal by the worker leaves the model configured, so that a later restart brings it back."""
    async with running_pool({MODEL: tiny_llama}, tmp_path) as pool:
        deployment: Deployment = pool._deployment
        stream = pool.generate(request(4000))
        await anext(stream)
        # The front end's own check is passed over, as where the worker knows of work that the front end does not.
        hidden = dict(pool._router.replicas[0].streams)
        pool._router.replicas[0].streams.clear()
        with pytest.raises(EngineError, match="running requests"):
            await deployment.unload_model(MODEL)
        pool._router.replicas[0].streams.update(hidden)
        assert pool._router.configured == {MODEL}
        assert pool.serves(MODEL)
        await stream.aclose()
