"""The plain HTTP port: /metrics, /livez, /readyz."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from server.health import Health


class HttpServer:
    """Serves operators, never clients; it needs no token and tells nothing of requests.

    Args:
        scrape: the text exposition of the metrics.
    """

    def __init__(self, health: Health, scrape: Callable[[], Awaitable[bytes]]) -> None:
        self._health = health
        self._scrape = scrape
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the port.

        Raises:
            OSError: it cannot be bound.
        """
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Closes the port."""
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _livez(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n") if self._health.live else web.Response(status=503, text="workers are down\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        if self._health.ready:
            return web.Response(text="ok\n")
        return web.Response(status=503, text=f"{self._health.why_not_ready()}\n")
