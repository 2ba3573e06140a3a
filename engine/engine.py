"""The engine: models in memory, requests, jobs. Usable in one process, without a server.

engine = Engine(EngineConfig(state_dir="/var/lib/whet"))
engine.load_model("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
engine.add_request(Request(request_id="1", model="smollm2", prompt_token_ids=[1, 2, 3]))
while engine.has_requests():
    for output in engine.step():
        print(output.token_ids)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from engine.config import EngineConfig
from engine.core.job_loop import JobLoop
from engine.core.loaded import LoadedModel
from engine.core.machine import usable_cores
from engine.core.model_loader import load_model
from engine.core.runner import Runner
from engine.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from engine.evaluation.embedding import embed
from engine.evaluation.perplexity import perplexity
from engine.info import AdapterInfo, EngineStats, ModelInfo
from engine.jobs import (
    EmbedSpec,
    JobEvent,
    JobFailed,
    JobSpec,
    MergeSpec,
    Pause,
    PerplexitySpec,
    QuantizeSpec,
    TrainSpec,
    WeightedAdapter,
)
from engine.lora.combine import combine_adapters
from engine.lora.peft_config import MAX_RANK
from engine.merge import merge
from engine.names import validate_name
from engine.ops import cpu
from engine.quantization.job import quantize
from engine.request import Request, RequestOutput
from engine.training.trainer import StopAndCheckpoint, train

JOB_KINDS: dict[type, str] = {
    TrainSpec: "train",
    QuantizeSpec: "quantize",
    MergeSpec: "merge",
    PerplexitySpec: "perplexity",
    EmbedSpec: "embed",
}


LULL_SECONDS = 1.0
"""For so long after the last step jobs go on in small pieces. Between two bursts of requests a piece of a whole layer
would begin that the next burst waits for, and so would one of its backward, which is cut as its forward was."""


class Engine:
    """Holds models and does all work on them, in the calling thread.

    Args:
        config: see EngineConfig.
        clock: seconds, by which steps and jobs are timed.
    Raises:
        InvalidArgumentError: the device is unknown or not there.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        num_threads = config.num_threads or usable_cores()
        torch.set_num_threads(num_threads)
        cpu.set_num_threads(num_threads)
        self._models: dict[str, LoadedModel] = {}
        self._clock = clock
        self._served_at = -math.inf
        self._jobs = JobLoop(
            config.job_slice_seconds,
            config.job_share,
            config.job_max_slowdown,
            clock,
            synchronize=torch.cuda.synchronize if self.device.type == "cuda" else None,
        )

    # ------------------------------------------------------------------------------------------------------- models

    def load_model(self, name: str, path: str | Path) -> ModelInfo:
        """Loads a Hugging Face directory, safetensors file or GGUF file under ``name``.

        Raises:
            AlreadyExistsError: the name is taken by another path.
            NotFoundError: there is nothing at the path.
            FormatError: what is there cannot be read.
            OutOfMemoryError: it does not fit.
        """
        validate_name(name, "model")
        if name in self._models:
            if self._models[name].info.path == str(path):
                return self._models[name].info
            raise AlreadyExistsError(f"model {name!r} is loaded, from {self._models[name].info.path}", field="model")
        loaded = load_model(name, Path(path), self.config, self.device, self.dtype)
        loaded.is_serving = self.is_serving
        self._models[name] = loaded
        return loaded.info

    def unload_model(self, name: str) -> None:
        """Frees a model.

        Raises:
            NotFoundError: it is not loaded.
            FailedPreconditionError: requests or jobs are using it.
        """
        loaded = self._model(name)
        if (loaded.runner is not None and loaded.runner.has_requests()) or self._jobs.uses(name):
            raise FailedPreconditionError(
                f"model {name!r} has running requests or jobs; wait for them or cancel them",
                field="model",
                reason="MODEL_BUSY",
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step that nobody waits for any more may be under way
        del self._models[name]

    def models(self) -> list[ModelInfo]:
        """All loaded models."""
        return [loaded.info for loaded in self._models.values()]

    # ----------------------------------------------------------------------------------------------------- requests

    def add_request(self, request: Request) -> None:
        """Enters a request; its outputs come from later steps.

        Raises:
            InvalidArgumentError: a field is out of its range; nothing was entered.
            NotFoundError: no such model, adapter or version.
            FailedPreconditionError: the model does not generate.
            OverloadedError: the queue is full.
        """
        if self._owner(request.request_id) is not None:
            raise AlreadyExistsError(f"request {request.request_id!r} is running", field="request_id")
        loaded = self._model(request.model)
        loaded.causal_lm()
        assert loaded.runner is not None
        loaded.runner.add(request)

    def abort(
        self, request_id: str, index: int | None = None, reason: Literal["cancelled", "stop"] = "cancelled"
    ) -> list[RequestOutput]:
        """Ends a request, or one completion of it, and frees its blocks; no output of it comes from later steps.

        Unknown ids, and completions that have ended, are ignored: they may just have.

        Args:
            index: of the one completion to end; None: all that have not ended.
            reason: "cancelled": nobody wants it any more. "stop": its text is complete, as far as the caller can tell.

        Returns: with "stop", the last output of each completion that this ended; it has no further tokens.
        """
        runner = self._owner(request_id)
        return [] if runner is None else runner.abort(request_id, index, reason)

    def has_requests(self) -> bool:
        """Whether step has work."""
        return any(m.runner is not None and m.runner.has_requests() for m in self._models.values())

    def only_decodes(self) -> bool:
        """Whether all that comes before the next outputs is a token for each completion: no prompt, no job's slice."""
        runners = [loaded.runner for loaded in self._models.values() if loaded.runner is not None]
        return not self.has_jobs() and all(runner.only_decodes() for runner in runners)

    def step(self) -> list[RequestOutput]:
        """One batch of each model that has requests."""
        begin = self._clock()
        outputs: list[RequestOutput] = []
        for loaded in self._models.values():
            if loaded.runner is not None and loaded.runner.has_requests():
                # A slice of a job would lie between a step that is under way and the reading of its tokens.
                outputs.extend(loaded.runner.step(overlap=not self._jobs))
                self._served_at = self._clock()
        self._jobs.served(self._clock() - begin)
        return outputs

    def is_serving(self) -> bool:
        """Whether step has work, or had some within LULL_SECONDS."""
        return self.has_requests() or self._clock() - self._served_at < LULL_SECONDS

    # --------------------------------------------------------------------------------------------------------- jobs

    def start_job(self, spec: JobSpec) -> None:
        """Enters a job; its events come from advance_jobs.

        Raises:
            NotFoundError: no such model or adapter.
            AlreadyExistsError: a job of that id is running.
        """
        loaded = self._model(spec.model)
        slices = self._slices(spec, loaded)
        names = {spec.adapter, spec.init_adapter} - {None} if isinstance(spec, TrainSpec) else set()
        self._jobs.start(
            spec.job_id,
            JOB_KINDS[type(spec)],
            spec.model,
            slices,
            holds=_adapters_of(spec, loaded),
            trains={name for name in names if name is not None},
        )

    def _slices(self, spec: JobSpec, loaded: LoadedModel) -> Iterator[JobEvent | Pause | None]:
        if isinstance(spec, TrainSpec):
            return train(spec, loaded)
        if isinstance(spec, QuantizeSpec):
            return quantize(spec, loaded, Path(loaded.info.tokenizer_path), self.load_model)
        if isinstance(spec, MergeSpec):
            return merge(spec, loaded, Path(loaded.info.tokenizer_path), self.load_model)
        if isinstance(spec, PerplexitySpec):
            return perplexity(spec, loaded)
        return embed(spec, loaded)

    def cancel_job(self, job_id: str) -> JobFailed:
        """Ends a job and returns its terminal event.

        Raises:
            NotFoundError: it is not running.
        """
        return self._jobs.cancel(job_id)

    def checkpoint_jobs(self) -> list[JobEvent]:
        """Ends training runs with a checkpoint from which they can resume; other jobs go on. For a drain."""
        return self._jobs.interrupt(JOB_KINDS[TrainSpec], StopAndCheckpoint())

    def has_jobs(self) -> bool:
        """Whether advance_jobs has work."""
        return len(self._jobs) > 0

    def advance_jobs(self) -> list[JobEvent]:
        """Runs the slices that are due; returns their events."""
        return self._jobs.advance(self.has_requests())

    # ----------------------------------------------------------------------------------------------------- adapters

    def adapters(self, model: str | None = None) -> list[AdapterInfo]:
        """Every version of every adapter, of one model or of all."""
        chosen = [self._model(model)] if model is not None else list(self._models.values())
        return [info for loaded in chosen for info in loaded.adapters.list()]

    def load_adapter(self, model: str, name: str, path: str | Path, *, force: bool = False) -> AdapterInfo:
        """Loads a PEFT directory that the operator names; it is not copied into the store.

        Args:
            force: also one that was trained on other base weights, if the shapes fit.
        """
        return self._model(model).adapters.add_from_path(validate_name(name, "adapter"), Path(path), force=force)

    def import_adapter(self, model: str, name: str, staged_dir: str | Path, *, force: bool = False) -> AdapterInfo:
        """Checks an uploaded PEFT directory and publishes it as a new version; the staged directory is used up.

        Args:
            force: also one that was trained on other base weights, if the shapes fit.
        """
        return self._model(model).adapters.import_staged(validate_name(name, "adapter"), Path(staged_dir), force=force)

    def load_adapter_version(
        self, model: str, name: str, version: int | None = None, *, force: bool = False
    ) -> AdapterInfo:
        """Loads a stored version and makes it the live one; None: the newest.

        Args:
            force: also one that was trained on other base weights, if the shapes fit.
        """
        return self._model(model).adapters.load(name, version, force=force)

    def unload_adapter(self, model: str, name: str) -> None:
        """Drops an adapter from memory; it stays on disk. Requests in flight keep theirs."""
        self._model(model).adapters.unload(name)

    def delete_adapter(self, model: str, name: str, version: int | None = None) -> None:
        """Deletes a version, or all of them, from disk."""
        self._model(model).adapters.delete(name, version)

    def rename_adapter(self, model: str, name: str, new_name: str, *, on_disk: bool = True) -> None:
        """Gives an adapter another name; see AdapterStore.rename. Requests in flight keep what they have.

        Raises:
            FailedPreconditionError: a run trains one of the two, or goes on from the first.
        """
        for field, each in (("name", name), ("new_name", new_name)):
            job_id = self._jobs.trainer_of(model, each)
            if on_disk and job_id is not None:
                raise FailedPreconditionError(
                    f"{field} is {each!r}, with which run {job_id} works; wait for it or cancel it",
                    field=field,
                    reason="ADAPTER_BUSY",
                )
        self._model(model).adapters.rename(name, new_name, on_disk=on_disk)

    def prune_adapters(
        self,
        model: str,
        name: str | None,
        keep_last: int,
        *,
        keep: Collection[tuple[str, int]] = (),
        dry_run: bool = False,
    ) -> list[AdapterInfo]:
        """Deletes the versions that nothing needs; see AdapterStore.prune. Those of requests and jobs are kept."""
        needed = {*keep, *self.adapters_in_use(model)}
        return list(self._model(model).adapters.prune(name, keep_last, keep=needed, dry_run=dry_run))

    def adapters_in_use(self, model: str) -> list[tuple[str, int]]:
        """Names and versions of the adapters of requests and jobs."""
        loaded = self._model(model)
        held = self._jobs.holds(model) | (loaded.runner.adapters_held() if loaded.runner is not None else set())
        return sorted(held)

    def combine_adapters(
        self,
        model: str,
        name: str,
        sources: Sequence[WeightedAdapter],
        method: str = "cat",
        *,
        force: bool = False,
        max_rank: int = MAX_RANK,
    ) -> AdapterInfo:
        """Makes a new version of ``name`` from several adapters; see engine.lora.combine."""
        adapters = self._model(model).adapters
        return combine_adapters(adapters, name, sources, method, force=force, max_rank=max_rank)

    def adapter_path(self, model: str, name: str, version: int | None = None) -> Path:
        """The PEFT directory of a version; None: the live one."""
        return self._model(model).adapters.path(name, version)

    # -------------------------------------------------------------------------------------------------------- stats

    def stats(self) -> EngineStats:
        """Gauges, counters, and what was observed since the last call."""
        share, slices = self._jobs.drain_stats()
        return EngineStats(
            models=[m.runner.drain_stats() for m in self._models.values() if m.runner is not None],
            job_share=share,
            job_slice_seconds=slices,
            job_gap_seconds=self._jobs.gap_seconds if self._jobs else None,
        )

    def _owner(self, request_id: str) -> Runner | None:
        """The runner in which that request is live."""
        runners = (loaded.runner for loaded in self._models.values())
        return next((r for r in runners if r is not None and r.is_live(request_id)), None)

    def _model(self, name: str) -> LoadedModel:
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none"
            raise NotFoundError(
                f"model {name!r} is not loaded; loaded: {known}", field="model", reason="MODEL_NOT_FOUND"
            )
        return self._models[name]


def _adapters_of(spec: JobSpec, loaded: LoadedModel) -> list[tuple[str, int]]:
    """Names and versions of the adapters that a job reads."""
    match spec:
        case TrainSpec(init_adapter=str(name), init_adapter_version=version):
            pass
        case PerplexitySpec(adapter=str(name), adapter_version=version):
            pass
        case EmbedSpec(adapter=str(name), adapter_version=version):
            pass
        case _:
            return []
    if version is None:
        try:
            version = loaded.adapters.get(name).version
        except NotFoundError:
            return []  # a run that resumes from a checkpoint does without the adapter that it began with
    return [(name, version)]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device is {name!r}; accepted: auto, cpu, cuda, cuda:N", field="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgumentError(
            f"device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices", field="device"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        # Of the narrow types, CPUs without AMX multiply none faster than float32.
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise InvalidArgumentError(f"dtype is {name!r}; accepted: auto, {', '.join(dtypes)}", field="dtype")
    return dtypes[name]
