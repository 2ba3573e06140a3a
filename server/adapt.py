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
from engine.jobs import KLBound, LoRAParams, TrainFinished, TrainParams, TrainSpec, TrainStarted
from engine.names import validate_name
from server import convert_training as convert_runs
from server.datasets import RunDataset
from server.errors import error_from_code, over_limit
from server.models import ReadyModel
from server.prompts import resolve_prompt
from server.rpc import current_call, new_request_id
from server.run_manager import RunManager
from server.runs import RunRecord
from server.services.base import Services
from server.threads import in_thread
from whet.v1 import training_pb2


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
            config = self._services.config
            longest = min(model.info.max_model_len, config.max_example_tokens)
            params, max_kl = convert_runs.from_adapt_request(request, config, longest)
            loss_on = convert_runs.from_loss_on(request.loss_on)
            if not request.examples:
                raise InvalidArgumentError("examples is empty; accepted: at least one", field="examples")
            if len(request.examples) > config.max_adapt_examples:
                raise over_limit("examples", len(request.examples), config.max_adapt_examples, "examples")
            bound = await self._bound(request, model, max_kl)
            lock = self._locks.setdefault((model.name, adapter), asyncio.Lock())
            async with lock:
                run = await self._runs.find_request(request.request_id) if request.request_id else None
                if run is None:
                    run = await self._begin(request, model, params, loss_on, bound)
                elif (run.kind, run.model, run.adapter) != ("adapt", model.name, adapter):
                    raise AlreadyExistsError(
                        f"request_id {request.request_id!r} was used for another call; accepted: one id per request",
                        field="request_id",
                        reason="REQUEST_ID_REUSED",
                    )
                current_call().notes["run_id"] = run.run_id
                return await self._reply(run)

    async def _bound(
        self, request: training_pb2.AdaptRequest, model: ReadyModel, max_kl: float | None
    ) -> KLBound | None:
        """Probes as token ids. Raises InvalidArgumentError: they are too many, empty, or too long."""
        config = self._services.config
        if len(request.probe_prompts) > config.max_adapt_probes:
            raise over_limit("probe_prompts", len(request.probe_prompts), config.max_adapt_probes, "prompts")
        probes: list[list[int]] = []
        for index, prompt in enumerate(request.probe_prompts):
            field = f"probe_prompts[{index}]"
            resolved = await resolve_prompt(prompt, model.tokenizer, model.info.vocab_size, config, field)
            if len(resolved.token_ids) > model.info.max_model_len:
                raise over_limit(field, len(resolved.token_ids), model.info.max_model_len, "tokens")
            probes.append(resolved.token_ids)
            num_tokens = sum(map(len, probes))
            if num_tokens > config.max_adapt_probe_tokens:
                raise over_limit(field, num_tokens, config.max_adapt_probe_tokens, "tokens in all probe prompts")
        return KLBound(probes=probes, max_kl=max_kl) if probes else None

    async def _begin(
        self,
        request: training_pb2.AdaptRequest,
        model: ReadyModel,
        params: TrainParams,
        loss_on: str,
        bound: KLBound | None,
    ) -> RunRecord:
        lora, init_version = await self._shape(request, model)
        run_id = new_request_id()
        run_dir = self._runs_dir / run_id
        try:
            path = run_dir / "dataset"
            summary = await in_thread(self._write, request, model, params, loss_on, path)
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
            bound=bound,
        )
        return await self._runs.start(
            spec,
            kind="adapt",
            request_id=request.request_id or None,
            config=convert_runs.to_adapt_config(request, spec, loss_on),
            dataset=summary,
            cancel_with_caller=True,
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
        dataset.add(request.examples, training_pb2.SPLIT_TRAIN, request.ByteSize())
        dataset.refuse_rejections()
        return dataset.write(path, eval_fraction=0.0, seed=params.seed, hold_out_all=True)

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
        return convert_runs.to_adapt_response(started, finished, outcome)
