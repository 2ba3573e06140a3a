"""Training runs: requests and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whet import events
from whet._examples import ExampleSource, to_examples
from whet._generation import to_prompt
from whet._values import (
    adapter_selector,
    check_options,
    enum_value,
    enum_word,
    fill,
    incomplete,
    known_seconds,
    moment,
    new_request_id,
    optional,
    reject,
    seconds,
)
from whet.errors import RunFailedError, UnavailableError
from whet.options import AdaptOptions, LoRAOptions, TrainOptions
from whet.types import Adaptation, Prompt, RunError, RunInfo
from whet.v1 import training_pb2

_LORA = ("rank", "alpha", "dropout", "use_rslora", "target_modules", "target_parameters", "layers")
_PARAMS = (
    "learning_rate", "eps", "momentum", "weight_decay", "warmup_steps", "max_grad_norm", "batch_size",
    "gradient_accumulation_steps", "max_steps", "epochs", "max_seq_len", "packing", "shuffle", "seed", "eval_every",
    "early_stopping_patience", "checkpoint_every", "publish_every", "forward_tolerance",
    "activation_checkpointing",
)  # fmt: skip
_ENUMS: tuple[tuple[str, Any, str], ...] = (
    ("optimizer", training_pb2.Optimizer, "OPTIMIZER_"),
    ("schedule", training_pb2.LrSchedule, "LR_SCHEDULE_"),
    ("compute_dtype", training_pb2.ComputeDtype, "COMPUTE_DTYPE_"),
    ("loss_on", training_pb2.LossOn, "LOSS_ON_"),
    ("publish", training_pb2.Publish, "PUBLISH_"),
)
_ADAPT = (
    "steps", "learning_rate", "momentum", "weight_decay", "max_grad_norm", "max_seq_len", "seed", "max_kl",
)  # fmt: skip
_MESSAGE_BYTES = 256 << 10

GRPC_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
"""Names of the gRPC statuses by their number."""


def train_requests(
    examples: ExampleSource, eval_examples: ExampleSource | None, model: str, adapter: str, options: TrainOptions
) -> list[training_pb2.TrainRequest]:
    """The messages of ``train``: the configuration, then the examples in messages of a bounded size."""
    check_options("train", options, TrainOptions)
    config = training_pb2.TrainConfig(
        request_id=new_request_id(options.get("request_id")),
        model=model,
        adapter=adapter,
        lora=_lora(options),
        init_adapter=adapter_selector(options.get("init_adapter"), options.get("init_adapter_version")),
        params=_params(options),
        on_disconnect=on_disconnect(options.get("on_disconnect")),
    )
    fill(config, options, ("eval_fraction",))
    requests = [training_pb2.TrainRequest(config=config)]
    for split, source in ((training_pb2.SPLIT_TRAIN, examples), (training_pb2.SPLIT_EVAL, eval_examples)):
        if source is not None:
            requests += _batches(source, split)
    return requests


def _batches(source: ExampleSource, split: training_pb2.Split.ValueType) -> list[training_pb2.TrainRequest]:
    requests: list[training_pb2.TrainRequest] = []
    size = _MESSAGE_BYTES
    for example in to_examples(source):
        if size >= _MESSAGE_BYTES:
            requests.append(training_pb2.TrainRequest(examples=training_pb2.TrainExamples(split=split)))
            size = 0
        requests[-1].examples.examples.append(example)
        size += example.ByteSize()
    return requests


def _lora(options: Mapping[str, Any]) -> training_pb2.LoRAConfig | None:
    """None where nothing of it is set, as it must be for an adapter that exists."""
    if all(options.get(name) is None for name in LoRAOptions.__annotations__):
        return None
    lora = training_pb2.LoRAConfig()
    fill(lora, options, _LORA)
    return lora


def _params(options: TrainOptions) -> training_pb2.TrainParams:
    params = training_pb2.TrainParams()
    given: dict[str, Any] = dict(options)
    betas = options.get("betas")
    if betas is not None:
        if len(betas) != 2:
            reject("betas", betas, "two numbers")
        given["beta1"], given["beta2"] = betas
    for name, enum, prefix in _ENUMS:
        setattr(params, name, enum_value(enum, prefix, given.get(name), name))
    fill(params, given, (*_PARAMS, "beta1", "beta2"))
    return params


def on_disconnect(word: str | None) -> Any:
    """The enum's number."""
    return enum_value(training_pb2.OnDisconnect, "ON_DISCONNECT_", word, "on_disconnect")


def adapt_request(
    examples: ExampleSource, model: str, adapter: str, options: AdaptOptions
) -> training_pb2.AdaptRequest:
    """The request of ``adapt``."""
    check_options("adapt", options, AdaptOptions)
    request = training_pb2.AdaptRequest(
        request_id=new_request_id(options.get("request_id")),
        model=model,
        adapter=adapter,
        lora=_lora(options),
        examples=to_examples(examples),
        loss_on=enum_value(training_pb2.LossOn, "LOSS_ON_", options.get("loss_on"), "loss_on"),
        optimizer=enum_value(training_pb2.Optimizer, "OPTIMIZER_", options.get("optimizer"), "optimizer"),
        probe_prompts=[to_prompt(prompt) for prompt in _probes(options.get("probe_prompts"))],
    )
    fill(request, options, _ADAPT)
    return request


