"""Merging adapters into a model of its own, for MergeAdapter."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from engine.jobs import MergeFinished, MergeProgress, MergeSpec
from engine.names import validate_name
from server import convert
from server.rpc import Call, current_call, new_request_id
from server.services.base import Services
from server.shared_work import SharedWork
from whet.v1 import model_pb2


class Merging:
    """Serves MergeAdapter."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._works: SharedWork[model_pb2.MergeAdapterResponse] = SharedWork()

    async def merge(self, request: model_pb2.MergeAdapterRequest) -> AsyncGenerator[model_pb2.MergeAdapterResponse]:
        """Yields progress, then the report."""
        call = current_call()
        key = request.request_id or call.request_id
        fingerprint = request.SerializeToString(deterministic=True)
        async with aclosing(self._works.follow(key, fingerprint, lambda: self._work(request, call))) as responses:
            async for response in responses:
                yield response

    async def _work(
        self, request: model_pb2.MergeAdapterRequest, call: Call
    ) -> AsyncGenerator[model_pb2.MergeAdapterResponse]:
        services = self._services
        with services.working_on(request.model) as model:
            adapters = convert.from_weighted_adapters(request.adapters, "adapters")
            dtype = convert.from_enum(request.dtype, convert.MERGE_DTYPES, "auto", "dtype")
            output = validate_name(request.output, "output")
            async with services.models.claim_output(output) as path:
                spec = MergeSpec(
                    job_id=new_request_id(),
                    model=model.name,
                    adapters=adapters,
                    output_dir=str(path),
                    output_name=output,
                    dtype=dtype,  # type: ignore[arg-type]
                    force=request.force,
                    load=request.load if request.HasField("load") else True,
                )
                async with aclosing(services.job_events(spec, model)) as events:
                    async for event in events:
                        if isinstance(event, MergeProgress):
                            yield convert.to_merge_progress(event)
                        elif isinstance(event, MergeFinished):
                            loaded = await services.adopt(output)
                            yield convert.to_merge_report(event, request_id=call.request_id, loaded=loaded)
