"""Between wire messages and engine types: generation, quantization, evaluation, embedding, models and adapters.

This file and ``convert_training`` are the only ones that know both sides. Functions named ``to_…`` make wire messages;
``from_…`` make engine types and raise InvalidArgumentError, which names the field by its path in the request.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from engine.errors import InvalidArgumentError
from engine.info import AdapterInfo, AdapterSource, ModelInfo
from engine.jobs import (
    MAX_SOURCES,
    EmbedFinished,
    MergeFinished,
    MergeProgress,
    PerplexityFinished,
    PerplexityProgress,
    QuantizeFinished,
    QuantizeProgress,
    WeightedAdapter,
)
from engine.names import validate_name
from engine.request import MAX_LOGIT_BIAS, FinishReason, SamplingParams, Timings, TokenLogprob
from whet.v1 import common_pb2, embedding_pb2, evaluation_pb2, generation_pb2, model_pb2, quantization_pb2

MAX_INT32 = 2**31 - 1


# ------------------------------------------------------------------------------------------------------------ values


def to_duration(seconds: float | None) -> Duration | None:
    """A duration; None for what is not known or not finite."""
    if seconds is None or not math.isfinite(seconds):
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_timestamp(seconds: float | None) -> Timestamp | None:
    """A timestamp of seconds since the epoch; None for what is not known."""
    if seconds is None:
        return None
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(seconds * 1e9))
    return timestamp


def reject(field: str, value: object, accepted: str) -> InvalidArgumentError:
    """The error of a value that is not accepted."""
    shown = repr(value) if isinstance(value, str) else str(value)
    return InvalidArgumentError(f"{field} is {shown[:200]}; accepted: {accepted}", field=field)


def integer(value: int, field: str, low: int, high: int = MAX_INT32) -> int:
    """``value``, if it is within [low, high]."""
    if not low <= value <= high:
        accepted = f"an integer in [{low}, {high}]" if high != MAX_INT32 else f"an integer of at least {low}"
        raise InvalidArgumentError(
            f"{field} is {value}; accepted: {accepted}",
            field=field,
            reason="LIMIT_EXCEEDED" if value > high else "INVALID_ARGUMENT",
        )
    return value


def number(
    value: float, field: str, low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False
) -> float:
    """``value``, if it is a finite number within the bounds; NaN never is."""
    above = low < value if low_open else low <= value
    below = value < high if high_open else value <= high
    if not (above and below and math.isfinite(value)):
        brackets = "(" if low_open else "[", ")" if high_open or math.isinf(high) else "]"
        raise reject(field, value, f"a number in {brackets[0]}{low:g}, {high:g}{brackets[1]}")
    return value


def from_enum(value: int, names: dict[int, str], default: str, field: str) -> str:
    """The engine's word for an enum value; unspecified (0) is the default."""
    if value == 0:
        return default
    if value not in names:
        raise reject(field, value, f"the enum values {sorted(names)}")
    return names[value]


def from_adapter(selector: common_pb2.AdapterSelector, field: str = "adapter") -> tuple[str | None, int | None]:
    """Name and version; (None, None) for the base model, which is a selector without a name or version."""
    if not selector.name and not selector.HasField("version"):
        return None, None
    name = validate_name(selector.name, f"{field}.name")
    if not selector.HasField("version"):
        return name, None
    return name, integer(selector.version, f"{field}.version", 0)


# -------------------------------------------------------------------------------------------------------- generation

_FINISH_REASONS: dict[FinishReason, generation_pb2.FinishReason.ValueType] = {
    "stop": generation_pb2.FINISH_REASON_STOP,
    "length": generation_pb2.FINISH_REASON_LENGTH,
}


