"""TrainingService: runs that outlive their callers, and Adapt."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

from engine.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from engine.jobs import TrainSpec
from server import convert
from server import convert_training as convert_runs
from server.adapt import Adaptation
from server.datasets import RunDataset
from server.errors import over_limit
from server.prompts import in_thread_if
from server.rpc import Context, current_call, new_request_id
from server.run_manager import RunManager, interrupted
from server.runs import RunRecord
from server.services.base import Services, decode_page_token, encode_page_token
from server.threads import in_thread
from whet.v1 import training_pb2, training_pb2_grpc

_CURSOR = re.compile(r"[0-9]{1,18}")


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """LoRA runs on the weights that are being served."""

    def __init__(self, services: Services, runs: RunManager, runs_dir: Path) -> None:
        self._services = services
        self._runs = runs
        self._runs_dir = runs_dir
        self._adaptation = Adaptation(services, runs, runs_dir)

    # -------------------------------------------------------------------------------------------------------- train

    async def Train(
        self, request_iterator: AsyncIterator[training_pb2.TrainRequest], context: Context
    ) -> AsyncIterator[training_pb2.TrainResponse]:
        """Trains an adapter; see the proto file."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("payload") != "config":
            raise InvalidArgumentError(
                "the first message is no config; accepted: config, then examples", field="config"
            )
        config = first.config
        call = current_call()
        call.adopt_request_id(config.request_id)
        cancel = convert_runs.from_on_disconnect(config.on_disconnect)
        run = await self._earlier(config) if config.request_id else None
        if run is None:
            run = await self._begin(config, request_iterator)
        call.notes["run_id"] = run.run_id
        await call.send_initial_metadata(context, x_run_id=run.run_id)
        async with aclosing(self._events(run.run_id, cancel_on_disconnect=cancel)) as events:
            async for event in events:
                yield training_pb2.TrainResponse(event=event)

    async def _earlier(self, config: training_pb2.TrainConfig) -> RunRecord | None:
        """The run that a first call with this request_id began.

        Raises:
            AlreadyExistsError: it was begun for another model or adapter.
        """
        run = await self._runs.find_request(config.request_id)
        if run is not None and (run.model, run.adapter) != (config.model, config.adapter):
            raise AlreadyExistsError(
                f"request_id {config.request_id!r} was used for run {run.run_id} of adapter {run.adapter!r}; "
                "accepted: one id per run",
                field="config.request_id",
                reason="REQUEST_ID_REUSED",
            )
        return run

    async def _begin(
        self, config: training_pb2.TrainConfig, messages: AsyncIterator[training_pb2.TrainRequest]
    ) -> RunRecord:
        """Takes the examples, writes the dataset, and starts the run."""
        services = self._services
        with services.working_on(config.model, task="generate") as model:
            self._runs.check_capacity()
            request = convert_runs.from_train_config(config, model.info, services.config)
            limit = min(model.info.max_model_len, services.config.max_example_tokens)
            if request.params.max_seq_len > limit:
                if config.params.HasField("max_seq_len"):
                    raise over_limit("config.params.max_seq_len", request.params.max_seq_len, limit, "tokens")
                request = convert_runs.with_max_seq_len(request, limit)
            run_id = new_request_id()
            run_dir = self._runs_dir / run_id
            params = request.params
            dataset = RunDataset(
                services.config, model.tokenizer, loss_on=request.loss_on, max_seq_len=params.max_seq_len
            )
            async for message in messages:
                if message.WhichOneof("payload") != "examples":
                    raise InvalidArgumentError(
                        "a message holds no examples; accepted: one config, then examples", field="examples"
                    )
                batch = message.examples
                await in_thread_if(True, functools.partial(dataset.add, batch.examples, batch.split, batch.ByteSize()))
            try:
                summary = await in_thread(
                    dataset.write, run_dir / "dataset", eval_fraction=request.eval_fraction, seed=params.seed
                )
            except BaseException:
                await asyncio.to_thread(shutil.rmtree, run_dir, ignore_errors=True)
                raise
            spec = TrainSpec(
                job_id=run_id,
                model=model.name,
                adapter=request.adapter,
                lora=request.lora,
                params=request.params,
                dataset_path=str(run_dir / "dataset"),
                run_dir=str(run_dir),
                init_adapter=request.init_adapter,
                init_adapter_version=request.init_adapter_version,
            )
            return await self._runs.start(
                spec,
                kind="train",
                request_id=config.request_id or None,
                config=convert_runs.to_resolved_config(request, config),
                dataset=summary,
                cancel_with_caller=request.cancel_on_disconnect,
            )

    async def _events(
        self,
        run_id: str,
        *,
        from_step: int = 0,
        after: int = -1,
        cancel_on_disconnect: bool = False,
        ends_quietly: bool = False,
    ) -> AsyncGenerator[training_pb2.TrainEvent]:
        """A run's events up to its end.

        Args:
            from_step: leave out events of earlier steps.
            after: leave out events up to this sequence number.
            cancel_on_disconnect: cancel the run when the consumer leaves before its end.
            ends_quietly: at an interruption, rather than with an error.
        """
        ended = False
        try:
            async with aclosing(self._runs.watch(run_id, from_step, after)) as watch:
                async for record, run in watch:
                    event = convert_runs.to_event(record, run)
                    ended = event.WhichOneof("event") in ("finished", "failed")
                    yield event
            if not ended and not ends_quietly:
                raise interrupted(run_id)
            ended = True
        finally:
            if cancel_on_disconnect and not ended and self._runs.is_live(run_id):
                # In a task of its own, as this one is being cancelled.
                task = asyncio.create_task(self._runs.cancel(run_id))
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(task)

    # --------------------------------------------------------------------------------------------------------- runs

    async def WatchRun(
        self, request: training_pb2.WatchRunRequest, context: Context
    ) -> AsyncIterator[training_pb2.WatchRunResponse]:
        """A run's events, past and to come; see the proto file."""
        from_step = convert.integer(request.from_step, "from_step", 0)
        await self._runs.get(request.run_id)
        async with aclosing(self._events(request.run_id, from_step=from_step, ends_quietly=True)) as events:
            async for event in events:
                yield training_pb2.WatchRunResponse(event=event)

    async def GetRun(self, request: training_pb2.GetRunRequest, context: Context) -> training_pb2.GetRunResponse:
        """One run; see the proto file."""
        return training_pb2.GetRunResponse(run=convert_runs.to_run(await self._runs.get(request.run_id)))

    async def ListRuns(self, request: training_pb2.ListRunsRequest, context: Context) -> training_pb2.ListRunsResponse:
        """Runs, newest first; see the proto file."""
        size = self._services.page_size(request.page_size)
        cursor = decode_page_token(request.page_token)
        if cursor is not None and not _CURSOR.fullmatch(cursor):
            raise InvalidArgumentError(
                "page_token is of another list; accepted: the next_page_token of an earlier reply", field="page_token"
            )
        runs = await self._runs.page(
            limit=size + 1,
            before=int(cursor) if cursor is not None else None,
            model=request.model,
            adapter=request.adapter,
            state=convert_runs.from_state(request.state),
        )
        token = encode_page_token(str(runs[size - 1].number)) if len(runs) > size else ""
        return training_pb2.ListRunsResponse(
            runs=[convert_runs.to_run(run) for run in runs[:size]], next_page_token=token
        )

    async def CancelRun(
        self, request: training_pb2.CancelRunRequest, context: Context
    ) -> training_pb2.CancelRunResponse:
        """Ends a run; see the proto file."""
        run = await self._runs.cancel(request.run_id)
        return training_pb2.CancelRunResponse(run=convert_runs.to_run(run))

    async def ResumeRun(
        self, request: training_pb2.ResumeRunRequest, context: Context
    ) -> AsyncIterator[training_pb2.ResumeRunResponse]:
        """Goes on with a run; see the proto file."""
        cancel = convert_runs.from_on_disconnect(request.on_disconnect)
        run = await self._runs.get(request.run_id)
        with self._services.working_on(run.model, task="generate"):
            _check_dataset(run)
            after = await self._runs.resume(run.run_id, cancel_with_caller=cancel)
        await current_call().send_initial_metadata(context, x_run_id=run.run_id)
        async with aclosing(self._events(run.run_id, after=after, cancel_on_disconnect=cancel)) as events:
            async for event in events:
                yield training_pb2.ResumeRunResponse(event=event)

    # -------------------------------------------------------------------------------------------------------- adapt

    async def Adapt(self, request: training_pb2.AdaptRequest, context: Context) -> training_pb2.AdaptResponse:
        """A few steps on a few examples; see the proto file."""
        return await self._adaptation.adapt(request)


def _check_dataset(run: RunRecord) -> None:
    if not Path(run.train_spec().dataset_path).exists():
        raise FailedPreconditionError(
            f"the dataset of run {run.run_id} is gone from the state directory, so it cannot go on",
            field="run_id",
            reason="RUN_NOT_RESUMABLE",
        )
