"""Between wire messages and engine types: training runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from engine.errors import InvalidArgumentError
from engine.info import ModelInfo
from engine.jobs import (
    JobFailed,
    JobWarning,
    LoRAParams,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainParams,
    TrainPublished,
    TrainSpec,
    TrainStarted,
    TrainStep,
)
from engine.names import validate_name
from server.config import ServerConfig
from server.convert import from_adapter, from_enum, integer, number, reject, to_duration, to_timestamp
from server.errors import STATUS_BY_CODE
from server.runs import EventRecord, RunRecord, RunState
from whet.v1 import training_pb2

MAX_REPORTED_REJECTIONS = 100
ADAPT_MAX_SEQ_LEN = 1024
"""Of Adapt, unless it is told otherwise."""

_OPTIMIZERS: dict[int, str] = {training_pb2.OPTIMIZER_ADAMW: "adamw", training_pb2.OPTIMIZER_SGD: "sgd"}
_SCHEDULES: dict[int, str] = {
    training_pb2.LR_SCHEDULE_CONSTANT: "constant",
    training_pb2.LR_SCHEDULE_LINEAR: "linear",
    training_pb2.LR_SCHEDULE_COSINE: "cosine",
}
_COMPUTE_DTYPES: dict[int, str] = {
    training_pb2.COMPUTE_DTYPE_AUTO: "auto",
    training_pb2.COMPUTE_DTYPE_FLOAT32: "float32",
    training_pb2.COMPUTE_DTYPE_BFLOAT16: "bfloat16",
}
_LOSS_ON: dict[int, str] = {training_pb2.LOSS_ON_COMPLETION: "completion", training_pb2.LOSS_ON_ALL: "all"}
_PUBLISH: dict[int, str] = {training_pb2.PUBLISH_BEST: "best", training_pb2.PUBLISH_LAST: "last"}
_ON_DISCONNECT: dict[int, str] = {
    training_pb2.ON_DISCONNECT_CONTINUE: "continue",
    training_pb2.ON_DISCONNECT_CANCEL: "cancel",
}
SPLITS: dict[int, str] = {training_pb2.SPLIT_TRAIN: "train", training_pb2.SPLIT_EVAL: "eval"}
_STATES = {
    "queued": training_pb2.RUN_STATE_QUEUED,
    "running": training_pb2.RUN_STATE_RUNNING,
    "finished": training_pb2.RUN_STATE_FINISHED,
    "failed": training_pb2.RUN_STATE_FAILED,
    "cancelled": training_pb2.RUN_STATE_CANCELLED,
    "interrupted": training_pb2.RUN_STATE_INTERRUPTED,
}
STATES_BY_NUMBER: dict[int, str] = {int(number): state for state, number in _STATES.items()}
_STOP_REASONS = {
    "max_steps": training_pb2.STOP_REASON_MAX_STEPS,
    "epochs": training_pb2.STOP_REASON_EPOCHS,
    "early_stopping": training_pb2.STOP_REASON_EARLY_STOPPING,
    "max_kl": training_pb2.STOP_REASON_MAX_KL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A TrainConfig, checked and with defaults resolved.

    Attributes:
        eval_fraction: of the training examples, to hold out.
        cancel_on_disconnect: the run ends with the call that began it.
    """

    model: str
    adapter: str
    lora: LoRAParams
    params: TrainParams
    loss_on: str
    init_adapter: str | None
    init_adapter_version: int | None
    eval_fraction: float
    cancel_on_disconnect: bool


def _numbers(message: Any, names: Iterable[str]) -> dict[str, Any]:
    """The optional fields that are set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def from_train_config(message: training_pb2.TrainConfig, info: ModelInfo, config: ServerConfig) -> RunRequest:
    """What a run is to do.

    Raises:
        InvalidArgumentError: naming the field, its value and what is accepted.
    """
    init_adapter, init_version = from_adapter(message.init_adapter, "init_adapter")
    if init_adapter is not None and message.HasField("lora"):
        raise InvalidArgumentError(
            "lora is set together with init_adapter, whose own shape is kept; accepted: one of them", field="lora"
        )
    fraction = message.eval_fraction if message.HasField("eval_fraction") else 0.0
    return RunRequest(
        model=info.name,
        adapter=validate_name(message.adapter, "adapter"),
        lora=from_lora(message.lora, info, config),
        params=from_train_params(message.params, config),
        loss_on=from_enum(message.params.loss_on, _LOSS_ON, "completion", "params.loss_on"),
        init_adapter=init_adapter,
        init_adapter_version=init_version,
        eval_fraction=number(fraction, "eval_fraction", 0.0, 1.0, high_open=True),
        cancel_on_disconnect=from_on_disconnect(message.on_disconnect),
    )


def with_max_seq_len(request: RunRequest, max_seq_len: int) -> RunRequest:
    """The same run with another max_seq_len: a default that the model's context cannot hold."""
    return dataclasses.replace(request, params=dataclasses.replace(request.params, max_seq_len=max_seq_len))