def from_sampling(message: generation_pb2.SamplingParams, vocab_size: int) -> SamplingParams:
    """Sampling parameters, checked against the model's vocabulary."""
    given = {
        name: getattr(message, name)
        for name in (
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "logprobs",
            "prompt_logprobs",
        )
        if message.HasField(name)
    }
    if len(message.logit_bias) > MAX_LOGIT_BIAS:  # counted before they are copied
        raise InvalidArgumentError(
            f"sampling.logit_bias is {len(message.logit_bias)} entries; accepted: at most {MAX_LOGIT_BIAS} entries",
            field="sampling.logit_bias",
            reason="LIMIT_EXCEEDED",
        )
    params = SamplingParams(
        **given,
        stop_token_ids=list(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
    )
    try:
        params.validate(vocab_size)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"sampling.{error.message}", field=f"sampling.{error.field}", reason=error.reason
        ) from None
    return params


def to_finish_reason(reason: FinishReason) -> generation_pb2.FinishReason.ValueType:
    """The enum value of how a completion ended."""
    return _FINISH_REASONS[reason]


def to_token_logprobs(
    logprobs: Iterable[TokenLogprob | None], token_ids: Sequence[int]
) -> list[generation_pb2.TokenLogprob]:
    """One message per token; a token without a log-probability (the first of a prompt) has its id alone."""
    messages = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        message = generation_pb2.TokenLogprob(token_id=token_id)
        if entry is not None:
            message.logprob, message.rank = entry.logprob, entry.rank
            for other, logprob in entry.top:
                message.top.add(token_id=other, logprob=logprob)
        messages.append(message)
    return messages


def to_prompt_logprobs(
    logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int]
) -> generation_pb2.GenerateResponse:
    """A ``started`` of the log-probabilities alone. They may be half a million numbers, which take a second: call it in
    a thread, and merge the rest into it afterwards."""
    started = generation_pb2.GenerationStarted(prompt_logprobs=to_token_logprobs(logprobs, token_ids))
    return generation_pb2.GenerateResponse(started=started)


def to_timings(timings: Timings, num_completion_tokens: int) -> generation_pb2.GenerationTimings:
    """Timings of one completion; the rate is left out where it is not defined."""
    message = generation_pb2.GenerationTimings(
        queue=to_duration(timings.queue_seconds),
        prefill=to_duration(timings.prefill_seconds),
        decode=to_duration(timings.decode_seconds),
        time_to_first_token=to_duration(timings.time_to_first_token_seconds),
        total=to_duration(timings.total_seconds),
    )
    if num_completion_tokens > 1 and timings.decode_seconds > 0:
        message.tokens_per_second = (num_completion_tokens - 1) / timings.decode_seconds
    return message


# ------------------------------------------------------------------------------------------------------ quantization

_STAGES = {
    "quantizing": quantization_pb2.QUANTIZE_STAGE_QUANTIZING,
    "writing": quantization_pb2.QUANTIZE_STAGE_WRITING,
    "evaluating": quantization_pb2.QUANTIZE_STAGE_EVALUATING,
}
QUANTIZE_SCHEMES: dict[int, str] = {
    quantization_pb2.QUANTIZE_SCHEME_Q8: "q8",
    quantization_pb2.QUANTIZE_SCHEME_Q4: "q4",
}


def to_quantize_progress(event: QuantizeProgress) -> quantization_pb2.QuantizeResponse:
    """A progress event."""
    return quantization_pb2.QuantizeResponse(
        progress=quantization_pb2.QuantizeProgress(
            stage=_STAGES[event.stage],
            tensors_done=event.tensors_done,
            tensors_total=event.tensors_total,
            tensor=event.tensor,
        )
    )


def to_quantize_report(
    event: QuantizeFinished, *, request_id: str, dry_run: bool, loaded: bool
) -> quantization_pb2.QuantizeResponse:
    """The report; on a dry run nothing is said about what was not written."""
    report = quantization_pb2.QuantizeReport(
        request_id=request_id,
        output="" if dry_run else event.output_name,
        path="" if dry_run else event.output_dir,
        bytes_in=event.bytes_in,
        bytes_out=event.bytes_out,
        ratio=event.ratio,
        tensors=[
            quantization_pb2.TensorError(
                name=tensor.name,
                relative_rmse=tensor.relative_rmse,
                max_abs=tensor.max_abs,
                num_elements=tensor.num_elements,
                bits=tensor.bits,
            )
            for tensor in event.tensors
        ],
        num_quantized=event.num_quantized,
        num_kept=event.num_kept,
        logit_kl=event.logit_kl,
        perplexity_before=event.perplexity_before,
        perplexity_after=event.perplexity_after,
        num_eval_tokens=event.num_eval_tokens,
        duration=to_duration(event.seconds),
        loaded=loaded,
    )
    return quantization_pb2.QuantizeResponse(report=report)


