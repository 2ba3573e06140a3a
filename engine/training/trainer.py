"""A LoRA run: autograd over the weights that are being served, in slices between which serving goes on.

The base weights are never written; gradients exist for A and B alone. The run pauses before each decoder layer of a
micro-batch's forward and backward, before each part of its loss, and around optimizer steps, publications and
checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.core.heap import freed_memory_kept
from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, OutOfMemoryError, TrainingError
from engine.jobs import (
    JobFailed,
    JobWarning,
    Pause,
    Slices,
    TrainCheckpoint,
    TrainEvaluation,
    TrainFinished,
    TrainPublished,
    TrainSpec,
    TrainStarted,
    TrainStep,
)
from engine.lora.adapter import Adapter
from engine.lora.targets import kinds
from engine.names import validate_name
from engine.ops.cpu import results_apart
from engine.training.adaptation import BoundedSteps
from engine.training.batching import BatchOrder, MicroBatch, micro_batches
from engine.training.checkpoint import Checkpoints
from engine.training.dataset import Example, read_dataset
from engine.training.forward import TrainingForward, resolve_dtype
from engine.training.lora_init import masters
from engine.training.optimizer import Optimizer, learning_rate
from engine.training.params import validate_params
from engine.training.passes import accumulate_gradients, mean_nll
from engine.training.progress import Progress, peak_memory_bytes, reset_peak_memory
from engine.training.proof import probe, prove_forward
from engine.training.seeds import derive_seed
from engine.training.setup import begin_or_resume, load_masters, plan_steps, validate_dataset

MAX_CONSECUTIVE_SKIPS = 3


class StopAndCheckpoint(Exception):
    """Thrown into a run's generator, ends it so that it can be resumed: the generator yields TrainCheckpoint of the
    last completed step, then JobFailed with code "cancelled" and reason "INTERRUPTED"."""


def train(spec: TrainSpec, loaded: LoadedModel) -> Slices:
    """Trains an adapter, or goes on from the last checkpoint below ``spec.run_dir``.

    Closing the generator cancels the run; its checkpoints stay as they are. See StopAndCheckpoint for a drain.

    Returns: a generator that yields between pieces of work: a Pause, None, or an event. First TrainStarted, a TrainStep
        0 with the base loss (not when resuming after it) and the base's TrainEvaluation; last TrainFinished.
    Raises:
        InvalidArgumentError: a parameter is out of its range, an unknown target module or layer, a bad token id.
        OutOfRangeError: an example is longer than max_seq_len or the model's positions.
        FormatError: the dataset or the checkpoint is malformed.
        NotFoundError: no such init_adapter.
        FailedPreconditionError: the model is an encoder, or resident in a type that cannot be trained over; there is no
            state directory; the checkpoint is of another configuration; or the run does not fit into memory.
        TrainingError: from the generator: training and serving forward differ, three steps in a row were not finite, or
            the weights to be published have no finite held-out NLL where the base has one.
    """
    return _Run(spec, loaded).slices()


class _Run:
    """One run in one process. ``_state``, the masters and the optimizer change together, between two yields."""

    def __init__(self, spec: TrainSpec, loaded: LoadedModel) -> None:
        self._spec = spec
        self._params = params = spec.params
        self._loaded = loaded
        loaded.causal_lm()
        validate_name(spec.adapter, "adapter")
        validate_params(params)
        if not loaded.adapters.can_publish:
            raise FailedPreconditionError("the engine has no state directory to publish to", reason="NO_STATE_DIR")
        self._forward = TrainingForward(
            loaded, resolve_dtype(params.compute_dtype, loaded.dtype), recomputes=params.activation_checkpointing
        )
        self._dataset = read_dataset(Path(spec.dataset_path))
        validate_dataset(self._dataset, spec, loaded)
        self._order = BatchOrder(len(self._dataset.train), params.batch_size, params.seed, params.shuffle)
        self._total_steps, self._ends_by = plan_steps(params, self._order.steps_per_epoch)
        self._checkpoints = Checkpoints(
            Path(spec.run_dir) / "checkpoints", loaded.info.name, loaded.model.lora_targets()
        )
        beginning = begin_or_resume(spec, self._dataset, loaded, self._forward.dtype, self._checkpoints)
        self._estimate = beginning.memory
        self._adapter, self._state = beginning.adapter, beginning.state
        self._checkpointed_step = beginning.checkpointed_step
        self._resumed_from = self._state.step
        self._optimizer = Optimizer(masters(self._adapter), params)
        self._optimizer.load_state(beginning.optimizer_state)
        self._progress = Progress(self._state.seconds)
        self._bounded = None
        if spec.bound is not None:
            self._bounded = BoundedSteps(spec.bound, loaded, self._state.micro_batch_tokens)
        self._at_bound = False

    # ---------------------------------------------------------------------------------------------------- the run

    def slices(self) -> Slices:
        """The run from where it stands to its end."""
        self._progress.start()
        reset_peak_memory(self._loaded.device)
        try:
            with freed_memory_kept(), results_apart():
                yield from self._run()
        except StopAndCheckpoint:
            if self._checkpointed_step != self._state.step:
                yield self._checkpoint(is_best=False)
            yield JobFailed(
                job_id=self._spec.job_id,
                error_code="cancelled",
                error_message=f"the run was interrupted after step {self._state.step}; it can be resumed",
                error_reason="INTERRUPTED",
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"the run does not fit into device memory: {error}") from error
        finally:
            self._free()

    def _run(self) -> Slices:
        yield from self._prove_forward()
        if self._state.step == 0:
            yield from self._base_step()
        while True:
            yield from self._after_step()
            stop_reason = self._stop_reason()
            if stop_reason is not None:
                break
            yield from self._step()
        yield from self._finish(stop_reason)

    def _prove_forward(self) -> Slices:
        """Refuses to train where the training forward is not the serving forward."""
        batches = self._batches(self._batch(self._state.step + 1), self._params.gradient_accumulation_steps)
        adapter = probe(self._adapter, self._params.seed)
        difference = yield from prove_forward(
            self._forward, self._loaded, batches, adapter, self._params.forward_tolerance
        )
        train = self._dataset.train
        modules, parameters = kinds(self._adapter.modules, self._loaded.model.lora_targets())
        yield TrainStarted(
            job_id=self._spec.job_id,
            num_trainable_parameters=self._adapter.num_parameters(),
            num_examples=len(train),
            num_eval_examples=len(self._dataset.evaluation),
            num_tokens=train.num_tokens,
            num_loss_tokens=train.num_loss_tokens,
            target_modules=modules,
            target_parameters=parameters,
            total_steps=self._total_steps,
            resumed_from_step=self._resumed_from,
            forward_difference=difference,
            estimated_memory_bytes=self._estimate.num_bytes,
        )

    def _base_step(self) -> Slices:
        """Step 0: the loss of the first batch before any training."""
        examples = self._batch(1)
        begin = time.monotonic()
        nll = yield from mean_nll(self._forward, self._batches(examples), self._adapter)
        seconds = time.monotonic() - begin
        yield self._step_event(0, examples, nll, 0.0, None, seconds)

    def _step(self) -> Slices:
        """One optimizer step."""
        state, params = self._state, self._params
        step = state.step + 1
        begin = time.monotonic()
        examples = self._batch(step)
        num_loss_tokens = sum(example.num_loss_tokens for example in examples)
        generator = None
        if self._adapter.dropout > 0.0:
            generator = torch.Generator(self._loaded.device).manual_seed(derive_seed(params.seed, "dropout", step))
        batches = self._batches(examples, params.gradient_accumulation_steps)
        total = yield from accumulate_gradients(self._forward, batches, self._adapter, num_loss_tokens, generator)
        yield Pause("update", 1)
        rate = learning_rate(params, step, self._total_steps)
        norm = self._optimizer.clip() if math.isfinite(total) else None
        skipped = norm is None or not math.isfinite(norm)
        taken = None
        if not skipped and self._bounded is not None:
            taken = yield from self._bounded.step(self._optimizer, self._adapter, rate)
            self._at_bound = taken is None
        elif not skipped:
            self._optimizer.step(rate)
        self._optimizer.zero_grad()
        if self._at_bound or (taken is not None and taken.halvings):
            assert self._bounded is not None
            yield self._warning("MAX_KL", self._bounded.describe(step, taken))
        if self._at_bound:
            return
        state.step = step
        state.consecutive_skips = state.consecutive_skips + 1 if skipped else 0
        state.num_tokens += sum(len(example) for example in examples)
        seconds = time.monotonic() - begin
        self._progress.observe_step(seconds)
        kl = None if taken is None else taken.kl
        yield self._step_event(step, examples, total / num_loss_tokens, rate, norm, seconds, skipped, kl)
        if skipped:
            yield from self._after_skip(total / num_loss_tokens, norm)

    def _after_skip(self, loss: float, norm: float | None) -> Slices:
        state = self._state
        what = f"the loss is {loss}" if norm is None else f"the gradient norm is {norm}"
        yield self._warning("NON_FINITE_STEP", f"step {state.step} was skipped: {what}")
        if state.consecutive_skips < MAX_CONSECUTIVE_SKIPS:
            return
        # A skipped step changes no weights, so these are still the last good ones.
        yield self._checkpoint(is_best=False)
        raise TrainingError(
            f"{state.consecutive_skips} steps in a row were not finite, of the last {what}; the weights before them "
            f"are in {self._checkpoints.path(state.step)}",
            reason="NON_FINITE",
        )

    def _after_step(self) -> Slices:
        """What is due after the present step and not done yet: evaluation, publication, checkpoint."""
        state, params = self._state, self._params
        is_last = self._stop_reason() is not None
        evaluates = state.step == 0 or is_last or _due(params.eval_every, state.step)
        if evaluates and len(self._dataset.evaluation) and state.evaluated_step < state.step:
            yield from self._evaluate()
            is_last = self._stop_reason() is not None
        if _due(params.publish_every, state.step) and state.published_step < state.step and not is_last:
            if self._is_broken(state.last_nll):
                message = f"the last held-out NLL, after step {state.evaluated_step}, is {state.last_nll}"
                yield self._warning(
                    "NOT_PUBLISHED", f"the weights after step {state.step} are not published: {message}"
                )
            else:
                yield self._publish(self._adapter, state.last_nll if state.evaluated_step == state.step else None)
        if (is_last or _due(params.checkpoint_every, state.step)) and self._checkpointed_step != state.step:
            yield self._checkpoint(is_best=False)

    def _stop_reason(self) -> str | None:
        patience = self._params.early_stopping_patience
        if self._state.step >= self._total_steps:
            return self._ends_by
        if self._at_bound:
            return "max_kl"
        if patience and self._state.evaluations_without_improvement >= patience:
            return "early_stopping"
        return None

    def _evaluate(self) -> Slices:
        state = self._state
        begin = time.monotonic()
        nll = yield from mean_nll(self._forward, self._batches(self._dataset.evaluation), self._adapter)
        is_best = math.isfinite(nll) and (state.best_nll is None or nll < state.best_nll)
        state.evaluated_step = state.step
        state.last_nll = nll
        if state.step == 0:
            state.base_nll = nll
        if is_best:
            state.best_nll, state.best_step = nll, state.step
        # The base is what improvement is measured from, not an improvement.
        state.evaluations_without_improvement = 0 if is_best else state.evaluations_without_improvement + 1
        yield TrainEvaluation(
            job_id=self._spec.job_id,
            step=state.step,
            nll=nll,
            num_loss_tokens=self._dataset.evaluation.num_loss_tokens,
            is_best=is_best,
            seconds=time.monotonic() - begin,
        )
        if is_best:
            yield self._checkpoint(is_best=True)
        if not math.isfinite(nll):
            message = f"the held-out NLL after step {state.step} is {nll}; it counts as no improvement"
            yield self._warning("NON_FINITE_EVALUATION", message)

    def _finish(self, stop_reason: str) -> Slices:
        state = self._state
        adapter, nll = self._adapter, state.last_nll
        if self._params.publish == "best" and state.best_step is not None and state.best_step != state.step:
            adapter = load_masters(self._checkpoints.best, self._spec.adapter, self._loaded)
            nll = state.best_nll
            if state.best_step == 0:
                message = f"no evaluation was better than the base's ({state.base_nll:.4f}); what is published as best "
                yield self._warning("NO_IMPROVEMENT", message + "are the weights that the run began with")
        if self._is_broken(nll):
            raise TrainingError(
                f"the held-out NLL of the weights after step {state.step} is {nll}, so they are not published; they "
                f"are in {self._checkpoints.path(state.step)}",
                reason="NON_FINITE",
            )
        kl, version = None, None
        if self._bounded is not None:
            kl = yield from self._bounded.kl(adapter)
        if self._may_publish(kl):
            published = self._publish(adapter, nll)
            version = published.version
            yield published
        yield TrainFinished(
            job_id=self._spec.job_id,
            step=state.step,
            stop_reason=stop_reason,
            base_nll=state.base_nll,
            final_nll=state.last_nll,
            best_nll=state.best_nll,
            best_step=state.best_step,
            version=version,
            adapter_path="" if version is None else str(self._loaded.adapters.path(self._spec.adapter, version)),
            checkpoint_path=str(self._checkpoints.path(state.step)),
            seconds=self._progress.seconds,
            num_tokens=state.num_tokens,
            kl=None if version is None else kl,
        )

    def _is_broken(self, nll: float | None) -> bool:
        """Whether a held-out NLL tells of broken weights: it is not finite, though that of the base was."""
        base = self._state.base_nll
        return nll is not None and not math.isfinite(nll) and base is not None and math.isfinite(base)

    def _may_publish(self, kl: float | None) -> bool:
        """Whether the weights are within the bound. Those that the run began with are no result of it."""
        if self._bounded is None or self._bounded.max_kl is None:
            return True
        return self._state.step > 0 and kl is not None and kl <= self._bounded.max_kl

    # ------------------------------------------------------------------------------------------------------- pieces

    def _batch(self, step: int) -> list[Example]:
        return [self._dataset.train[index] for index in self._order.batch(step)]

    def _batches(self, examples: Sequence[Example], parts: int = 1) -> Iterator[MicroBatch]:
        return micro_batches(
            examples,
            max_tokens=self._state.micro_batch_tokens,
            parts=parts,
            packing=self._params.packing,
            device=self._loaded.device,
        )

    def _step_event(
        self,
        step: int,
        examples: list[Example],
        loss: float,
        rate: float,
        norm: float | None,
        seconds: float,
        skipped: bool = False,
        kl: float | None = None,
    ) -> TrainStep:
        num_tokens = sum(len(example) for example in examples)
        return TrainStep(
            job_id=self._spec.job_id,
            step=step,
            epoch=self._order.epoch_of(step),
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            num_tokens=num_tokens,
            num_loss_tokens=sum(example.num_loss_tokens for example in examples),
            tokens_per_second=num_tokens / seconds if seconds > 0.0 else None,
            step_seconds=seconds,
            eta_seconds=self._progress.eta_seconds(self._total_steps - step),
            peak_memory_bytes=peak_memory_bytes(self._loaded.device),
            skipped=skipped,
            kl=kl,
        )

    def _warning(self, reason: str, message: str) -> JobWarning:
        return JobWarning(job_id=self._spec.job_id, step=self._state.step, reason=reason, message=message)

    def _checkpoint(self, *, is_best: bool) -> TrainCheckpoint:
        begin = time.monotonic()
        self._state.seconds = self._progress.seconds
        path = self._checkpoints.write(self._adapter, self._optimizer.state(), self._state, is_best=is_best)
        self._checkpointed_step = self._state.step
        return TrainCheckpoint(
            job_id=self._spec.job_id,
            step=self._state.step,
            path=str(path),
            is_best=is_best,
            seconds=time.monotonic() - begin,
        )

    def _publish(self, adapter: Adapter, nll: float | None) -> TrainPublished:
        state = self._state
        parent = (state.parent_name, state.parent_version) if state.parent_name else None
        info = self._loaded.adapters.publish(
            adapter,
            run_id=self._spec.job_id,
            best_nll=nll,
            parent=parent,
            data_digest=self._dataset.train_digest,
        )
        state.published_step = state.step
        return TrainPublished(job_id=self._spec.job_id, step=state.step, adapter=info.name, version=info.version)

    def _free(self) -> None:
        """Lets go of masters, gradients and optimizer state, even where a traceback still holds this object."""
        self._optimizer.zero_grad()
        del self._optimizer, self._adapter
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