def from_on_disconnect(value: int) -> bool:
    """Whether the run is cancelled when its caller leaves."""
    return from_enum(value, _ON_DISCONNECT, "continue", "on_disconnect") == "cancel"


def from_loss_on(value: int) -> str:
    """ "completion" or "all"."""
    return from_enum(value, _LOSS_ON, "completion", "loss_on")


def from_lora(message: training_pb2.LoRAConfig, info: ModelInfo, config: ServerConfig) -> LoRAParams:
    """Shape of a new adapter, checked against the model."""
    lora = LoRAParams(
        **_numbers(message, ("rank", "alpha", "dropout", "use_rslora")),
        target_modules=list(message.target_modules),
        target_parameters=list(message.target_parameters),
        layers=list(message.layers),
    )
    integer(lora.rank, "lora.rank", 1, config.max_lora_rank)
    number(lora.alpha, "lora.alpha", 0.0, 1e6, low_open=True)
    number(lora.dropout, "lora.dropout", 0.0, 1.0, high_open=True)
    for module in lora.target_modules:
        if module not in info.linear_modules and lora.target_modules != ["all-linear"]:
            raise reject("lora.target_modules", module, f"{', '.join(info.linear_modules)}, or all-linear alone")
    for parameter in lora.target_parameters:
        if not any(name == parameter or name.endswith(f".{parameter}") for name in info.expert_parameters):
            accepted = ", ".join(info.expert_parameters) or "none, since the model has no stacked experts"
            raise reject("lora.target_parameters", parameter, accepted)
    if lora.target_parameters and lora.dropout:
        raise reject("lora.dropout", lora.dropout, "0 with target_parameters, as in PEFT")
    for name in ("target_modules", "target_parameters"):
        given = getattr(lora, name)
        if len(set(given)) != len(given):
            raise reject(f"lora.{name}", ", ".join(given), "each name once")
    for layer in lora.layers:
        integer(layer, "lora.layers", 0, info.num_layers - 1)
    if len(set(lora.layers)) != len(lora.layers):
        raise reject("lora.layers", lora.layers, "each layer once")
    return lora


def from_train_params(message: training_pb2.TrainParams, config: ServerConfig) -> TrainParams:
    """How to train."""
    defaults = TrainParams()
    given = _numbers(
        message,
        (
            "learning_rate", "eps", "momentum", "weight_decay", "warmup_steps", "max_grad_norm", "batch_size",
            "gradient_accumulation_steps", "max_steps", "epochs", "max_seq_len", "packing", "shuffle", "seed",
            "eval_every", "early_stopping_patience", "checkpoint_every", "publish_every", "forward_tolerance",
            "activation_checkpointing",
        ),
    )  # fmt: skip
    params = TrainParams(
        **given,
        betas=(
            message.beta1 if message.HasField("beta1") else defaults.betas[0],
            message.beta2 if message.HasField("beta2") else defaults.betas[1],
        ),
        optimizer=from_enum(message.optimizer, _OPTIMIZERS, "adamw", "params.optimizer"),  # type: ignore[arg-type]
        schedule=from_enum(message.schedule, _SCHEDULES, "constant", "params.schedule"),  # type: ignore[arg-type]
        compute_dtype=from_enum(message.compute_dtype, _COMPUTE_DTYPES, "auto", "params.compute_dtype"),  # type: ignore[arg-type]
        publish=from_enum(message.publish, _PUBLISH, "best", "params.publish"),  # type: ignore[arg-type]
    )
    number(params.learning_rate, "params.learning_rate", 0.0, 1e3, low_open=True)
    number(params.betas[0], "params.beta1", 0.0, 1.0, high_open=True)
    number(params.betas[1], "params.beta2", 0.0, 1.0, high_open=True)
    number(params.eps, "params.eps", 0.0, 1.0, low_open=True)
    number(params.momentum, "params.momentum", 0.0, 1.0, high_open=True)
    number(params.weight_decay, "params.weight_decay", 0.0, 1e3)
    number(params.max_grad_norm, "params.max_grad_norm", 0.0, 1e9)
    number(params.forward_tolerance, "params.forward_tolerance", 0.0, 1e3, low_open=True)
    integer(params.warmup_steps, "params.warmup_steps", 0, config.max_train_steps)
    integer(params.batch_size, "params.batch_size", 1, config.max_batch_size)
    integer(params.gradient_accumulation_steps, "params.gradient_accumulation_steps", 1, params.batch_size)
    integer(params.max_seq_len, "params.max_seq_len", 2, config.max_example_tokens)
    integer(params.seed, "params.seed", 0, 2**63 - 1)
    for name in ("eval_every", "early_stopping_patience", "checkpoint_every", "publish_every"):
        integer(getattr(params, name), f"params.{name}", 0, config.max_train_steps)
    if params.max_steps is not None:
        integer(params.max_steps, "params.max_steps", 1, config.max_train_steps)
    if params.epochs is not None:
        number(params.epochs, "params.epochs", 0.0, 1e6, low_open=True)
    if params.max_steps is None and params.epochs is None:
        raise InvalidArgumentError(
            "params has neither max_steps nor epochs; accepted: at least one of them", field="params.max_steps"
        )
    return params


