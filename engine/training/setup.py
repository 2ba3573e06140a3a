"""What a run begins with: a dataset it can learn from, a number of steps, and weights, new or from a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.core.loaded import LoadedModel
from engine.errors import FailedPreconditionError, FormatError, InvalidArgumentError, OutOfRangeError
from engine.jobs import TrainParams, TrainSpec
from engine.lora.adapter import Adapter
from engine.lora.peft import load_adapter
from engine.lora.peft_config import read_config
from engine.training.checkpoint import Checkpoints, RunState
from engine.training.dataset import Dataset
from engine.training.lora_init import new_adapter, validate_lora
from engine.training.memory import MemoryEstimate, MemoryPlanner

CPU_MICRO_BATCH_TOKENS = 1024
"""Of one forward on the CPU. What an operation costs whatever its rows, and the unpacking of a weight, are paid once a
forward: a LoRA step of 4 x 256 tokens of SmolLM2-135M Q4_1 on q and v took 8.4 s of a core's time with 256 in one, 7.8
with 512, 6.8 to 7.5 with 1,024. Beside requests a piece is one product or attention over so many tokens;
gradient_accumulation_steps makes it shorter."""


def validate_dataset(dataset: Dataset, spec: TrainSpec, loaded: LoadedModel) -> None:
    """Checks the examples against the model and max_seq_len.

    Raises:
        InvalidArgumentError: there is no training example, or a token id is out of range.
        OutOfRangeError: an example is too long.
        FormatError: an example has no token to learn.
    """
    if len(dataset.train) == 0:
        raise InvalidArgumentError("the dataset has no training examples; accepted: at least one", field="examples")
    limit = min(spec.params.max_seq_len, loaded.config.max_position_embeddings)
    vocab_size = loaded.config.vocab_size
    for split, examples in (("train", dataset.train), ("evaluation", dataset.evaluation)):
        if examples.longest > limit:
            raise OutOfRangeError(
                f"an example of {split} has {examples.longest} tokens; accepted: at most {limit} "
                f"(max_seq_len is {spec.params.max_seq_len}, the model has "
                f"{loaded.config.max_position_embeddings} positions)",
                field="params.max_seq_len",
            )
        if not len(examples):
            continue
        low, high = int(examples.token_ids.min()), int(examples.token_ids.max())
        if low < 0 or high >= vocab_size:
            raise InvalidArgumentError(
                f"{split} has the token id {low if low < 0 else high}; accepted: [0, {vocab_size})", field="examples"
            )
        if any(example.num_loss_tokens == 0 for example in examples):
            raise FormatError(f"{split} has an example without tokens to learn; accepted: at least one in each")


def plan_steps(params: TrainParams, steps_per_epoch: int) -> tuple[int, str]:
    """Optimizer steps at most, and what ends the run there."""
    limits = []
    if params.epochs is not None:
        limits.append((max(1, math.ceil(params.epochs * steps_per_epoch - 1e-9)), "epochs"))
    if params.max_steps is not None:
        limits.append((params.max_steps, "max_steps"))
    return min(limits)


def default_micro_batch_tokens(loaded: LoadedModel) -> int:
    """Tokens of one forward, where memory allows: from the configuration, not from the clock. A run keeps what it began
    with, so that it cuts alike when it is resumed."""
    limit = loaded.engine_config.max_batch_tokens
    return min(limit, CPU_MICRO_BATCH_TOKENS) if loaded.device.type == "cpu" else limit


def fingerprint(spec: TrainSpec, dataset: Dataset, loaded: LoadedModel) -> str:
    """Digest of all that determines the run's numbers: configuration, data and base weights."""
    params = dataclasses.asdict(spec.params)
    del params["activation_checkpointing"]  # changes no number: a run that did not fit may go on with it
    init = None if spec.init_adapter is None else [spec.init_adapter, spec.init_adapter_version]
    described = [
        params,
        dataclasses.asdict(spec.lora) if init is None else init,
        dataset.digest,
        loaded.info.weights_digest,
    ]
    if spec.bound is not None:
        described.append(dataclasses.asdict(spec.bound))
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def load_masters(path: Path, name: str, loaded: LoadedModel) -> Adapter:
    """An adapter from its PEFT files, as float32 parameters that require gradients."""
    stored = load_adapter(path, loaded.model.lora_targets(), name=name, device=loaded.device, dtype=torch.float32)
    modules = {module: (nn.Parameter(a), nn.Parameter(b)) for module, (a, b) in stored.modules.items()}
    return replace(stored, modules=modules, dropout=read_config(path).dropout)  # type: ignore[arg-type]


@dataclass(slots=True)
class Beginning:
    """Where a run stands when its process takes it up.

    Attributes:
        adapter: the masters.
        optimizer_state: as Optimizer.state gave it; of a new run, nothing.
        memory: that it will take.
        checkpointed_step: of the checkpoint that this comes from; -1 for a new run.
    """

    adapter: Adapter
    state: RunState
    optimizer_state: dict[str, Tensor]
    memory: MemoryEstimate
    checkpointed_step: int = -1


def begin_or_resume(
    spec: TrainSpec, dataset: Dataset, loaded: LoadedModel, dtype: torch.dtype, checkpoints: Checkpoints
) -> Beginning:
    """The state of the last checkpoint, or of a new run.

    Args:
        dtype: that the run computes in.
    Raises:
        FailedPreconditionError: the checkpoint is of another configuration, or the run does not fit into memory.
        FormatError: the checkpoint is malformed.
        InvalidArgumentError: the shape of the new adapter does not fit the model.
        NotFoundError: no such init_adapter.
    """
    digest = fingerprint(spec, dataset, loaded)
    checkpoints.clear_unfinished()
    latest = checkpoints.read_latest()
    if latest is not None:
        state, path, optimizer_state = latest
        if state.fingerprint != digest:
            raise FailedPreconditionError(
                f"{path} is of a run with another configuration, data or base model; accepted: the same ones",
                field="run_dir",
                reason="CHECKPOINT_MISMATCH",
            )
        adapter = load_masters(path, spec.adapter, loaded)
        memory = MemoryPlanner(spec, dataset, loaded, adapter, dtype).fit(state.micro_batch_tokens, fixed=True)
        return Beginning(adapter, state, optimizer_state, memory, state.step)

    state = RunState(fingerprint=digest)
    if spec.init_adapter is not None:
        name, version = spec.init_adapter, spec.init_adapter_version
        if version is not None:
            name, version = loaded.adapters.present(
                name, version
            )  # it may have been renamed since the run was asked for
        init = loaded.adapters.get(name, version)
        state.parent_name, state.parent_version = init.name, init.version
        # From the file: in memory it may be rounded to the model's type.
        path = loaded.adapters.path(init.name, init.version)
        shape = replace(init, dropout=read_config(path).dropout)
    else:
        validate_lora(spec.lora)
        with torch.device("meta"):
            shape = _new(spec, loaded, "meta")
    # Before anything is allocated.
    memory = MemoryPlanner(spec, dataset, loaded, shape, dtype).fit(default_micro_batch_tokens(loaded))
    state.micro_batch_tokens = memory.micro_batch_tokens
    fresh = spec.init_adapter is None
    adapter = _new(spec, loaded, loaded.device) if fresh else load_masters(path, spec.adapter, loaded)
    return Beginning(adapter, state, {}, memory)


def _new(spec: TrainSpec, loaded: LoadedModel, device: torch.device | str) -> Adapter:
    return new_adapter(spec.adapter, loaded.model.lora_targets(), spec.lora, spec.params.seed, device)
