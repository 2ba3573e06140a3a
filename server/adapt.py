"""Online adaptation: a short run on a handful of examples, from the adapter's live version, awaited by its caller."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import weakref
from contextlib import aclosing
from pathlib import Path

from engine.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
)
from engine.jobs import LoRAParams, TrainFinished, TrainParams, TrainSpec, TrainStarted
from engine.names import validate_name
from server import convert
from server import convert_training as convert_runs
from server.datasets import RunDataset
from server.errors import error_from_code, over_limit
from server.models import ReadyModel
from server.prompts import in_thread_if
from server.rpc import current_call, new_request_id
from server.run_manager import RunManager
from server.runs import RunRecord
from server.services.base import Services
from whet.v1 import training_pb2

DEFAULT_MAX_SEQ_LEN = 1024


class Adaptation:
    """Serves Adapt. Calls for one adapter run one after the other, each from the version that the one before made."""

    def __init__(self, services: Services, runs: RunManager, runs_dir: Path) -> None:
        self._services = services
        self._runs = runs
        self._runs_dir = runs_dir
        self._locks: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = weakref.WeakValueDictionary()

    async def adapt(self, request: training_pb2.AdaptRequest) -> training_pb2.AdaptResponse:
        """Trains, publishes, and replies."""
        with self._services.working_on(request.model, task="generate") as model:
            adapter = validate_name(request.adapter, "adapter")
            params = self._params(request, model)
            loss_on = convert_runs.from_loss_on(request.loss_on)
            if not request.examples:
                raise InvalidArgumentError("examples is empty; accepted: at least one", field="examples")
            if len(request.examples) > self._services.config.max_adapt_examples:
                limit = self._services.config.max_adapt_examples
                raise over_limit("examples", len(request.examples), limit, "examples")
            lock = self._locks.setdefault((model.name, adapter), asyncio.Lock())
            async with lock:
                run = await self._runs.find_request(request.request_id) if request.request_id else None
                if run is None:
                    run = await self._begin(request, model, params, loss_on)
                elif (run.kind, run.model, run.adapter) != ("adapt", model.name, adapter):
                    raise AlreadyExistsError(
                        f"request_id {request.request_id!r} was used for another call; accepted: one id per request",
                        field="request_id",
                        reason="REQUEST_ID_REUSED",
                    )
                current_call().notes["run_id"] = run.run_id
                return await self._reply(run)

    def _params(self, request: training_pb2.AdaptRequest, model: ReadyModel) -> TrainParams:
        config = self._services.config
        longest = min(model.info.max_model_len, config.max_example_tokens)
        steps = request.steps if request.HasField("steps") else 1
        rate = request.learning_rate if request.HasField("learning_rate") else TrainParams().learning_rate
        norm = request.max_grad_norm if request.HasField("max_grad_norm") else TrainParams().max_grad_norm
        length = request.max_seq_len if request.HasField("max_seq_len") else min(DEFAULT_MAX_SEQ_LEN, longest)
        return TrainParams(
            learning_rate=convert.number(rate, "learning_rate", 0.0, 1e3, low_open=True),
            max_grad_norm=convert.number(norm, "max_grad_norm", 0.0, 1e9),
            batch_size=max(len(request.examples), 1),
            max_steps=convert.integer(steps, "steps", 1, config.max_adapt_steps),
            max_seq_len=convert.integer(length, "max_seq_len", 2, longest),
            seed=convert.integer(request.seed, "seed", 0, 2**63 - 1),
            shuffle=False,
            publish="last",
        )

    async def _begin(
        self, request: training_pb2.AdaptRequest, model: ReadyModel, params: TrainParams, loss_on: str
    ) -> RunRecord:
        lora, init_version = await self._shape(request, model)
        run_id = new_request_id()
        run_dir = self._runs_dir / run_id
        try:
            path = run_dir / "dataset"
            summary = await in_thread_if(True, lambda: self._write(request, model, params, loss_on, path))
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, run_dir, ignore_errors=True)
            raise
        spec = TrainSpec(
            job_id=run_id,
            model=model.name,
            adapter=request.adapter,
            lora=lora,
            params=params,
            dataset_path=str(run_dir / "dataset"),
            run_dir=str(run_dir),
            init_adapter=request.adapter if init_version is not None else None,
            init_adapter_version=init_version,
        )
        return await self._runs.start(
            spec,
            kind="adapt",
            request_id=request.request_id or None,
            config=convert_runs.to_adapt_config(request, spec, loss_on),
            dataset=summary,
        )

    async def _shape(self, request: training_pb2.AdaptRequest, model: ReadyModel) -> tuple[LoRAParams, int | None]:
        """The shape of a new adapter, or the version to go on from."""
        versions = [info for info in await self._services.pool.adapters(model.name) if info.name == request.adapter]
        if not versions:
            return convert_runs.from_lora(request.lora, model.info, self._services.config), None
        if request.HasField("lora"):
            raise InvalidArgumentError(
                f"lora is set, but adapter {request.adapter!r} exists and keeps its shape; accepted: unset",
                field="lora",
            )
        live = next((info for info in versions if info.live), None)
        if live is None:
            raise FailedPreconditionError(
                f"adapter {request.adapter!r} has no live version to go on from; LoadAdapter makes one live",
                field="adapter",
                reason="ADAPTER_NOT_LIVE",
            )
        return LoRAParams(), live.version

    def _write(
        self, request: training_pb2.AdaptRequest, model: ReadyModel, params: TrainParams, loss_on: str, path: Path
    ) -> str:
        """Runs in a thread. The examples are held out as well, so that their loss is measured before and after."""
        dataset = RunDataset(self._services.config, model.tokenizer, loss_on=loss_on, max_seq_len=params.max_seq_len)
        for split in (training_pb2.SPLIT_TRAIN, training_pb2.SPLIT_EVAL):
            dataset.add(request.examples, split, request.ByteSize())
        dataset.refuse_rejections()
        return dataset.write(path, eval_fraction=0.0, seed=params.seed)

    async def _reply(self, run: RunRecord) -> training_pb2.AdaptResponse:
        """Waits for the run's end; a caller that leaves takes the run with it."""
        started: TrainStarted | None = None
        finished: TrainFinished | None = None
        try:
            async with aclosing(self._runs.watch(run.run_id)) as watch:
                async for record, _ in watch:
                    if isinstance(record.event, TrainStarted):
                        started = record.event
                    elif isinstance(record.event, TrainFinished):
                        finished = record.event
        except asyncio.CancelledError:
            task = asyncio.create_task(self._runs.cancel(run.run_id))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(task)
            raise
        outcome = await self._runs.outcome(run.run_id)
        if outcome.state == "cancelled":
            raise CancelledError(f"run {run.run_id} was cancelled")
        if outcome.state == "failed":
            raise error_from_code(
                outcome.error_code or "internal", outcome.error_message or "", outcome.error_reason or ""
            )
        if started is None or finished is None or finished.base_nll is None or finished.final_nll is None:
            raise InternalError(f"run {run.run_id} ended without its losses")
        return training_pb2.AdaptResponse(
            loss_before=finished.base_nll,
            loss_after=finished.final_nll,
            version=finished.version or 0,
            steps=finished.step,
            num_tokens=finished.num_tokens,
            num_loss_tokens=started.num_loss_tokens,
            duration=convert.to_duration(finished.seconds),
        )