def from_adapt_request(
    message: training_pb2.AdaptRequest, config: ServerConfig, longest: int
) -> tuple[TrainParams, float | None]:
    """How to adapt, and the limit on the KL.

    Args:
        longest: tokens of an example that the model and the server allow.
    Raises:
        InvalidArgumentError: naming the field, its value and what is accepted.
    """
    params = TrainParams(
        **_numbers(message, ("learning_rate", "max_grad_norm", "seed", "momentum", "weight_decay")),
        optimizer=from_enum(message.optimizer, _OPTIMIZERS, "adamw", "optimizer"),  # type: ignore[arg-type]
        batch_size=max(len(message.examples), 1),
        max_steps=message.steps if message.HasField("steps") else 1,
        max_seq_len=message.max_seq_len if message.HasField("max_seq_len") else min(ADAPT_MAX_SEQ_LEN, longest),
        shuffle=False,
        publish="last",
    )
    number(params.learning_rate, "learning_rate", 0.0, 1e3, low_open=True)
    number(params.momentum, "momentum", 0.0, 1.0, high_open=True)
    number(params.weight_decay, "weight_decay", 0.0, 1e3)
    number(params.max_grad_norm, "max_grad_norm", 0.0, 1e9)
    integer(params.max_steps or 0, "steps", 1, config.max_adapt_steps)
    integer(params.max_seq_len, "max_seq_len", 2, longest)
    integer(params.seed, "seed", 0, 2**63 - 1)
    if not message.HasField("max_kl"):
        return params, None
    if not message.probe_prompts:
        raise InvalidArgumentError("max_kl is set without probe_prompts; accepted: both, or neither", field="max_kl")
    return params, number(message.max_kl, "max_kl", 0.0, 1e6, low_open=True)


def to_adapt_response(started: TrainStarted, finished: TrainFinished, run: RunRecord) -> training_pb2.AdaptResponse:
    """What became of a run of Adapt, whose examples are held out as well."""
    assert finished.base_nll is not None
    assert finished.final_nll is not None
    return training_pb2.AdaptResponse(
        loss_before=finished.base_nll,
        loss_after=finished.final_nll,
        version=finished.version,
        steps=finished.step,
        num_tokens=finished.num_tokens,
        num_loss_tokens=started.num_loss_tokens,
        duration=to_duration(finished.seconds),
        kl=finished.kl,
        stop_reason=_STOP_REASONS[finished.stop_reason],
        num_truncated=json.loads(run.dataset)["num_truncated"],
    )