def _probes(prompts: object) -> Sequence[Prompt]:
    """The prompts. A str or token ids would pass as a sequence of prompts, each of one character or id."""
    if prompts is None:
        return ()
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or any(isinstance(p, int) for p in prompts):
        reject("probe_prompts", prompts, "a list of prompts")
    return prompts


def from_adaptation(response: training_pb2.AdaptResponse) -> Adaptation:
    """What ``adapt`` returns."""
    return Adaptation(
        loss_before=response.loss_before,
        loss_after=response.loss_after,
        version=optional(response, "version"),
        steps=response.steps,
        stop_reason=enum_word(training_pb2.StopReason, "STOP_REASON_", response.stop_reason),
        kl=optional(response, "kl"),
        num_tokens=response.num_tokens,
        num_loss_tokens=response.num_loss_tokens,
        num_truncated=response.num_truncated,
        seconds=known_seconds(response, "duration"),
    )


# -------------------------------------------------------------------------------------------------------------- runs


def run_state(word: str | None) -> Any:
    """The enum's number."""
    return enum_value(training_pb2.RunState, "RUN_STATE_", word, "state")


def from_run(run: training_pb2.Run) -> RunInfo:
    """The archive's record of a run."""
    return RunInfo(
        id=run.run_id,
        state=enum_word(training_pb2.RunState, "RUN_STATE_", run.state),
        model=run.config.model,
        adapter=run.config.adapter,
        config=_from_config(run.config),
        created_at=moment(run, "create_time"),
        started_at=moment(run, "start_time"),
        ended_at=moment(run, "end_time"),
        step=run.step,
        total_steps=optional(run, "total_steps"),
        loss=optional(run, "loss"),
        base_nll=optional(run, "base_nll"),
        final_nll=optional(run, "final_nll"),
        best_nll=optional(run, "best_nll"),
        best_step=optional(run, "best_step"),
        version=optional(run, "version"),
        error=_from_error(run.error) if run.HasField("error") else None,
    )


def _from_config(config: training_pb2.TrainConfig) -> dict[str, Any]:
    """The options of ``train`` by their names there."""
    options: dict[str, Any] = {"request_id": config.request_id, "model": config.model, "adapter": config.adapter}
    if config.HasField("init_adapter"):
        options["init_adapter"] = config.init_adapter.name
        options["init_adapter_version"] = optional(config.init_adapter, "version")
    for message, names in ((config.lora, _LORA), (config.params, _PARAMS), (config, ("eval_fraction",))):
        for name in names:
            if name in ("target_modules", "target_parameters", "layers"):
                options[name] = list(getattr(message, name)) or None
            else:
                options[name] = optional(message, name)
    beta1, beta2 = optional(config.params, "beta1"), optional(config.params, "beta2")
    options["betas"] = None if beta1 is None or beta2 is None else (beta1, beta2)
    for name, enum, prefix in _ENUMS:
        options[name] = enum_word(enum, prefix, getattr(config.params, name)) or None
    options["on_disconnect"] = enum_word(training_pb2.OnDisconnect, "ON_DISCONNECT_", config.on_disconnect) or None
    return {name: value for name, value in options.items() if value is not None}


def _from_error(error: training_pb2.RunError) -> RunError:
    code = GRPC_CODES[error.code] if 0 <= error.code < len(GRPC_CODES) else str(error.code)
    return RunError(code=code, reason=error.reason, message=error.message)


# ------------------------------------------------------------------------------------------------------------ events


class RunReader:
    """Makes typed events of a run's stream.

    Attributes:
        run_id: "" until it is known.
        finished: the terminal event, once it has come.

    Args:
        call: name of the RPC.
        ends_at_interruption: the stream of a run that was interrupted ends without a terminal event, and without error.
    """

    def __init__(self, call: str, request_id: str, run_id: str = "", *, ends_at_interruption: bool = False) -> None:
        self.request_id = request_id
        self.run_id = run_id
        self.finished: events.Finished | None = None
        self._call = call
        self._ends_at_interruption = ends_at_interruption

    def feed(
        self,
        response: training_pb2.TrainResponse | training_pb2.WatchRunResponse | training_pb2.ResumeRunResponse,
    ) -> list[events.TrainEvent]:
        """Takes the next response; returns the event that it brings.

        Raises:
            RunFailedError: the run could not go on.
        """
        message = response.event
        self.run_id = message.run_id or self.run_id
        if message.WhichOneof("event") == "failed":
            raise self._failure(message.failed)
        event = from_event(message)
        if isinstance(event, events.Finished):
            self.finished = event
        return [] if event is None else [event]

    def end(self) -> None:
        """Raises InternalError if the stream ended too early."""
        if self.finished is None and not self._ends_at_interruption:
            raise incomplete(self._call, self.request_id)

    def result(self) -> events.Finished:
        """The terminal event, after the end of the stream.

        Raises:
            UnavailableError: the run was interrupted and has none.
        """
        if self.finished is None:
            raise UnavailableError(
                f"run {self.run_id} was interrupted; resume goes on with it from its last checkpoint",
                reason="RUN_INTERRUPTED",
                request_id=self.request_id,
            )
        return self.finished

    def _failure(self, failed: training_pb2.RunFailed) -> RunFailedError:
        error = _from_error(failed.error)
        failure = RunFailedError(error.message, code=error.code, reason=error.reason, request_id=self.request_id)
        failure.run_id, failure.step = self.run_id, optional(failed, "step")
        return failure


