"""GenerationService: Generate, Tokenize, Detokenize."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from engine.errors import CancelledError, EngineError, InvalidArgumentError, OverloadedError
from engine.request import Request, RequestOutput, SamplingParams
from server import convert
from server.completion import Completion, Delta, coalesced
from server.errors import error_from_code, over_limit
from server.models import ReadyModel
from server.prompts import ResolvedPrompt, check_token_ids, in_thread_if, resolve_prompt
from server.rpc import Context, current_call, new_request_id
from server.services.base import Services
from whet.v1 import generation_pb2, generation_pb2_grpc

MAX_CACHE_SALT_CHARS = 256
MAX_PRIORITY = 1_000_000
INLINE_LOGPROBS = 1 << 12  # converting more of them holds up the event loop


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Text from models, and the way between text and tokens."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Continues a prompt; see the proto file."""
        n = convert.integer(request.n, "n", 1, self._services.config.max_n) if request.HasField("n") else 1
        with self._services.working_on(request.model, units=n, task="generate") as model:
            prepared, prompt = await self._prepare(request, model, n)
            generation = _Generation(self._services, request, prepared, prompt, model)
            async with aclosing(generation.responses()) as responses:
                async for response in responses:
                    yield response

    async def _prepare(
        self, request: generation_pb2.GenerateRequest, model: ReadyModel, n: int
    ) -> tuple[Request, ResolvedPrompt]:
        """Checks every field and builds the engine's request."""
        config = self._services.config
        vocab_size = model.info.vocab_size
        if len(request.sampling.stop_token_ids) > config.max_stop_token_ids:
            count = len(request.sampling.stop_token_ids)
            raise over_limit("sampling.stop_token_ids", count, config.max_stop_token_ids, "ids")
        sampling = convert.from_sampling(request.sampling, vocab_size)
        self._check_stop(list(request.stop))
        adapter, version = convert.from_adapter(request.adapter)
        priority = convert.integer(request.priority, "priority", -MAX_PRIORITY, MAX_PRIORITY)
        if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
            raise over_limit("cache_salt", len(request.cache_salt), MAX_CACHE_SALT_CHARS, "characters")
        prompt = await resolve_prompt(request.prompt, model.tokenizer, vocab_size, config)
        prepared = Request(
            request_id=new_request_id(),
            model=model.name,
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            n=n,
            adapter=adapter,
            adapter_version=version,
            priority=priority,
            cache_salt=request.cache_salt,
        )
        return prepared, prompt

    def _check_stop(self, stop: list[str]) -> None:
        config = self._services.config
        if len(stop) > config.max_stop_strings:
            raise over_limit("stop", len(stop), config.max_stop_strings, "strings")
        for index, text in enumerate(stop):
            if not text:
                raise InvalidArgumentError(f"stop[{index}] is empty; accepted: at least one character", field="stop")
            if len(text) > config.max_stop_string_chars:
                raise over_limit(f"stop[{index}]", len(text), config.max_stop_string_chars, "characters")

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Token ids of a prompt; see the proto file."""
        with self._services.working_on(request.model) as model:
            if request.prompt.WhichOneof("input") == "token_ids":
                raise InvalidArgumentError("prompt is token_ids; accepted: text or chat", field="prompt.token_ids")
            prompt = await resolve_prompt(request.prompt, model.tokenizer, model.info.vocab_size, self._services.config)
            rendered = (prompt.text or "") if request.prompt.WhichOneof("input") == "chat" else ""
            return generation_pb2.TokenizeResponse(token_ids=prompt.token_ids, rendered_text=rendered)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        """The text of token ids; see the proto file."""
        with self._services.working_on(request.model) as model:
            ids = list(request.token_ids)
            if not ids:
                return generation_pb2.DetokenizeResponse()
            check_token_ids(ids, model.info.vocab_size, self._services.config.max_prompt_tokens, "token_ids")
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            text = await in_thread_if(len(ids) > 4096, lambda: model.tokenizer.decode(ids, skip))
            return generation_pb2.DetokenizeResponse(text=text)


class _Generation:
    """One Generate call after its checks: outputs of the engine become responses."""

    def __init__(
        self,
        services: Services,
        message: generation_pb2.GenerateRequest,
        request: Request,
        prompt: ResolvedPrompt,
        model: ReadyModel,
    ) -> None:
        self._services = services
        self._message = message
        self._request = request
        self._prompt = prompt
        self._model = model
        self._call = current_call()
        self._completions = [
            Completion(index, model.tokenizer, list(message.stop), request.sampling.min_tokens)
            for index in range(request.n)
        ]
        self._started: RequestOutput | None = None
        self._prompt_logprobs = generation_pb2.GenerateResponse()
        self._held: list[RequestOutput] = []
        self._is_counted = False

    @property
    def _sampling(self) -> SamplingParams:
        return self._request.sampling

    async def responses(self) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        """started, deltas, finished. Closing it stops the engine's work on the request."""
        outcome = "error"
        try:
            async with aclosing(self._services.pool.generate(self._request)) as batches:
                async for batch in batches:
                    for output in coalesced(batch):
                        await self._convert_prompt_logprobs(output)
                        for response in self._take(output):
                            yield response
            finished = self._finished()
            self._count(outcome)  # before the caller has it: who has seen the end finds it counted
            yield finished
        except EngineError as error:
            outcome = "cancelled" if isinstance(error, CancelledError) else "error"
            if isinstance(error, OverloadedError) and error.reason == "QUEUE_FULL":
                self._services.metrics.admission_rejections_total.labels("queue_full").inc()
            raise
        except BaseException:
            outcome = "cancelled"
            raise
        finally:
            self._count(outcome)

    def _take(self, output: RequestOutput) -> list[generation_pb2.GenerateResponse]:
        """The responses that an output brings; none until the prompt is computed."""
        if output.finish_reason in ("error", "cancelled"):
            code = output.error_code or ("cancelled" if output.finish_reason == "cancelled" else "internal")
            raise error_from_code(code, output.error_message or "the request was ended", output.error_reason)
        if not output.token_ids and output.finish_reason is None:
            return []
        if self._completions[output.index].finish_reason is not None:
            self._completions[output.index].push(output)  # a stop string ended it; only its timings are news
            return []
        if self._started is not None:
            return [self._delta(output)]
        self._held.append(output)
        if self._sampling.prompt_logprobs is not None and output.prompt_logprobs is None:
            return []  # they come with the first token of completion 0
        self._started = output
        held, self._held = self._held, []
        return [self._start(output), *(response for earlier in held for response in self._take(earlier))]

    async def _convert_prompt_logprobs(self, output: RequestOutput) -> None:
        logprobs, ids = output.prompt_logprobs, self._prompt.token_ids
        if logprobs is not None:
            size = len(logprobs) * (1 + (self._sampling.prompt_logprobs or 0))
            self._prompt_logprobs = await in_thread_if(
                size > INLINE_LOGPROBS, lambda: convert.to_prompt_logprobs(logprobs, ids)
            )

    def _start(self, output: RequestOutput) -> generation_pb2.GenerateResponse:
        self._call.notes["adapter"] = self._request.adapter
        self._call.notes["adapter_version"] = output.adapter_version
        started = generation_pb2.GenerationStarted(
            request_id=self._call.request_id,
            model=self._model.name,
            adapter_version=output.adapter_version,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
        )
        if self._message.echo:
            ids = self._prompt.token_ids
            text = self._prompt.text
            started.prompt_text = text if text is not None else self._model.tokenizer.decode(ids, False)
            started.prompt_token_ids.extend(ids)
        self._prompt_logprobs.started.MergeFrom(started)
        return self._prompt_logprobs

    def _delta(self, output: RequestOutput) -> generation_pb2.GenerateResponse:
        completion = self._completions[output.index]
        delta: Delta = completion.push(output)
        if completion.stop_string is not None and completion.timings is None:
            self._services.pool.stop_completion(self._request.request_id, output.index)
        message = generation_pb2.GenerationDelta(index=delta.index, text=delta.text, token_ids=delta.token_ids)
        if delta.logprobs is not None:
            message.logprobs.extend(convert.to_token_logprobs(delta.logprobs, delta.token_ids))
        if delta.finish_reason is not None:
            message.finish_reason = convert.to_finish_reason(delta.finish_reason)
        return generation_pb2.GenerateResponse(delta=message)

    def _finished(self) -> generation_pb2.GenerateResponse:
        started = self._started
        ended = [completion for completion in self._completions if completion.timings is not None]
        if started is None or len(ended) < len(self._completions):
            raise error_from_code("internal", "the engine ended the request without finishing it")
        num_tokens = sum(completion.num_tokens for completion in ended)
        last = max(ended, key=lambda completion: completion.timings.total_seconds if completion.timings else 0.0)
        finished = generation_pb2.GenerationFinished(
            request_id=self._call.request_id,
            completions=[self._result(completion) for completion in ended],
            usage=generation_pb2.Usage(
                prompt_tokens=started.num_prompt_tokens,
                cached_prompt_tokens=started.num_cached_tokens,
                completion_tokens=num_tokens,
            ),
            timings=self._result(last).timings,
            adapter_version=started.adapter_version,
        )
        self._call.notes["prompt_tokens"] = started.num_prompt_tokens
        self._call.notes["completion_tokens"] = num_tokens
        return generation_pb2.GenerateResponse(finished=finished)

    @staticmethod
    def _result(completion: Completion) -> generation_pb2.CompletionResult:
        assert completion.timings is not None
        assert completion.finish_reason is not None
        result = generation_pb2.CompletionResult(
            index=completion.index,
            finish_reason=convert.to_finish_reason(completion.finish_reason),
            num_completion_tokens=completion.num_tokens,
            timings=convert.to_timings(completion.timings, completion.num_timed_tokens),
        )
        if completion.stop_string is not None:
            result.stop_string = completion.stop_string
        elif completion.stop_token_id is not None:
            result.stop_token_id = completion.stop_token_id
        return result

    def _count(self, outcome: str) -> None:
        """Counts the request, once. An adapter is a label only once the engine has found it: callers name no labels."""
        if self._is_counted:
            return
        self._is_counted = True
        metrics, model = self._services.metrics, self._model.name
        name = (self._request.adapter or "") if self._started is not None else ""
        adapter = metrics.adapter_label(model, name)
        if self._started is not None:
            metrics.prompt_tokens_total.labels(model, adapter).inc(self._started.num_prompt_tokens)
            num_tokens = sum(completion.num_tokens for completion in self._completions)
            metrics.generation_tokens_total.labels(model, adapter).inc(num_tokens)
        for completion in self._completions:
            metrics.requests_total.labels(model, adapter, completion.finish_reason or outcome).inc()
