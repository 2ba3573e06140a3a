"""EmbeddingService: Embed."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from engine.errors import InternalError, InvalidArgumentError
from engine.jobs import EmbedFinished, EmbedSpec
from server import convert
from server.errors import over_limit
from server.models import ReadyModel
from server.prompts import in_thread_if, read_token_ids
from server.rpc import Context, current_call, new_request_id
from server.services.base import Services
from whet.v1 import embedding_pb2, embedding_pb2_grpc

# Which of a model's own prompts serves which purpose; models spell the last one differently.
_PURPOSES: dict[int, tuple[str, ...]] = {
    embedding_pb2.INPUT_TYPE_UNSPECIFIED: (),
    embedding_pb2.INPUT_TYPE_QUERY: ("query",),
    embedding_pb2.INPUT_TYPE_DOCUMENT: ("document", "passage"),
}


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Vectors from texts."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Embed(self, request: embedding_pb2.EmbedRequest, context: Context) -> embedding_pb2.EmbedResponse:
        """Embeds inputs; see the proto file."""
        began = time.monotonic()
        with self._services.working_on(request.model) as model:
            spec = await self._spec(request, model)
            finished: EmbedFinished | None = None
            async with aclosing(self._services.job_events(spec, model)) as events:
                async for event in events:
                    if isinstance(event, EmbedFinished):
                        finished = event
            if finished is None:
                raise InternalError("the job ended without a result")
            self._services.metrics.embed_texts_total.labels(model.name).inc(len(spec.inputs))
            current_call().notes["inputs"] = len(spec.inputs)
            seconds = time.monotonic() - began
            return await asyncio.to_thread(
                convert.to_embeddings, finished, request_id=current_call().request_id, seconds=seconds
            )

    async def _spec(self, request: embedding_pb2.EmbedRequest, model: ReadyModel) -> EmbedSpec:
        config = self._services.config
        if not request.inputs:
            raise InvalidArgumentError("inputs is empty; accepted: at least one", field="inputs")
        if len(request.inputs) > config.max_embed_inputs:
            raise over_limit("inputs", len(request.inputs), config.max_embed_inputs, "inputs")
        pooling = convert.from_enum(request.pooling, convert.POOLINGS, "", "pooling") or None
        dimensions = None
        if request.HasField("dimensions"):
            dimensions = convert.integer(request.dimensions, "dimensions", 1, model.info.embedding_dimensions)
        adapter, version = convert.from_adapter(request.adapter)
        prefix = self._prefix(request, model)
        inputs = await in_thread_if(True, lambda: self._tokenize(request, model, prefix))
        return EmbedSpec(
            job_id=new_request_id(),
            model=model.name,
            inputs=inputs,
            pooling=pooling,  # type: ignore[arg-type]
            normalize=request.normalize if request.HasField("normalize") else True,
            dimensions=dimensions,
            adapter=adapter,
            adapter_version=version,
        )

    def _prefix(self, request: embedding_pb2.EmbedRequest, model: ReadyModel) -> str:
        if request.input_type not in _PURPOSES:
            raise convert.reject("input_type", request.input_type, f"the enum values 0 to {max(_PURPOSES)}")
        if request.HasField("instruction"):
            return self._instructed(request, model)
        return model.entry.prompts.prefix(*_PURPOSES[request.input_type])

    def _instructed(self, request: embedding_pb2.EmbedRequest, model: ReadyModel) -> str:
        """The prefix that states the caller's instruction; where it could have no effect, it is refused."""
        limit = self._services.config.max_prompt_chars
        if not request.instruction:
            raise InvalidArgumentError("instruction is empty; accepted: a text, or none", field="instruction")
        if len(request.instruction) > limit:
            raise over_limit("instruction", len(request.instruction), limit, "characters")
        if request.input_type == embedding_pb2.INPUT_TYPE_DOCUMENT:
            raise InvalidArgumentError(
                "instruction is given for documents; accepted: for queries, as documents are embedded without one",
                field="instruction",
            )
        for index, message in enumerate(request.inputs):
            if message.WhichOneof("input") == "token_ids":
                raise InvalidArgumentError(
                    f"instruction is given, and inputs[{index}] is token ids; accepted: texts", field="instruction"
                )
        prefix = model.entry.prompts.instructed(request.instruction)
        if prefix is None:
            raise InvalidArgumentError(
                f"instruction is given, and model {model.name!r} takes none: its files have no query prompt of the "
                "form 'Instruct: …\\nQuery:'; accepted: none",
                field="instruction",
                reason="NO_INSTRUCTIONS",
            )
        return prefix

    def _tokenize(self, request: embedding_pb2.EmbedRequest, model: ReadyModel, prefix: str) -> list[list[int]]:
        """Runs in a thread. All limits are checked as it goes, so that no more is tokenised than is accepted."""
        config, info = self._services.config, model.info
        longest = info.max_model_len
        inputs: list[list[int]] = []
        total = 0
        for index, message in enumerate(request.inputs):
            field = f"inputs[{index}]"
            kind = message.WhichOneof("input")
            if kind == "text":
                if len(message.text) > config.max_prompt_chars:
                    raise over_limit(field, len(message.text), config.max_prompt_chars, "characters")
                try:
                    ids = model.tokenizer.encode(prefix + message.text, max_tokens=longest)
                except InvalidArgumentError as error:
                    raise type(error)(f"{field}: {error.message}", field=field, reason=error.reason) from None
                if not ids:  # no prefix, and a tokenizer that adds no token of its own
                    raise InvalidArgumentError(f"{field} is empty; accepted: at least one character", field=field)
            elif kind == "token_ids":
                ids = read_token_ids(message.token_ids.ids, info.vocab_size, longest, field)
            else:
                raise InvalidArgumentError(f"{field} is empty; accepted: text or token_ids", field=field)
            total += len(ids)
            if total > config.max_embed_tokens:
                raise over_limit("inputs", total, config.max_embed_tokens, "tokens in all")
            inputs.append(ids)
        return inputs