def from_event(message: training_pb2.TrainEvent) -> events.TrainEvent | None:
    """A typed event; None for a kind that only a newer server knows."""
    common: dict[str, Any] = {
        "run_id": message.run_id,
        "sequence": message.sequence,
        "created_at": moment(message, "create_time"),
    }
    match message.WhichOneof("event"):
        case "started":
            return _from_started(message.started, common)
        case "step":
            return _from_step(message.step, common)
        case "evaluation":
            evaluation = message.evaluation
            return events.Evaluation(
                **common,
                step=evaluation.step,
                nll=evaluation.nll,
                num_loss_tokens=evaluation.num_loss_tokens,
                is_best=evaluation.is_best,
                seconds=known_seconds(evaluation, "duration"),
            )
        case "checkpoint":
            checkpoint = message.checkpoint
            return events.Checkpoint(
                **common,
                step=checkpoint.step,
                path=checkpoint.path,
                is_best=checkpoint.is_best,
                seconds=known_seconds(checkpoint, "duration"),
            )
        case "published":
            published = message.published
            return events.Published(**common, step=published.step, adapter=published.adapter, version=published.version)
        case "warning":
            warning = message.warning
            return events.Warned(
                **common, step=optional(warning, "step"), reason=warning.reason, message=warning.message
            )
        case "finished":
            return _from_finished(message.finished, common)
        case _:
            return None


def _from_started(started: training_pb2.RunStarted, common: dict[str, Any]) -> events.RunStarted:
    dataset = started.dataset
    return events.RunStarted(
        **common,
        num_trainable_parameters=started.num_trainable_parameters,
        num_examples=dataset.num_examples,
        num_eval_examples=dataset.num_eval_examples,
        num_tokens=dataset.num_tokens,
        num_loss_tokens=dataset.num_loss_tokens,
        num_rejected=dataset.num_rejected,
        rejected=[
            events.RejectedExample(
                split=enum_word(training_pb2.Split, "SPLIT_", rejected.split),
                index=rejected.index,
                reason=rejected.reason,
                message=rejected.message,
            )
            for rejected in dataset.rejected
        ],
        num_truncated=dataset.num_truncated,
        target_modules=list(started.target_modules),
        target_parameters=list(started.target_parameters),
        total_steps=started.total_steps,
        resumed_from_step=started.resumed_from_step,
        forward_difference=optional(started, "forward_difference"),
        estimated_memory_bytes=optional(started, "estimated_memory_bytes"),
    )


def _from_step(step: training_pb2.RunStep, common: dict[str, Any]) -> events.Step:
    return events.Step(
        **common,
        step=step.step,
        epoch=step.epoch,
        loss=step.loss,
        learning_rate=step.learning_rate,
        grad_norm=optional(step, "grad_norm"),
        num_tokens=step.num_tokens,
        num_loss_tokens=step.num_loss_tokens,
        tokens_per_second=optional(step, "tokens_per_second"),
        step_seconds=seconds(step, "step_duration"),
        eta_seconds=seconds(step, "eta"),
        peak_memory_bytes=optional(step, "peak_memory_bytes"),
        skipped=step.skipped,
        kl=optional(step, "kl"),
    )


def _from_finished(finished: training_pb2.RunFinished, common: dict[str, Any]) -> events.Finished:
    return events.Finished(
        **common,
        step=finished.step,
        stop_reason=enum_word(training_pb2.StopReason, "STOP_REASON_", finished.stop_reason),
        base_nll=optional(finished, "base_nll"),
        final_nll=optional(finished, "final_nll"),
        best_nll=optional(finished, "best_nll"),
        best_step=optional(finished, "best_step"),
        version=optional(finished, "version"),
        adapter_path=finished.adapter_path,
        checkpoint_path=finished.checkpoint_path,
        seconds=seconds(finished, "duration"),
        num_tokens=finished.num_tokens,
        kl=optional(finished, "kl"),
    )


__all__ = [
    "RunReader",
    "adapt_request",
    "from_adaptation",
    "from_event",
    "from_run",
    "on_disconnect",
    "run_state",
    "train_requests",
]
