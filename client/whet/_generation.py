"""Generate, Tokenize and Detokenize: requests and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from whet._values import (
    adapter_selector,
    check_options,
    enum_word,
    fill,
    incomplete,
    new_request_id,
    optional,
    reject,
    seconds,
)
from whet.options import GenerateOptions
from whet.types import AdapterChoice, Chunk, Completion, Prompt, Reply, Timings, TokenLogprob, Usage
from whet.v1 import common_pb2, generation_pb2

_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop_token_ids", "ignore_eos", "logit_bias",
)  # fmt: skip


def generate_request(prompt: Prompt, model: str, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    """The request of ``generate`` and ``complete``."""
    check_options("generate", options, GenerateOptions)
    sampling = generation_pb2.SamplingParams()
    fill(sampling, options, _SAMPLING)
    counts = {name: _alternatives(options.get(name)) for name in ("logprobs", "prompt_logprobs")}
    fill(sampling, counts, counts)
    request = generation_pb2.GenerateRequest(
        request_id=new_request_id(options.get("request_id")),
        model=model,
        prompt=to_prompt(prompt, options.get("add_special_tokens")),
        sampling=sampling,
        adapter=adapter_selector(options.get("adapter"), options.get("adapter_version")),
    )
    fill(request, options, ("n", "stop", "echo", "priority", "cache_salt"))
    return request


def each_adapter(adapters: Sequence[AdapterChoice], options: GenerateOptions) -> list[GenerateOptions]:
    """The options of one request per adapter.

    Raises:
        InvalidArgumentError: there are no adapters, one is not a choice, or the options name one, too.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        reject("adapters", adapters, "a list of None, names, or (name, version), at least one")
    for name in ("adapter", "adapter_version"):
        if options.get(name) is not None:
            reject(name, options.get(name), "none, as adapters says which")
    request_id = options.get("request_id")
    chosen: list[GenerateOptions] = []
    for index, choice in enumerate(adapters):
        adapter, version = choice if isinstance(choice, tuple) and len(choice) == 2 else (choice, None)
        known = adapter is None or isinstance(adapter, str)
        if not known or not (version is None or (isinstance(version, int) and adapter is not None)):
            reject(f"adapters[{index}]", choice, "None, a name, or (name, version)")
        each: GenerateOptions = {**options, "adapter": adapter, "adapter_version": version}
        if request_id is not None:
            each["request_id"] = f"{request_id}-{index}"
        chosen.append(each)
    return chosen


def _alternatives(asked: object) -> object:
    """True asks for the chosen token alone, which is 0 alternatives; False for nothing."""
    if asked is True:
        return 0
    return None if asked is False else asked


def to_prompt(prompt: Prompt, add_special_tokens: bool | None = None) -> common_pb2.Prompt:
    """A prompt of whichever kind.

    Raises:
        InvalidArgumentError: it is none of text, token ids and chat messages.
    """
    message = common_pb2.Prompt()
    if isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        message.chat.CopyFrom(to_chat(prompt, "prompt"))
    else:
        message.token_ids.CopyFrom(to_token_ids(prompt, "prompt"))
    fill(message, {"add_special_tokens": add_special_tokens}, ("add_special_tokens",))
    return message


def to_chat(messages: Any, field: str) -> common_pb2.Chat:
    """Chat messages.

    Raises:
        InvalidArgumentError: one of them is not a role and a content, both strings.
    """
    chat = common_pb2.Chat()
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        reject(field, messages, 'a list of {"role": str, "content": str}')
    for index, turn in enumerate(messages):
        match turn:
            case {"role": str(role), "content": str(content)}:
                chat.messages.add(role=role, content=content)
            case _:
                reject(f"{field}[{index}]", turn, '{"role": str, "content": str}')
    return chat


def to_token_ids(ids: Any, field: str) -> common_pb2.TokenIds:
    """Token ids.

    Raises:
        InvalidArgumentError: they are not integers.
    """
    try:
        return common_pb2.TokenIds(ids=ids)
    except (TypeError, ValueError) as error:
        reject(field, ids, f"text, chat messages or token ids ({error})")


