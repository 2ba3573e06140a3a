"""What the calls return, and what they take beside plain values. No protobuf.

Log-probabilities, losses and NLLs are natural logarithms. None means that the server did not say.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages ``[{"role": …, "content": …}]``."""

AdapterChoice = str | tuple[str, int | None] | None
"""An adapter's live version, one of its versions, or None for the base."""

FinishReason = str
"""Why a completion ended: "stop" or "length"."""


# -------------------------------------------------------------------------------------------------------- generation


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability under the model, before temperature, penalties and filters.

    Attributes:
        logprob: None for the first token of a prompt, which nothing predicts.
        rank: 1 for the likeliest token.
        top: token ids and log-probabilities of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float | None
    rank: int | None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a whole request.

    Attributes:
        cached_prompt_tokens: of the prompt tokens, those that the prefix cache held.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds by the engine's clock.

    Attributes:
        queue_seconds: arrival to first being scheduled.
        prefill_seconds: first being scheduled to the first token.
        decode_seconds: first to last token.
        time_to_first_token_seconds: arrival to first token.
        total_seconds: arrival to end.
        tokens_per_second: of the tokens after the first.
    """

    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    time_to_first_token_seconds: float | None
    total_seconds: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What is new in one completion.

    Attributes:
        index: which of the n completions.
        text: whole characters; may be empty while the tokens do not yet make up one. With ``echo``, the prompt's text
            is the first chunk of each completion.
        token_ids: sampled tokens, a stop token included; they may be ahead of the text.
        logprobs: of token_ids, if asked for.
        logprob_details: the same with ranks and alternatives.
        finish_reason: in the last chunk of this completion.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] | None = None
    logprob_details: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole completion.

    Attributes:
        text: with the prompt's before it, if ``echo`` was asked for.
        stop_reason: the stop string or the token id that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_completion_tokens: int
    timings: Timings
    logprobs: list[float | None] | None = None
    logprob_details: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer: all completions of one request. ``text`` and its siblings are those of the first.

    Attributes:
        completions: n of them.
        usage, timings: of the whole request.
        adapter_version: which version of the adapter made the tokens; None for the base model.
        prompt_token_ids: with ``echo``.
        prompt_logprobs: one per prompt token, the first None; if asked for.
        prompt_logprob_details: the same with token ids, ranks and alternatives.
    """

    request_id: str
    model: str
    completions: list[Completion]
    usage: Usage
    timings: Timings
    adapter_version: int | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_logprob_details: list[TokenLogprob] | None = None

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first completion."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.completions[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """What stopped the first completion."""
        return self.completions[0].stop_reason

    @property
    def logprobs(self) -> list[float | None] | None:
        """Log-probabilities of the first completion's tokens, if asked for."""
        return self.completions[0].logprobs

    @property
    def logprob_details(self) -> list[TokenLogprob] | None:
        """``logprobs`` with ranks and alternatives."""
        return self.completions[0].logprob_details


# ------------------------------------------------------------------------------------------------------ quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeProgress:
    """Attributes: stage: "quantizing", "writing" or "evaluating"; tensor: the one just done, or ""."""

    stage: str
    tensors_done: int
    tensors_total: int
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """Attributes: relative_rmse: ||W - Q(W)||_F / ||W||_F; bits: per element, scales and zero points included."""

    name: str
    relative_rmse: float
    max_abs: float
    num_elements: int
    bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """What a quantization did.

    Attributes:
        output: name of the new model; "" on a dry run.
        path: of its directory on the server.
        bytes_in, bytes_out: of weights on disk, as measured; bytes_out is None on a dry run.
        ratio: bytes_in / bytes_out; None on a dry run.
        logit_kl: mean KL divergence of next-token distributions from the source's, on the evaluation text.
    """

    request_id: str
    output: str
    path: str
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
    loaded: bool


# ------------------------------------------------------------------------------------------------------------ merging


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeProgress:
    """Attributes: tensor: the one just done."""

    tensors_done: int
    tensors_total: int
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: name of the new model.
        path: of its directory on the server.
        adapters: what was merged, with versions.
        num_merged, num_kept: tensors with an update, and those as in the source.
        bytes_out: of weights on disk, as measured.
        dtype: of the merged tensors, with "+" between several.
        relative_change: ||W' - W||_F / ||W||_F over the merged tensors.
    """

    request_id: str
    output: str
    path: str
    adapters: list[WeightedAdapter]
    num_merged: int
    num_kept: int
    bytes_out: int
    dtype: str
    relative_change: float
    seconds: float
    loaded: bool


# -------------------------------------------------------------------------------------------- evaluation, embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityProgress:
    """Attributes: num_tokens: scored so far; nll: mean so far."""

    windows_done: int
    windows_total: int
    num_tokens: int
    nll: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """Attributes: nll: mean per scored token; standard_error: of nll; num_tokens: scored, once each."""

    request_id: str
    perplexity: float
    nll: float
    standard_error: float | None
    num_tokens: int
    num_windows: int
    seconds: float
    adapter_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Attributes: vectors: one per input, each of ``dimensions`` floats; num_tokens: of all inputs."""

    request_id: str
    vectors: list[list[float]]
    dimensions: int
    num_tokens: int
    seconds: float
    adapter_version: int | None


