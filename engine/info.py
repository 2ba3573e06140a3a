"""What the engine tells about itself: loaded models, adapters, statistics. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class ModelInfo:
    """A loaded model.

    Attributes:
        task: "generate" or "embed".
        dtype: compute type.
        quantization: scheme name of the linear weights ("none", "bf16", "f16", "q8", "q4", …).
        weights_bytes: resident bytes of weights.
        max_model_len: longest context that is served, tokens.
        num_blocks, block_size: of the attention cache; 0 where there is none.
        num_slots: of recurrent state, for sequences and checkpoints; 0 where there is none.
        kv_cache_bytes: of the attention cache. state_bytes: of the recurrent states.
        linear_modules: last name components that LoRA may target.
        expert_parameters: names within a layer of parameters that stack experts, which LoRA may target, too.
        weights_digest: identifies the base weights, for adapter lineage.
        tokenizer_path: directory or .gguf file that holds tokenizer and chat template.
        embedding_dimensions: width of embeddings from this model.
        num_mtp_layers: of its head for multi-token prediction, resident for drafting; 0 where there is none.
    """

    name: str
    path: str
    model_type: str
    task: str
    dtype: str
    quantization: str
    num_parameters: int
    weights_bytes: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    num_blocks: int
    block_size: int
    kv_cache_bytes: int
    linear_modules: list[str]
    weights_digest: str
    tokenizer_path: str
    embedding_dimensions: int
    device: str
    load_seconds: float = 0.0
    num_slots: int = 0
    state_bytes: int = 0
    num_mtp_layers: int = 0
    expert_parameters: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """A version of an adapter and what its update is multiplied by."""

    name: str
    version: int
    weight: float


@dataclass(slots=True, kw_only=True)
class AdapterInfo:
    """One version of an adapter.

    Attributes:
        version: from 1, ascending; 0 for an adapter that was loaded from a directory and never stored.
        live: new requests that name no version get this one.
        loaded: resident in memory.
        target_modules, target_parameters: what PEFT calls the linear modules, and the parameters that stack experts.
        path: PEFT directory of this version.
        created_at: seconds since the epoch; None if not known.
        run_id: of the training run that made it, or "".
        base_digest: weights_digest of the model it was trained on, or "" if not known.
        parent: name and version of the adapter that training went on from; the name that it has now.
        data_digest: of the tokenised examples that it was trained on, or "".
        sources: what it was combined from, under the names that they have now.
        combination: how: "cat" or "linear"; "" for what was not combined.
        forced: it, or a source of it, was loaded onto other base weights than it was trained on, because a caller
            insisted.
    """

    model: str
    name: str
    version: int
    live: bool
    loaded: bool
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: list[str]
    num_parameters: int
    path: str
    created_at: float | None = None
    run_id: str = ""
    base_digest: str = ""
    best_nll: float | None = None
    parent: tuple[str, int] | None = None
    data_digest: str = ""
    sources: list[AdapterSource] = field(default_factory=list)
    combination: str = ""
    forced: bool = False
    target_parameters: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class ModelStats:
    """Gauges and cumulative counters of one model, and observations since the last call.

    Attributes:
        observations: histogram name (without prefix, e.g. "time_to_first_token_seconds") to new values.
    """

    model: str
    requests_waiting: int = 0
    requests_running: int = 0
    kv_cache_usage_ratio: float = 0.0
    state_slots_used: int = 0
    prefix_cache_queries_tokens: int = 0
    prefix_cache_hits_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    adapters_running: list[str] = field(default_factory=list)
    adapters_waiting: list[str] = field(default_factory=list)
    observations: dict[str, list[float]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Attributes: job_share: job kind to the fraction of the loop's time it took since the last call;
    job_slice_seconds: job kind to durations of slices since the last call; job_gap_seconds: what jobs may take between
    two steps, as planned now, None without jobs."""

    models: list[ModelStats] = field(default_factory=list)
    job_share: dict[str, float] = field(default_factory=dict)
    job_slice_seconds: dict[str, list[float]] = field(default_factory=dict)
    job_gap_seconds: float | None = None
    memory: dict[str, Any] = field(default_factory=dict)
