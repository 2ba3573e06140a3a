"""The worker process: one engine, one loop, one device.

Takes commands, steps the requests, advances the jobs, sends what came out; sleeps in poll when there is nothing to do.
Everything happens in this one thread, so whatever a command changes is whole before the next step sees it.
"""

from __future__ import annotations

import gc
import logging
import time

import msgspec
import torch
import zmq

from engine.core.failures import as_engine_error
from engine.engine import Engine
from engine.errors import EngineError, InternalError
from engine.jobs import JobEvent
from engine.request import RequestOutput
from server.logs import configure_logging
from server.workers.heartbeat import HeartbeatThread
from server.workers.messages import (
    Abort,
    AdapterPath,
    AdaptersInUse,
    AddRequest,
    AnyCommand,
    Call,
    CancelJob,
    CheckpointJobs,
    CombineAdapters,
    DeleteAdapter,
    Failure,
    ImportAdapter,
    JobEvents,
    ListAdapters,
    LoadAdapter,
    LoadAdapterVersion,
    LoadModel,
    Outputs,
    PruneAdapters,
    Ready,
    RenameAdapter,
    Reply,
    Report,
    RequestFailed,
    Shutdown,
    StartFailed,
    StartJob,
    Statistics,
    Tagged,
    UnloadAdapter,
    UnloadModel,
    WorkerConfig,
    decode_command,
    encode,
    reply,
)
from server.workers.outgoing import OutputSender

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Steps that may fail in a row before the engine is taken for broken (a CUDA context does not survive every fault)."""


class Worker:
    """The loop of one engine.

    Args:
        engine: does the work.
        socket: a connected DEALER.
        heartbeat: is told what the loop is at.
        stats_interval_seconds: between reports of statistics.
        stream_interval_seconds: least time between two reports of outputs.
    """

    def __init__(
        self,
        engine: Engine,
        socket: zmq.Socket[bytes],
        heartbeat: HeartbeatThread,
        *,
        stats_interval_seconds: float,
        stream_interval_seconds: float,
    ) -> None:
        self._running = True
        self._engine = engine
        self._socket = socket
        self._heartbeat = heartbeat
        self._interval = stats_interval_seconds
        self._outgoing = OutputSender(lambda outputs: self._send(Outputs(outputs=outputs)), stream_interval_seconds)
        self._last_stats = float("-inf")
        self._unfinished: dict[str, int] = {}
        self._failed_steps = 0

    def run(self) -> None:
        """Works until Shutdown."""
        while self._running:
            self._heartbeat.turn("waiting for commands")
            self._take_commands()
            if not self._running:
                return
            if self._engine.has_requests():
                self._heartbeat.turn("a step")
                self._step()
            if self._engine.has_jobs():
                self._heartbeat.turn("a slice of a job")
                self._send_events(self._engine.advance_jobs())
            self._send_stats()

    def _take_commands(self) -> None:
        """Does all commands that are there; waits for one, until statistics are due, where there is no work."""
        idle = not (self._engine.has_requests() or self._engine.has_jobs())
        timeout = int(self._interval * 1000) if idle else 0
        while self._running and self._socket.poll(timeout):
            data = self._socket.recv()
            try:
                command = decode_command(data)
            except msgspec.DecodeError as error:
                logger.warning("dropped %d bytes that are no command: %s", len(data), error)
                continue
            self._heartbeat.turn(type(command).__name__)
            self._do(command)
            timeout = 0

    def _do(self, command: AnyCommand) -> None:
        """Carries out a command. What goes wrong in it is its sender's answer and nobody else's trouble."""
        self._outgoing.flush()  # a command may take longer than a step, or be the end of a request
        try:
            match command:
                case AddRequest(request=request):
                    self._engine.add_request(request)
                    self._unfinished[request.request_id] = request.n
                case Abort(request_id=request_id, index=index, reason=reason):
                    if index is None:
                        self._unfinished.pop(request_id, None)
                    self._send_outputs(self._engine.abort(request_id, index, reason))
                case Shutdown():
                    self._running = False
                case Call():
                    self._send(reply(command.call_id, self._answer(command)))
        except Exception as error:  # noqa: BLE001 - becomes the answer
            failure = _failure(error, type(command).__name__)
            if isinstance(command, AddRequest):
                self._send(RequestFailed(request_id=command.request.request_id, failure=failure))
            elif isinstance(command, Call):
                self._send(Reply(call_id=command.call_id, failure=failure))

    def _answer(self, call: Call) -> object:
        """Carries out a call; returns the value of its reply."""
        engine = self._engine
        match call:
            case LoadModel(name=name, path=path):
                with self._heartbeat.announced(f"loading model {name}"):
                    return engine.load_model(name, path)
            case UnloadModel(name=name):
                engine.unload_model(name)
                _release_memory()
            case StartJob(job=job):
                engine.start_job(job.spec())
            case CancelJob(job_id=job_id):
                self._send_events([engine.cancel_job(job_id)])
            case CheckpointJobs():
                with self._heartbeat.announced("checkpointing jobs"):
                    self._send_events(engine.checkpoint_jobs())
            case ListAdapters(model=model):
                return engine.adapters(model)
            case LoadAdapter(model=model, name=name, path=path):
                return engine.load_adapter(model, name, path, force=call.force)
            case LoadAdapterVersion(model=model, name=name, version=version):
                return engine.load_adapter_version(model, name, version, force=call.force)
            case ImportAdapter(model=model, name=name, staged_dir=staged_dir):
                return engine.import_adapter(model, name, staged_dir, force=call.force)
            case RenameAdapter(model=model, name=name, new_name=new_name):
                engine.rename_adapter(model, name, new_name, on_disk=call.on_disk)
            case AdaptersInUse(model=model):
                return engine.adapters_in_use(model)
            case PruneAdapters(model=model, name=prune_name, keep_last=keep_last):
                return engine.prune_adapters(model, prune_name, keep_last, keep=call.keep, dry_run=call.dry_run)
            case CombineAdapters(model=model, name=name, sources=sources, method=method):
                return engine.combine_adapters(model, name, sources, method, force=call.force, max_rank=call.max_rank)
            case UnloadAdapter(model=model, name=name):
                engine.unload_adapter(model, name)
            case DeleteAdapter(model=model, name=name, version=version):
                engine.delete_adapter(model, name, version)
            case AdapterPath(model=model, name=name, version=version):
                return str(engine.adapter_path(model, name, version))
            case _:
                raise InternalError(f"a worker has no answer to {type(call).__name__}")
        return None

    def _step(self) -> None:
        """One step of the requests. The engine confines what goes wrong to the batch; what escapes it ends them all:
        outputs of the step are lost, and a stream must not go on with a hole."""
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._failed_steps += 1
            self._outgoing.flush()
            failure = _failure(error, "the step")
            ended, self._unfinished = self._unfinished, {}
            for request_id in ended:
                self._engine.abort(request_id)
                self._send(RequestFailed(request_id=request_id, failure=failure))
            _release_memory()
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            return
        self._failed_steps = 0
        self._send_outputs(outputs)

    def _send_outputs(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finish_reason and output.request_id in self._unfinished:
                self._unfinished[output.request_id] -= 1
                if not self._unfinished[output.request_id]:
                    del self._unfinished[output.request_id]
        self._outgoing.take(outputs, only_decodes=self._engine.only_decodes)

    def _send_stats(self) -> None:
        now = time.monotonic()
        if now - self._last_stats >= self._interval:
            self._last_stats = now
            self._send(Statistics(stats=self._engine.stats()))

    def _send_events(self, events: list[JobEvent]) -> None:
        if events:
            self._send(JobEvents(events=[Tagged.of(event) for event in events]))

    def _send(self, report: Report) -> None:
        self._socket.send(encode(report))


def _failure(error: Exception, what: str) -> Failure:
    """What to report; an exception that nobody raised on purpose is logged with its traceback."""
    reported = as_engine_error(error, what)
    if isinstance(reported, InternalError):
        logger.error("%s failed", what, exc_info=error)
    return Failure.of(reported)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve(config: WorkerConfig) -> int:
    """Runs a worker to its end. Returns the exit status."""
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, config.identity.encode())
    # Unbounded, so that a front end that is slow for a while cannot stop the engine.
    socket.set_hwm(0)
    # The last messages get this long to leave when the worker ends.
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(config.endpoint)
    try:
        try:
            engine = Engine(config.engine)
        except EngineError as error:
            socket.send(encode(StartFailed(failure=Failure.of(error))))
            return 1
        heartbeat = HeartbeatThread(context, config.endpoint, config.identity, config.heartbeat_interval_seconds)
        socket.send(encode(Ready(device=str(engine.device))))
        heartbeat.start()
        try:
            Worker(
                engine,
                socket,
                heartbeat,
                stats_interval_seconds=config.heartbeat_interval_seconds,
                stream_interval_seconds=config.stream_interval_seconds,
            ).run()
        finally:
            heartbeat.stop()
        return 0
    finally:
        socket.close()
        context.term()


def work(config: bytes) -> int:
    """Runs a worker to its end. Returns the exit status.

    Args:
        config: a WorkerConfig in JSON.
    Raises:
        msgspec.DecodeError: it is none.
    """
    decoded = msgspec.json.decode(config, type=WorkerConfig)
    configure_logging(decoded.log_level, decoded.log_format)
    return serve(decoded)
