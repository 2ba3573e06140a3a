"""EvaluationService: Perplexity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from engine.errors import FailedPreconditionError, InvalidArgumentError
from engine.jobs import PerplexityFinished, PerplexityProgress, PerplexitySpec
from server import convert
from server.models import ReadyModel
from server.prompts import encode, encode_start, max_chars_of, take_token_ids
from server.rpc import Context, current_call, new_request_id
from server.services.base import Services
from whet.v1 import evaluation_pb2, evaluation_pb2_grpc

DEFAULT_WINDOW = 512
DEFAULT_STRIDE = 256


class EvaluationService(evaluation_pb2_grpc.EvaluationServiceServicer):
    """Numbers about models."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Perplexity(
        self, request: evaluation_pb2.PerplexityRequest, context: Context
    ) -> AsyncIterator[evaluation_pb2.PerplexityResponse]:
        """Perplexity of a text; see the proto file."""
        with self._services.working_on(request.model) as model:
            if model.info.task != "generate":
                raise FailedPreconditionError(
                    f"model {model.name!r} is an encoder and predicts no next token", field="model", reason="WRONG_TASK"
                )
            spec = await self._spec(request, model)
            async with aclosing(self._services.job_events(spec, model)) as events:
                async for event in events:
                    if isinstance(event, PerplexityProgress):
                        yield convert.to_perplexity_progress(event)
                    elif isinstance(event, PerplexityFinished):
                        self._services.metrics.perplexity_tokens_total.labels(model.name).inc(event.num_tokens)
                        yield convert.to_perplexity_result(event, current_call().request_id)

    async def _spec(self, request: evaluation_pb2.PerplexityRequest, model: ReadyModel) -> PerplexitySpec:
        config = self._services.config
        longest = min(config.max_perplexity_window, model.info.max_model_len)
        default_window = min(DEFAULT_WINDOW, longest)
        window = convert.integer(request.window if request.HasField("window") else default_window, "window", 2, longest)
        default_stride = min(DEFAULT_STRIDE, window)
        stride = convert.integer(request.stride if request.HasField("stride") else default_stride, "stride", 1, window)
        adapter, version = convert.from_adapter(request.adapter)
        max_tokens = config.max_perplexity_tokens
        if request.HasField("max_tokens"):
            max_tokens = convert.integer(request.max_tokens, "max_tokens", 2, config.max_perplexity_tokens)
        token_ids = await self._token_ids(request, model, max_tokens)
        kind = request.WhichOneof("input") or "input"
        if len(token_ids) < 2:
            raise InvalidArgumentError(
                f"{kind} has {len(token_ids)} token; accepted: at least 2, as the first is not scored", field=kind
            )
        return PerplexitySpec(
            job_id=new_request_id(),
            model=model.name,
            token_ids=token_ids,
            window=window,
            stride=stride,
            adapter=adapter,
            adapter_version=version,
        )

    @staticmethod
    async def _token_ids(request: evaluation_pb2.PerplexityRequest, model: ReadyModel, max_tokens: int) -> list[int]:
        """Those to score: no more than the caller asked for, or all, where they are not too many."""
        is_cut = request.HasField("max_tokens")
        match request.WhichOneof("input"):
            case "text" if is_cut:
                return await encode_start(request.text, model.tokenizer, max_tokens, "text")
            case "text":
                return await encode(request.text, model.tokenizer, max_chars_of(max_tokens), max_tokens, "text")
            case "token_ids":
                ids = request.token_ids.ids
                chosen = ids[:max_tokens] if is_cut else ids
                return await take_token_ids(chosen, model.info.vocab_size, max_tokens, "token_ids")
            case _:
                raise InvalidArgumentError("input is empty; accepted: text or token_ids", field="input")