def to_resolved_config(request: RunRequest, message: training_pb2.TrainConfig) -> str:
    """The TrainConfig as JSON with every default written out, for the archive."""
    resolved = training_pb2.TrainConfig()
    resolved.CopyFrom(message)
    params, lora = request.params, request.lora
    for name in (
        "learning_rate", "eps", "momentum", "weight_decay", "warmup_steps", "max_grad_norm", "batch_size",
        "gradient_accumulation_steps", "max_seq_len", "packing", "shuffle", "seed", "eval_every",
        "early_stopping_patience", "checkpoint_every", "publish_every", "forward_tolerance", "activation_checkpointing",
    ):  # fmt: skip
        setattr(resolved.params, name, getattr(params, name))
    resolved.params.beta1, resolved.params.beta2 = params.betas
    resolved.params.optimizer = _number_of(_OPTIMIZERS, params.optimizer)  # type: ignore[assignment]
    resolved.params.schedule = _number_of(_SCHEDULES, params.schedule)  # type: ignore[assignment]
    resolved.params.compute_dtype = _number_of(_COMPUTE_DTYPES, params.compute_dtype)  # type: ignore[assignment]
    resolved.params.loss_on = _number_of(_LOSS_ON, request.loss_on)  # type: ignore[assignment]
    resolved.params.publish = _number_of(_PUBLISH, params.publish)  # type: ignore[assignment]
    if request.init_adapter is None:
        for name in ("rank", "alpha", "dropout", "use_rslora"):
            setattr(resolved.lora, name, getattr(lora, name))
    resolved.eval_fraction = request.eval_fraction
    resolved.on_disconnect = (
        training_pb2.ON_DISCONNECT_CANCEL if request.cancel_on_disconnect else training_pb2.ON_DISCONNECT_CONTINUE
    )
    return json_format.MessageToJson(resolved, preserving_proto_field_name=True, indent=None)


def to_adapt_config(message: training_pb2.AdaptRequest, spec: TrainSpec, loss_on: str) -> str:
    """The TrainConfig, as JSON, of the run that an Adapt call makes."""
    config = training_pb2.TrainConfig(request_id=message.request_id, model=spec.model, adapter=spec.adapter)
    if spec.init_adapter is not None:
        config.init_adapter.name = spec.init_adapter
        if spec.init_adapter_version is not None:
            config.init_adapter.version = spec.init_adapter_version
    else:
        config.lora.CopyFrom(message.lora)
    assert spec.params.max_steps is not None
    config.params.max_steps = spec.params.max_steps
    request = RunRequest(
        model=spec.model,
        adapter=spec.adapter,
        lora=spec.lora,
        params=spec.params,
        loss_on=loss_on,
        init_adapter=spec.init_adapter,
        init_adapter_version=spec.init_adapter_version,
        eval_fraction=0.0,
        cancel_on_disconnect=True,
    )
    return to_resolved_config(request, config)


def _number_of(names: Mapping[int, str], name: str) -> int:
    return next(number for number, word in names.items() if word == name)


def from_example(message: training_pb2.TrainExample, field: str) -> dict[str, Any]:
    """An example as the plain record that a line of a JSONL file would be.

    Raises:
        InvalidArgumentError: it is none of the kinds.
    """
    match message.WhichOneof("example"):
        case "prompt_completion":
            return {"prompt": message.prompt_completion.prompt, "completion": message.prompt_completion.completion}
        case "chat":
            return {"messages": [{"role": turn.role, "content": turn.content} for turn in message.chat.messages]}
        case "text":
            return {"text": message.text}
        case "instruction":
            record = message.instruction
            return {"instruction": record.instruction, "input": record.input, "output": record.output}
        case _:
            raise InvalidArgumentError(
                f"{field} is empty; accepted: prompt_completion, chat, text or instruction", field=field
            )


def from_state(value: int) -> RunState | None:
    """A run state to filter by; None: any."""
    return from_enum(value, STATES_BY_NUMBER, "", "state") or None  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------- runs and events


def to_run(record: RunRecord) -> training_pb2.Run:
    """The archive's record of a run."""
    run = training_pb2.Run(
        run_id=record.run_id,
        state=_STATES[record.state],
        create_time=to_timestamp(record.created),
        start_time=to_timestamp(record.started),
        end_time=to_timestamp(record.ended),
        step=record.step,
        total_steps=record.total_steps,
        loss=record.loss,
        base_nll=record.base_nll,
        final_nll=record.final_nll,
        best_nll=record.best_nll,
        best_step=record.best_step,
        version=record.version,
    )
    json_format.Parse(record.config, run.config, ignore_unknown_fields=True)
    if record.state == "failed":
        run.error.CopyFrom(_to_error(record.error_code, record.error_reason, record.error_message))
    return run


