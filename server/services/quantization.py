"""QuantizationService: Quantize."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, nullcontext

from engine.errors import InvalidArgumentError
from engine.jobs import QuantizeFinished, QuantizeProgress, QuantizeSpec
from engine.names import validate_name
from server import convert
from server.models import ReadyModel
from server.prompts import encode, max_chars_of, take_token_ids
from server.rpc import Call, Context, current_call, new_request_id
from server.services.base import Services
from server.shared_work import SharedWork
from whet.v1 import quantization_pb2, quantization_pb2_grpc

GROUP_SIZES = (32, 64, 128)


class QuantizationService(quantization_pb2_grpc.QuantizationServiceServicer):
    """Smaller copies of models."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._works: SharedWork[quantization_pb2.QuantizeResponse] = SharedWork()

    async def Quantize(
        self, request: quantization_pb2.QuantizeRequest, context: Context
    ) -> AsyncIterator[quantization_pb2.QuantizeResponse]:
        """Writes a quantized copy of a model; see the proto file."""
        call = current_call()
        key = request.request_id or call.request_id
        fingerprint = request.SerializeToString(deterministic=True)
        async with aclosing(self._works.follow(key, fingerprint, lambda: self._work(request, call))) as responses:
            async for response in responses:
                yield response

    async def _work(
        self, request: quantization_pb2.QuantizeRequest, call: Call
    ) -> AsyncGenerator[quantization_pb2.QuantizeResponse]:
        services = self._services
        with services.working_on(request.model) as model:
            output = validate_name(request.output, "output")
            async with nullcontext() if request.dry_run else services.models.claim_output(output):
                spec = await self._spec(request, model, output)
                async with aclosing(services.job_events(spec, model)) as events:
                    async for event in events:
                        if isinstance(event, QuantizeProgress):
                            yield convert.to_quantize_progress(event)
                        elif isinstance(event, QuantizeFinished):
                            yield await self._report(event, spec, call)

    async def _report(
        self, event: QuantizeFinished, spec: QuantizeSpec, call: Call
    ) -> quantization_pb2.QuantizeResponse:
        services = self._services
        loaded = False
        if not spec.dry_run:
            services.metrics.quantize_bytes_in_total.labels(spec.model).inc(event.bytes_in)
            services.metrics.quantize_bytes_out_total.labels(spec.model).inc(event.bytes_out or 0)
            loaded = await services.adopt(spec.output_name)
        return convert.to_quantize_report(event, request_id=call.request_id, dry_run=spec.dry_run, loaded=loaded)

    async def _spec(self, request: quantization_pb2.QuantizeRequest, model: ReadyModel, output: str) -> QuantizeSpec:
        scheme = convert.from_enum(request.scheme, convert.QUANTIZE_SCHEMES, "", "scheme")
        if not scheme:
            raise InvalidArgumentError("scheme is not set; accepted: Q8, Q4", field="scheme")
        group_size = request.group_size if request.HasField("group_size") else GROUP_SIZES[0]
        if group_size not in GROUP_SIZES:
            raise convert.reject("group_size", group_size, ", ".join(map(str, GROUP_SIZES)))
        if scheme == "q8" and request.HasField("group_size"):
            raise convert.reject("group_size", group_size, "nothing with scheme Q8, which has one scale per channel")
        if scheme == "q8" and request.HasField("symmetric") and not request.symmetric:
            raise convert.reject("symmetric", False, "true with scheme Q8")
        return QuantizeSpec(
            job_id=new_request_id(),
            model=model.name,
            scheme=scheme,  # type: ignore[arg-type]
            output_dir=str(self._services.models.path_of_output(output)),
            output_name=output,
            group_size=group_size,
            symmetric=request.symmetric if request.HasField("symmetric") else True,
            quantize_embeddings=request.quantize_embeddings,
            quantize_head=request.quantize_head,
            eval_token_ids=await self._eval_token_ids(request, model),
            dry_run=request.dry_run,
            load=request.load if request.HasField("load") else True,
        )

    async def _eval_token_ids(self, request: quantization_pb2.QuantizeRequest, model: ReadyModel) -> list[int]:
        limit = self._services.config.max_perplexity_tokens
        kind = request.WhichOneof("eval_input")
        if kind is None:
            return []
        if kind == "eval_text":
            ids = await encode(request.eval_text, model.tokenizer, max_chars_of(limit), limit, kind)
        else:
            ids = await take_token_ids(request.eval_token_ids.ids, model.info.vocab_size, limit, kind)
        if len(ids) < 2:
            raise InvalidArgumentError(f"{kind} has {len(ids)} token; accepted: at least 2", field=kind)
        return ids
