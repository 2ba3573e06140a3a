"""Which versions of adapters stay on disk."""

from __future__ import annotations

import logging

from engine.errors import EngineError
from engine.info import AdapterInfo
from server.run_manager import RunManager
from server.workers.pool import WorkerPool

logger = logging.getLogger("whet.adapters")


class AdapterRetention:
    """Deletes versions that nothing needs: not live, not among the newest, not in use by a request or a job, and not
    what a run would begin with.

    Args:
        max_versions: newest versions that stay when one is published; 0: all.
    """

    def __init__(self, pool: WorkerPool, runs: RunManager, max_versions: int) -> None:
        self._pool = pool
        self._runs = runs
        self._max_versions = max_versions

    async def prune(self, model: str, name: str | None, keep_last: int, *, dry_run: bool) -> list[AdapterInfo]:
        """Deletes, and returns what was deleted; on a dry run, what would be.

        Args:
            name: None: every adapter of the model.
        """
        keep = await self._runs.needed_versions(model)
        return await self._pool.prune_adapters(model, name, keep_last, keep, dry_run=dry_run)

    async def published(self, model: str, name: str) -> None:
        """Applies the policy to an adapter that has a new version. Never fails: the version is there all the same."""
        if not self._max_versions:
            return
        try:
            gone = await self.prune(model, name, self._max_versions, dry_run=False)
        except EngineError as error:
            logger.warning("versions of adapter %s of %s were not pruned: %s", name, model, error.message)
            return
        if gone:
            logger.info("pruned versions %s of adapter %s of %s", [info.version for info in gone], name, model)