class GenerationReader:
    """Makes chunks of a Generate stream's responses, and in the end the whole reply.

    Attributes:
        reply: set by the terminal event.
        started: whether the prompt is computed.
    """

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        self.request_id = request.request_id
        self.reply: Reply | None = None
        self.started = generation_pb2.GenerationStarted()
        self._request = request
        self._texts: dict[int, list[str]] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._details: dict[int, list[TokenLogprob]] = {}

    def feed(self, response: generation_pb2.GenerateResponse) -> list[Chunk]:
        """Takes the next response; returns what it brings."""
        match response.WhichOneof("event"):
            case "started":
                return self._start(response.started)
            case "delta":
                return [self._delta(response.delta)]
            case "finished":
                self.reply = self._finish(response.finished)
                return []
            case _:  # of a newer server
                return []

    def end(self) -> None:
        """Raises InternalError if the stream ended too early."""
        if self.reply is None:
            raise incomplete("Generate", self.request_id)

    def _start(self, started: generation_pb2.GenerationStarted) -> list[Chunk]:
        self.started = started
        self.request_id = started.request_id or self.request_id
        if not (self._request.echo and started.prompt_text):
            return []
        indices = range(self._request.n if self._request.HasField("n") else 1)
        for index in indices:
            self._texts[index] = [started.prompt_text]
        return [Chunk(index=index, text=started.prompt_text) for index in indices]

    def _delta(self, delta: generation_pb2.GenerationDelta) -> Chunk:
        details = from_logprobs(delta.logprobs) if self._request.sampling.HasField("logprobs") else None
        self._texts.setdefault(delta.index, []).append(delta.text)
        self._token_ids.setdefault(delta.index, []).extend(delta.token_ids)
        self._details.setdefault(delta.index, []).extend(details or [])
        return Chunk(
            index=delta.index,
            text=delta.text,
            token_ids=list(delta.token_ids),
            logprobs=_values(details),
            logprob_details=details,
            finish_reason=_finish_reason(delta.finish_reason) or None,
        )

    def _finish(self, finished: generation_pb2.GenerationFinished) -> Reply:
        prompt_details = None
        if self._request.sampling.HasField("prompt_logprobs"):
            prompt_details = from_logprobs(self.started.prompt_logprobs)
        return Reply(
            request_id=finished.request_id or self.request_id,
            model=self.started.model or self._request.model,
            completions=[self._completion(result) for result in finished.completions],
            usage=Usage(
                prompt_tokens=finished.usage.prompt_tokens,
                cached_prompt_tokens=finished.usage.cached_prompt_tokens,
                completion_tokens=finished.usage.completion_tokens,
            ),
            timings=_timings(finished.timings),
            adapter_version=optional(finished, "adapter_version"),
            prompt_token_ids=list(self.started.prompt_token_ids) if self._request.echo else None,
            prompt_logprobs=_values(prompt_details),
            prompt_logprob_details=prompt_details,
        )

    def _completion(self, result: generation_pb2.CompletionResult) -> Completion:
        details = self._details.get(result.index, []) if self._request.sampling.HasField("logprobs") else None
        stopped_by = result.WhichOneof("stop_reason")
        return Completion(
            index=result.index,
            text="".join(self._texts.get(result.index, [])),
            token_ids=self._token_ids.get(result.index, []),
            finish_reason=_finish_reason(result.finish_reason),
            stop_reason=None if stopped_by is None else getattr(result, stopped_by),
            num_completion_tokens=result.num_completion_tokens,
            timings=_timings(result.timings),
            logprobs=_values(details),
            logprob_details=details,
        )


def from_logprobs(entries: Any) -> list[TokenLogprob]:
    """Log-probabilities with their alternatives."""
    return [
        TokenLogprob(
            token_id=entry.token_id,
            logprob=optional(entry, "logprob"),
            rank=optional(entry, "rank"),
            top=[(top.token_id, top.logprob) for top in entry.top],
        )
        for entry in entries
    ]


def _values(details: list[TokenLogprob] | None) -> list[float | None] | None:
    return None if details is None else [detail.logprob for detail in details]


def _finish_reason(number: int) -> str:
    return enum_word(generation_pb2.FinishReason, "FINISH_REASON_", number)


def _timings(message: Message) -> Timings:
    return Timings(
        queue_seconds=seconds(message, "queue"),
        prefill_seconds=seconds(message, "prefill"),
        decode_seconds=seconds(message, "decode"),
        time_to_first_token_seconds=seconds(message, "time_to_first_token"),
        total_seconds=seconds(message, "total"),
        tokens_per_second=optional(message, "tokens_per_second"),
    )


def tokenize_request(prompt: Prompt, model: str, add_special_tokens: bool | None) -> generation_pb2.TokenizeRequest:
    """The request of ``tokenize``."""
    return generation_pb2.TokenizeRequest(
        request_id=new_request_id(None), model=model, prompt=to_prompt(prompt, add_special_tokens)
    )


def detokenize_request(
    token_ids: Sequence[int], model: str, skip_special_tokens: bool
) -> generation_pb2.DetokenizeRequest:
    """The request of ``detokenize``."""
    return generation_pb2.DetokenizeRequest(
        request_id=new_request_id(None),
        model=model,
        token_ids=to_token_ids(token_ids, "token_ids").ids,
        skip_special_tokens=skip_special_tokens,
    )