# ----------------------------------------------------------------------------------------------- models and adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that the server knows. Fields after ``error`` are None until it is loaded.

    Attributes:
        state: "unloaded", "loading", "ready" or "failed".
        error: why it failed, or "".
        task: "generate" or "embed".
        quantization: how its linear weights are stored: "none" (in ``dtype``), "bf16", "f16" (16-bit floats that are
            widened as they are multiplied), "q8", "q4", …
        weights_bytes: resident.
        max_model_len: longest context that is served, tokens.
        num_slots, state_bytes: of recurrent state; 0 for models without.
        num_mtp_layers: of its head for multi-token prediction, kept for drafting; 0 where there is none.
        linear_modules: last name components that LoRA may target.
        expert_parameters: names that target_parameters may have; empty for models without routed experts.
        weights_digest: identifies the base weights.
        has_chat_template: it can be given chat messages.
    """

    name: str
    state: str
    error: str
    model_type: str | None = None
    task: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    num_parameters: int | None = None
    weights_bytes: int | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    max_model_len: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    num_slots: int | None = None
    state_bytes: int | None = None
    num_mtp_layers: int | None = None
    linear_modules: list[str] | None = None
    expert_parameters: list[str] | None = None
    weights_digest: str | None = None
    embedding_dimensions: int | None = None
    device: str | None = None
    load_seconds: float | None = None
    has_chat_template: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """Name and number of a version of an adapter. Attributes: version: None, in a request: the live one."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}:{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedAdapter:
    """A version of an adapter and what its update of the base weights is multiplied by.

    Attributes:
        version: None, in a request: the live one.
    """

    name: str
    version: int | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.weight:g}*{AdapterVersion(name=self.name, version=self.version)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One version of an adapter.

    Attributes:
        version: from 1, ascending; 0 for an adapter that the server was started with.
        live: new requests that name no version get this one.
        loaded: in memory.
        run_id: of the training run that made it, or "".
        base_digest: ``weights_digest`` of the model that it was trained on, or "".
        best_nll: held-out, of its training run.
        parent: the version that training went on from; it may have been deleted since.
        data_digest: SHA-256 of the tokenized examples that its run trained on, or "".
        sources: what it was combined from; they may have been deleted since.
        combination_method: "cat" or "linear"; "" for what was not combined.
        forced: it, or one of its sources, was trained on other base weights, and a caller insisted on it.
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
    target_parameters: list[str]
    num_parameters: int
    created_at: datetime.datetime | None
    run_id: str
    base_digest: str
    best_nll: float | None
    parent: AdapterVersion | None = None
    data_digest: str = ""
    sources: list[WeightedAdapter] = field(default_factory=list)
    combination_method: str = ""
    forced: bool = False


# ---------------------------------------------------------------------------------------------------------- training

Example = Mapping[str, Any]
"""{"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"} or {"text"}; other keys are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What online adaptation did.

    Attributes:
        loss_before, loss_after: mean over the examples' loss tokens.
        version: of the adapter, now live; None if nothing was published, because no step was within max_kl.
        steps: that were kept.
        stop_reason: "max_steps", or "max_kl".
        kl: of what was published, mean over the positions of the probes of KL(base || adapted), nats per token; None
            without probes.
        num_truncated: examples that were longer than max_seq_len: of a completion's the left of the prompt is lost, of
            a text the end.
    """

    loss_before: float
    loss_after: float
    version: int | None
    steps: int
    stop_reason: str
    kl: float | None
    num_tokens: int
    num_loss_tokens: int
    num_truncated: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunError:
    """Attributes: code: name of a gRPC status; reason: stable word in UPPER_SNAKE_CASE."""

    code: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The archive's record of a training run.

    Attributes:
        state: "queued", "running", "finished", "failed", "cancelled" or "interrupted".
        config: what was asked for, with defaults resolved: the options of ``Client.train`` by name.
        step: last completed one.
        loss: of that step.
        version: last published one of the adapter.
        error: why it failed.
    """

    id: str
    state: str
    model: str
    adapter: str
    config: Mapping[str, Any]
    created_at: datetime.datetime | None
    started_at: datetime.datetime | None
    ended_at: datetime.datetime | None
    step: int
    total_steps: int | None
    loss: float | None
    base_nll: float | None
    final_nll: float | None
    best_nll: float | None
    best_step: int | None
    version: int | None
    error: RunError | None