# ------------------------------------------------------------------------------------------- evaluation and embedding


def to_perplexity_progress(event: PerplexityProgress) -> evaluation_pb2.PerplexityResponse:
    """A progress event."""
    return evaluation_pb2.PerplexityResponse(
        progress=evaluation_pb2.PerplexityProgress(
            windows_done=event.windows_done,
            windows_total=event.windows_total,
            num_tokens=event.num_tokens,
            nll=event.nll,
        )
    )


def to_perplexity_result(event: PerplexityFinished, request_id: str) -> evaluation_pb2.PerplexityResponse:
    """The result."""
    result = evaluation_pb2.PerplexityResult(
        request_id=request_id,
        nll=event.nll,
        perplexity=event.perplexity,
        standard_error=event.standard_error,
        num_tokens=event.num_tokens,
        num_windows=event.num_windows,
        duration=to_duration(event.seconds),
        adapter_version=event.adapter_version,
    )
    return evaluation_pb2.PerplexityResponse(result=result)


POOLINGS: dict[int, str] = {
    embedding_pb2.POOLING_MEAN: "mean",
    embedding_pb2.POOLING_CLS: "cls",
    embedding_pb2.POOLING_LAST: "last",
}


def to_embeddings(event: EmbedFinished, *, request_id: str, seconds: float) -> embedding_pb2.EmbedResponse:
    """The vectors, one message each."""
    row = struct.Struct(f"<{event.dimensions}f")
    return embedding_pb2.EmbedResponse(
        request_id=request_id,
        embeddings=[embedding_pb2.Embedding(values=values) for values in row.iter_unpack(event.vectors)],
        dimensions=event.dimensions,
        num_tokens=event.num_tokens,
        duration=to_duration(seconds),
        adapter_version=event.adapter_version,
    )


# ----------------------------------------------------------------------------------------------- models and adapters

_TASKS = {"generate": model_pb2.TASK_GENERATE, "embed": model_pb2.TASK_EMBED}
COMBINATION_METHODS: dict[int, str] = {
    model_pb2.COMBINATION_METHOD_CAT: "cat",
    model_pb2.COMBINATION_METHOD_LINEAR: "linear",
}
_COMBINATION_NUMBERS: dict[str, model_pb2.CombinationMethod.ValueType] = {
    "": model_pb2.COMBINATION_METHOD_UNSPECIFIED,
    "cat": model_pb2.COMBINATION_METHOD_CAT,
    "linear": model_pb2.COMBINATION_METHOD_LINEAR,
}
_MODEL_STATES = {
    "unloaded": model_pb2.MODEL_STATE_UNLOADED,
    "loading": model_pb2.MODEL_STATE_LOADING,
    "ready": model_pb2.MODEL_STATE_READY,
    "failed": model_pb2.MODEL_STATE_FAILED,
}


def to_model(
    name: str, state: str, error: str, info: ModelInfo | None, has_chat_template: bool | None
) -> model_pb2.Model:
    """A model as the server knows it; what only loading tells is left out until then."""
    message = model_pb2.Model(name=name, state=_MODEL_STATES[state], error=error)
    if info is None:
        return message
    message.MergeFrom(
        model_pb2.Model(
            model_type=info.model_type,
            task=_TASKS[info.task],
            dtype=info.dtype,
            quantization=info.quantization,
            num_parameters=info.num_parameters,
            weights_bytes=info.weights_bytes,
            vocab_size=info.vocab_size,
            hidden_size=info.hidden_size,
            num_layers=info.num_layers,
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            kv_cache_bytes=info.kv_cache_bytes,
            num_slots=info.num_slots,
            state_bytes=info.state_bytes,
            num_mtp_layers=info.num_mtp_layers,
            linear_modules=info.linear_modules,
            expert_parameters=info.expert_parameters,
            weights_digest=info.weights_digest,
            embedding_dimensions=info.embedding_dimensions,
            device=info.device,
            load_duration=to_duration(info.load_seconds),
            has_chat_template=has_chat_template,
        )
    )
    return message


