"""Jobs: what they are asked (specs) and what they report (events). Free of torch.

A job is a generator that yields after each bounded piece of work: an event of this module, or a Pause that says what
comes next, or None. Specs and events are plain dataclasses, so that msgspec carries them between processes. Every job
ends with exactly one terminal event: TrainFinished, QuantizeFinished, MergeFinished, PerplexityFinished, EmbedFinished,
or JobFailed.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal

from engine.info import AdapterSource

MAX_SOURCES = 64
"""Adapters that may go into one."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Yielded by a job between two pieces of work; it stays in the engine.

    Attributes:
        kind: of the next piece ("forward"); pieces of a kind cost time in proportion to their size.
        size: of the next piece, in any unit that its kind keeps to; above 0.
    """

    kind: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedAdapter:
    """Attributes: version: None: the live one; weight: what the adapter's update is multiplied by, finite."""

    name: str
    version: int | None = None
    weight: float = 1.0


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """One training example after templating and tokenising.

    Attributes:
        token_ids: at least two ids.
        loss_mask: per token, whether predicting it counts; the first is never predicted.
    """

    token_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAParams:
    """Shape of a new adapter (PEFT's LoraConfig).

    Attributes:
        alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank) with use_rslora.
        target_modules: last name components ("q_proj"), or ["all-linear"]; empty: all linear modules of attention and
            MLP, or none where target_parameters are given.
        target_parameters: ends of names of parameters that stack experts ("mlp.experts.down_proj"). Not with dropout.
        layers: indices of the layers to adapt; empty: all (PEFT's layers_to_transform).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainParams:
    """How to train. max_steps and epochs: at least one is set; the first reached ends the run.

    Attributes:
        batch_size: sequences in one optimizer step's batch (split over gradient_accumulation_steps micro-batches).
        max_seq_len: longer examples lose the left of their prompt, or are rejected where nothing to learn is left.
        packing: lay examples end to end without padding; attention never crosses from one to another.
        compute_dtype: of the forward and backward; masters and optimizer state are float32.
        eval_every: steps between evaluations on the held-out examples; 0: only at start and end.
        early_stopping_patience: evaluations without improvement that end the run; 0: never.
        checkpoint_every: steps between resumable checkpoints; 0: only at the end.
        publish_every: steps between publishing the adapter as a new live version; 0: only the final one.
        publish: which weights go live at the end: "best" on the held-out examples, or "last".
        forward_tolerance: largest absolute difference of logits between training and serving forward that is accepted.
        activation_checkpointing: keep the input of each decoder layer alone for the backward, which runs the layer
            again: the same numbers from less memory, for the time of a second forward.
    """

    learning_rate: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    epochs: float | None = None
    max_seq_len: int = 1024
    packing: bool = True
    shuffle: bool = True
    seed: int = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_every: int = 0
    early_stopping_patience: int = 0
    checkpoint_every: int = 0
    publish_every: int = 0
    publish: Literal["best", "last"] = "best"
    forward_tolerance: float = 1e-3
    activation_checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KLBound:
    """How far an adapter may go from its base.

    Attributes:
        probes: token ids of prompts on which the two are compared.
        max_kl: limit on the mean over the probes' positions of KL(base || adapted), nats per token. A step that would
            exceed it is halved some times, and if that does not help the run ends before it. None: no limit.
    """

    probes: list[list[int]]
    max_kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """A LoRA run. The examples lie tokenised in ``dataset_path`` (engine.training.data), never on the wire.

    Attributes:
        job_id: also the run id.
        adapter: name under which versions are published.
        lora: ignored where init_adapter is given, whose own shape is kept.
        init_adapter, init_adapter_version: continue from this adapter of the same model.
        run_dir: checkpoints go below it; a checkpoint found there is resumed from.
        bound: None: how far the adapter goes is neither measured nor limited.
    """

    job_id: str
    model: str
    adapter: str
    lora: LoRAParams
    params: TrainParams
    dataset_path: str
    run_dir: str
    init_adapter: str | None = None
    init_adapter_version: int | None = None
    bound: KLBound | None = None


@dataclass(slots=True, kw_only=True)
class TrainStarted:
    """The run begins, or goes on.

    Attributes:
        forward_difference: max abs difference of logits, training against serving forward, first batch.
        estimated_memory_bytes: that the run adds to what is resident, at its peak.
    """

    job_id: str
    num_trainable_parameters: int
    num_examples: int
    num_eval_examples: int
    num_tokens: int
    num_loss_tokens: int
    target_modules: list[str]
    total_steps: int
    resumed_from_step: int
    forward_difference: float
    target_parameters: list[str] = field(default_factory=list)
    estimated_memory_bytes: int | None = None


@dataclass(slots=True, kw_only=True)
class TrainStep:
    """One optimizer step. Step 0 carries the base loss and no gradient.

    Attributes:
        loss: mean NLL per loss token, nats.
        grad_norm: before clipping; None at step 0.
        eta_seconds: None until it can be told.
        peak_memory_bytes: since the run took up its work in this process, weights and caches included: allocated on the
            device, or on the CPU resident in the process; None where it is not known.
        kl: after the step, of a run with a bound; nats per token.
    """

    job_id: str
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
    skipped: bool = False
    kl: float | None = None


@dataclass(slots=True, kw_only=True)
class TrainEvaluation:
    """NLL on the held-out examples, nats per loss token."""

    job_id: str
    step: int
    nll: float
    num_loss_tokens: int
    is_best: bool
    seconds: float


@dataclass(slots=True, kw_only=True)
class TrainCheckpoint:
    job_id: str
    step: int
    path: str
    is_best: bool
    seconds: float


@dataclass(slots=True, kw_only=True)
class TrainPublished:
    """From here on new requests for the adapter get this version."""

    job_id: str
    step: int
    adapter: str
    version: int


@dataclass(slots=True, kw_only=True)
class JobWarning:
    job_id: str
    step: int | None
    reason: str
    message: str


@dataclass(slots=True, kw_only=True)
class TrainFinished:
    """The run has ended.

    Attributes:
        stop_reason: "max_steps", "epochs", "early_stopping", or "max_kl": one step more would exceed the bound.
        base_nll, final_nll, best_nll: None without held-out examples.
        version: None, and adapter_path "", if nothing was published: not one step stayed within the bound.
        kl: of what was published, of a run with a bound; nats per token.
    """

    job_id: str
    step: int
    stop_reason: str
    base_nll: float | None
    final_nll: float | None
    best_nll: float | None
    best_step: int | None
    version: int | None
    adapter_path: str
    checkpoint_path: str
    seconds: float
    num_tokens: int
    kl: float | None = None


# ------------------------------------------------------------------------------------------------------ quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec:
    """Write a quantized copy of a model.

    Attributes:
        scheme: "q8": int8, one scale per output channel, symmetric. "q4": int4 in groups along the input.
        group_size: 32, 64 or 128; q4 only.
        symmetric: q4 only; q8 always is.
        quantize_embeddings, quantize_head: else they stay in the source's type.
        output_dir: of the new Hugging Face directory (compressed-tensors format); made by the server.
        output_name: under which it is loaded.
        eval_token_ids: text to measure perplexity and logit KL on; empty: neither is measured.
        dry_run: report sizes that would result, write nothing.
        load: load the result once written.
    """

    job_id: str
    model: str
    scheme: Literal["q8", "q4"]
    output_dir: str
    output_name: str
    group_size: int = 32
    symmetric: bool = True
    quantize_embeddings: bool = False
    quantize_head: bool = False
    eval_token_ids: list[int] = field(default_factory=list)
    dry_run: bool = False
    load: bool = True


@dataclass(slots=True, kw_only=True)
class QuantizeProgress:
    job_id: str
    stage: Literal["quantizing", "writing", "evaluating"]
    tensors_done: int
    tensors_total: int
    tensor: str = ""


@dataclass(slots=True, kw_only=True)
class TensorError:
    """Attributes: relative_rmse: ||W - Q(W)||_F / ||W||_F; max_abs: largest absolute error."""

    name: str
    relative_rmse: float
    max_abs: float
    num_elements: int
    bits: float


@dataclass(slots=True, kw_only=True)
class QuantizeFinished:
    """Attributes: ratio: bytes_in / bytes_out as measured on disk; None on a dry run, as is bytes_out."""

    job_id: str
    output_name: str
    output_dir: str
    bytes_in: int
    bytes_out: int | None
    ratio: float | None
    tensors: list[TensorError]
    num_quantized: int
    num_kept: int
    logit_kl: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    num_eval_tokens: int
    seconds: float


# ----------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSpec:
    """Write a model of its own with the updates of adapters added to its weights.

    Attributes:
        adapters: at least one.
        output_dir: of the new Hugging Face directory; made by the server.
        output_name: under which it is loaded.
        dtype: in which matrices are stored; "auto": as in the source (see engine.merge).
        force: also adapters that were trained on other base weights.
        load: load the result once written.
    """

    job_id: str
    model: str
    adapters: list[WeightedAdapter]
    output_dir: str
    output_name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    force: bool = False
    load: bool = True


@dataclass(slots=True, kw_only=True)
class MergeProgress:
    """Attributes: tensor: the one just done."""

    job_id: str
    tensors_done: int
    tensors_total: int
    tensor: str


@dataclass(slots=True, kw_only=True)
class MergeFinished:
    """Attributes:
    adapters: what was merged, versions resolved.
    num_merged, num_kept: tensors that have an update, and those that are as in the source.
    bytes_out: of the weight files that were written.
    dtype: of the merged tensors, "+" between several.
    relative_change: ||W' - W||_F / ||W||_F over all merged tensors.
    """

    job_id: str
    output_name: str
    output_dir: str
    adapters: list[AdapterSource]
    num_merged: int
    num_kept: int
    bytes_out: int
    dtype: str
    relative_change: float
    seconds: float


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexitySpec:
    """Attributes: window: tokens of one forward; stride: tokens newly scored per window, 1 <= stride <= window."""

    job_id: str
    model: str
    token_ids: list[int]
    window: int = 512
    stride: int = 256
    adapter: str | None = None
    adapter_version: int | None = None


@dataclass(slots=True, kw_only=True)
class PerplexityProgress:
    job_id: str
    windows_done: int
    windows_total: int
    num_tokens: int
    nll: float


@dataclass(slots=True, kw_only=True)
class PerplexityFinished:
    """Attributes: nll: mean, nats per scored token; standard_error: of that mean, None where one token was scored;
    num_tokens: scored, once each."""

    job_id: str
    nll: float
    perplexity: float
    standard_error: float | None
    num_tokens: int
    num_windows: int
    seconds: float
    adapter_version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedSpec:
    """Attributes: pooling, normalize: None: the model's own; dimensions: Matryoshka truncation, before normalising."""

    job_id: str
    model: str
    inputs: list[list[int]]
    pooling: Literal["mean", "cls", "last"] | None = None
    normalize: bool | None = True
    dimensions: int | None = None
    adapter: str | None = None
    adapter_version: int | None = None


@dataclass(slots=True, kw_only=True)
class EmbedFinished:
    """Attributes: vectors: len(inputs) rows of ``dimensions`` float32, little-endian, end to end."""

    job_id: str
    vectors: bytes
    dimensions: int
    num_tokens: int
    adapter_version: int | None = None


@dataclass(slots=True, kw_only=True)
class JobFailed:
    """Attributes: error_code: of engine.errors, "cancelled" among them."""

    job_id: str
    error_code: str
    error_message: str
    error_reason: str
    error_field: str = ""


JobSpec = TrainSpec | QuantizeSpec | MergeSpec | PerplexitySpec | EmbedSpec
JobEvent = (
    TrainStarted
    | TrainStep
    | TrainEvaluation
    | TrainCheckpoint
    | TrainPublished
    | JobWarning
    | TrainFinished
    | QuantizeProgress
    | QuantizeFinished
    | MergeProgress
    | MergeFinished
    | PerplexityProgress
    | PerplexityFinished
    | EmbedFinished
    | JobFailed
)
TERMINAL_EVENTS = (TrainFinished, QuantizeFinished, MergeFinished, PerplexityFinished, EmbedFinished, JobFailed)
Slices = Generator[JobEvent | Pause | None, None, None]
"""A job as it runs."""
