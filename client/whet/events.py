"""The events of a training run. ``event.kind`` tells them apart."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event has.

    Attributes:
        sequence: from 0, without gaps, in the order of happening.
        created_at: in UTC.
    """

    run_id: str
    sequence: int
    created_at: datetime.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedExample:
    """Attributes: split: "train" or "eval"; index: position among the examples of its split."""

    split: str
    index: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """The run begins, or goes on after an interruption.

    Attributes:
        num_tokens, num_loss_tokens: of the training examples.
        num_rejected: examples that are not used; ``rejected`` has the first 100 of them, with reasons.
        num_truncated: examples that lost the left of their prompt to max_seq_len.
        resumed_from_step: 0 for a new run.
        forward_difference: largest absolute difference of logits, training against serving forward, first batch.
        estimated_memory_bytes: that the run adds at its peak to what is resident without it.
    """

    num_trainable_parameters: int
    num_examples: int
    num_eval_examples: int
    num_tokens: int
    num_loss_tokens: int
    num_rejected: int
    rejected: list[RejectedExample]
    num_truncated: int
    target_modules: list[str]
    target_parameters: list[str]
    total_steps: int
    resumed_from_step: int
    forward_difference: float | None
    estimated_memory_bytes: int | None
    kind: Literal["run_started"] = "run_started"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Event):
    """One optimizer step. Step 0 is the loss of the base, before any training.

    Attributes:
        loss: mean over the batch's loss tokens.
        grad_norm: before clipping; None at step 0.
        eta_seconds: until the last step.
        peak_memory_bytes: so far, weights and caches included: of the GPU's allocator, or on the CPU of the worker
            process's resident set; None where it is not known.
        skipped: the loss or the gradient was not finite; nothing was updated.
        kl: from the base, after the step; None but for runs of ``adapt`` with probes.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    num_tokens: int
    num_loss_tokens: int
    tokens_per_second: float | None
    step_seconds: float | None
    eta_seconds: float | None
    peak_memory_bytes: int | None
    skipped: bool
    kl: float | None
    kind: Literal["step"] = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Event):
    """On the held-out examples.

    Attributes:
        nll: mean over loss tokens.
        is_best: lowest so far.
    """

    step: int
    nll: float
    num_loss_tokens: int
    is_best: bool
    seconds: float
    kind: Literal["evaluation"] = "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Event):
    """A resumable checkpoint is safely on the server's disk."""

    step: int
    path: str
    is_best: bool
    seconds: float
    kind: Literal["checkpoint"] = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(Event):
    """From here on new requests for the adapter get this version."""

    step: int
    adapter: str
    version: int
    kind: Literal["published"] = "published"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something that a person should know. Attributes: reason: stable word in UPPER_SNAKE_CASE."""

    step: int | None
    reason: str
    message: str
    kind: Literal["warning"] = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The last event.

    Attributes:
        stop_reason: "max_steps", "epochs", "early_stopping", "max_kl" or "cancelled".
        base_nll, final_nll, best_nll, best_step: held-out; None where nothing was held out.
        version: of the adapter, now live; None if nothing was published.
        adapter_path, checkpoint_path: on the server, or "".
        kl: from the base, of what was published; None but for runs of ``adapt`` with probes.
    """

    step: int
    stop_reason: str
    base_nll: float | None
    final_nll: float | None
    best_nll: float | None
    best_step: int | None
    version: int | None
    adapter_path: str
    checkpoint_path: str
    seconds: float | None
    num_tokens: int
    kl: float | None
    kind: Literal["finished"] = "finished"


TrainEvent = RunStarted | Step | Evaluation | Checkpoint | Published | Warned | Finished