def to_event(record: EventRecord, run: RunRecord) -> training_pb2.TrainEvent:
    """An archived event. ``run`` gives what the engine's own event does not hold."""
    message = training_pb2.TrainEvent(
        run_id=record.run_id, sequence=record.sequence, create_time=to_timestamp(record.created)
    )
    event = record.event
    match event:
        case TrainStarted():
            message.started.CopyFrom(_to_started(event, run))
        case TrainStep():
            message.step.CopyFrom(_to_step(event))
        case TrainEvaluation():
            message.evaluation.CopyFrom(
                training_pb2.RunEvaluation(
                    step=event.step,
                    nll=event.nll,
                    num_loss_tokens=event.num_loss_tokens,
                    is_best=event.is_best,
                    duration=to_duration(event.seconds),
                )
            )
        case TrainCheckpoint():
            message.checkpoint.CopyFrom(
                training_pb2.RunCheckpoint(
                    step=event.step, path=event.path, is_best=event.is_best, duration=to_duration(event.seconds)
                )
            )
        case TrainPublished():
            message.published.CopyFrom(
                training_pb2.RunPublished(step=event.step, adapter=event.adapter, version=event.version)
            )
        case JobWarning():
            message.warning.CopyFrom(
                training_pb2.RunWarning(step=event.step, reason=event.reason, message=event.message)
            )
        case TrainFinished():
            message.finished.CopyFrom(_to_finished(event))
        case JobFailed(error_code="cancelled"):
            message.finished.CopyFrom(_to_cancelled(run))
        case JobFailed():
            error = _to_error(event.error_code, event.error_reason, event.error_message)
            message.failed.CopyFrom(training_pb2.RunFailed(step=run.step, error=error))
    return message


def _to_started(event: TrainStarted, run: RunRecord) -> training_pb2.RunStarted:
    counted = json.loads(run.dataset)
    dataset = training_pb2.Dataset(
        num_examples=event.num_examples,
        num_eval_examples=event.num_eval_examples,
        num_tokens=event.num_tokens,
        num_loss_tokens=event.num_loss_tokens,
        num_rejected=counted["num_rejected"],
        num_truncated=counted["num_truncated"],
        rejected=[
            training_pb2.RejectedExample(
                split=_number_of(SPLITS, rejection["split"]),  # type: ignore[arg-type]
                index=rejection["index"],
                reason=rejection["reason"],
                message=rejection["message"],
            )
            for rejection in counted["rejected"][:MAX_REPORTED_REJECTIONS]
        ],
    )
    return training_pb2.RunStarted(
        num_trainable_parameters=event.num_trainable_parameters,
        dataset=dataset,
        target_modules=event.target_modules,
        target_parameters=event.target_parameters,
        total_steps=event.total_steps,
        resumed_from_step=event.resumed_from_step,
        forward_difference=event.forward_difference,
        estimated_memory_bytes=event.estimated_memory_bytes,
    )


def _to_step(event: TrainStep) -> training_pb2.RunStep:
    return training_pb2.RunStep(
        step=event.step,
        epoch=event.epoch,
        loss=event.loss,
        learning_rate=event.learning_rate,
        grad_norm=event.grad_norm,
        num_tokens=event.num_tokens,
        num_loss_tokens=event.num_loss_tokens,
        tokens_per_second=event.tokens_per_second,
        step_duration=to_duration(event.step_seconds),
        eta=to_duration(event.eta_seconds),
        peak_memory_bytes=event.peak_memory_bytes,
        skipped=event.skipped,
        kl=event.kl,
    )


def _to_finished(event: TrainFinished) -> training_pb2.RunFinished:
    return training_pb2.RunFinished(
        step=event.step,
        stop_reason=_STOP_REASONS[event.stop_reason],
        base_nll=event.base_nll,
        final_nll=event.final_nll,
        best_nll=event.best_nll,
        best_step=event.best_step,
        version=event.version,
        adapter_path=event.adapter_path,
        checkpoint_path=event.checkpoint_path,
        duration=to_duration(event.seconds),
        num_tokens=event.num_tokens,
        kl=event.kl,
    )


def _to_cancelled(run: RunRecord) -> training_pb2.RunFinished:
    """What is known of a run that was cancelled; the rest stays unset."""
    return training_pb2.RunFinished(
        step=run.step,
        stop_reason=training_pb2.STOP_REASON_CANCELLED,
        base_nll=run.base_nll,
        best_nll=run.best_nll,
        best_step=run.best_step,
        version=run.version,
    )


def _to_error(code: str | None, reason: str | None, message: str | None) -> training_pb2.RunError:
    status = STATUS_BY_CODE.get(code or "internal", STATUS_BY_CODE["internal"])
    return training_pb2.RunError(code=status.value[0], reason=reason or "", message=message or "")