def to_adapter(info: AdapterInfo) -> model_pb2.Adapter:
    """One version of an adapter. Its path stays here."""
    return model_pb2.Adapter(
        model=info.model,
        name=info.name,
        version=info.version,
        live=info.live,
        loaded=info.loaded,
        rank=info.rank,
        alpha=info.alpha,
        use_rslora=info.use_rslora,
        target_modules=info.target_modules,
        target_parameters=info.target_parameters,
        num_parameters=info.num_parameters,
        create_time=to_timestamp(info.created_at),
        run_id=info.run_id,
        base_digest=info.base_digest,
        best_nll=info.best_nll,
        parent=None if info.parent is None else _to_version(*info.parent),
        data_digest=info.data_digest,
        sources=[_to_weighted(source) for source in info.sources],
        combination_method=_COMBINATION_NUMBERS[info.combination],
        forced=info.forced,
    )


def from_weighted_adapters(messages: Sequence[model_pb2.WeightedAdapter], field: str) -> list[WeightedAdapter]:
    """Adapters with weights, at least one."""
    if not 1 <= len(messages) <= MAX_SOURCES:
        raise InvalidArgumentError(f"{field} has {len(messages)} adapters; accepted: 1 to {MAX_SOURCES}", field=field)
    sources = []
    for index, message in enumerate(messages):
        at = f"{field}[{index}]"
        version = message.adapter.version if message.adapter.HasField("version") else None
        sources.append(
            WeightedAdapter(
                name=validate_name(message.adapter.name, f"{at}.adapter.name"),
                version=None if version is None else integer(version, f"{at}.adapter.version", 0),
                weight=number(
                    message.weight if message.HasField("weight") else 1.0, f"{at}.weight", -math.inf, low_open=True
                ),
            )
        )
    return sources


MERGE_DTYPES: dict[int, str] = {
    model_pb2.MERGE_DTYPE_FLOAT32: "float32",
    model_pb2.MERGE_DTYPE_BFLOAT16: "bfloat16",
    model_pb2.MERGE_DTYPE_FLOAT16: "float16",
}


def to_merge_progress(event: MergeProgress) -> model_pb2.MergeAdapterResponse:
    """A progress event."""
    progress = model_pb2.MergeProgress(
        tensors_done=event.tensors_done, tensors_total=event.tensors_total, tensor=event.tensor
    )
    return model_pb2.MergeAdapterResponse(progress=progress)


def to_merge_report(event: MergeFinished, *, request_id: str, loaded: bool) -> model_pb2.MergeAdapterResponse:
    """The report."""
    report = model_pb2.MergeReport(
        request_id=request_id,
        output=event.output_name,
        path=event.output_dir,
        adapters=[_to_weighted(source) for source in event.adapters],
        num_merged=event.num_merged,
        num_kept=event.num_kept,
        bytes_out=event.bytes_out,
        dtype=event.dtype,
        relative_change=event.relative_change,
        duration=to_duration(event.seconds),
        loaded=loaded,
    )
    return model_pb2.MergeAdapterResponse(report=report)


def _to_weighted(source: AdapterSource) -> model_pb2.WeightedAdapter:
    return model_pb2.WeightedAdapter(adapter=_to_version(source.name, source.version), weight=source.weight)


def _to_version(name: str, version: int) -> model_pb2.AdapterVersion:
    return model_pb2.AdapterVersion(name=name, version=version)
