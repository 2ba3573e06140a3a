"""Adapters on the scrape: as last heard from a worker that is busy, gone with a worker that is gone."""

from __future__ import annotations

import asyncio

from engine.info import AdapterInfo, ModelInfo
from server.adapter_view import AdapterView
from tests.unit.test_server_models import INFO

TONE = AdapterInfo(
    model="m",
    name="tone",
    version=1,
    live=True,
    loaded=True,
    rank=8,
    alpha=16.0,
    use_rslora=False,
    target_modules=["q_proj"],
    num_parameters=1,
    path="",
)


class Source:
    """Answers at once, or never while it is busy."""

    def __init__(self) -> None:
        self.busy = False
        self.served = {"m"}
        self.found = [TONE]

    async def adapters(self, model: str | None = None) -> list[AdapterInfo]:
        if self.busy:
            await asyncio.Event().wait()
        return list(self.found)

    def models(self) -> dict[str, ModelInfo]:
        return {"m": INFO}

    def serves(self, model: str) -> bool:
        return model in self.served


async def test_a_busy_worker_hides_nothing() -> None:
    source = Source()
    view = AdapterView(source, patience_seconds=0.01)
    await view.refresh()
    source.busy = True
    await view.refresh()
    assert view.adapters() == [TONE]


async def test_what_is_deleted_or_not_served_is_not_shown() -> None:
    source = Source()
    view = AdapterView(source, patience_seconds=0.01)
    await view.refresh()
    source.served = set()
    await view.refresh()
    assert view.adapters() == []
    source.served, source.found = {"m"}, []
    await view.refresh()
    assert view.adapters() == []
