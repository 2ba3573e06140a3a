"""No worker outlives its server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.workers import alive, until

PARENT = """
import asyncio, sys
from pathlib import Path
from engine.config import EngineConfig
from server.workers.pool import WorkerPool
from tests.faults.workers import MODEL, generate, pid_of, request

async def main() -> None:
    config = EngineConfig(device="cpu", num_threads=1, kv_cache_bytes=1 << 24, state_dir=sys.argv[2])
    pool = WorkerPool(config, devices=["cpu"], models={MODEL: Path(sys.argv[1])})
    await pool.start()
    await pool.wait_loaded()
    if sys.argv[3] == "busy":
        tokens = []
        stream = asyncio.create_task(generate(pool, request(4000), tokens))
        while not tokens:
            await asyncio.sleep(0.01)
    print(pid_of(pool), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_a_worker_dies_with_its_parent(tiny_llama: Path, tmp_path: Path, state: str) -> None:
    """Even where the parent is killed without a chance to say goodbye."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tiny_llama), str(tmp_path), state, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert parent.stdout is not None
        worker = int(await asyncio.wait_for(parent.stdout.readline(), 60))
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        await until(lambda: not alive(worker))
    finally:
        if parent.returncode is None:
            parent.kill()
            await parent.wait()
