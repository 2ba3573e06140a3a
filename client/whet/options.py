"""The keyword options of the calls that have many. Leaving one out, or None, takes the server's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from whet.types import Prompt


class GenerateOptions(TypedDict, total=False):
    """Options of ``generate`` and ``complete``.

    Attributes:
        max_tokens: completion tokens at most; default: as many as the context holds.
        min_tokens: nothing ends a completion before this many tokens.
        temperature: 0 is greedy. Default: 1.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, (0, 1].
        min_p: drop tokens less likely than this times the likeliest, [0, 1].
        repetition_penalty: > 0; 1 is none.
        presence_penalty, frequency_penalty: [-2, 2].
        seed: same seed, same output, whatever else the server does.
        stop: strings that end a completion; not part of its text.
        stop_token_ids: ids that end a completion.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        logit_bias: token id to a number that is added to its logit.
        n: completions to make.
        logprobs: True: of each completion token; a number: of that many likeliest alternatives, too.
        prompt_logprobs: the same for the prompt's tokens.
        echo: put the prompt's text before each completion.
        add_special_tokens: put the tokenizer's special tokens around a text prompt. Default: as the tokenizer says.
        adapter: name of an adapter of the model; default: the base model.
        adapter_version: default: the live one.
        priority: lower runs first.
        cache_salt: share cached prefixes only with requests of the same salt.
        request_id: default: a new one.
        timeout: seconds for the whole call; default: the client's.
    """

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    n: int | None
    logprobs: bool | int | None
    prompt_logprobs: bool | int | None
    echo: bool | None
    add_special_tokens: bool | None
    adapter: str | None
    adapter_version: int | None
    priority: int | None
    cache_salt: str | None
    request_id: str | None
    timeout: float | None


class LoRAOptions(TypedDict, total=False):
    """Shape of a new adapter, as in PEFT's LoraConfig.

    Attributes:
        rank: default: 8.
        alpha: the update is scaled by alpha / rank, or by alpha / sqrt(rank) with use_rslora. Default: 16.
        target_modules: last name components of linear modules, or ["all-linear"]; default: all of attention and MLP,
            or none where target_parameters are given.
        target_parameters: of a mixture of experts, as ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], to adapt
            the routed experts, each by an update of its own. Not with dropout. Default: none.
        layers: indices of the layers to adapt; default: all.
    """

    rank: int | None
    alpha: float | None
    dropout: float | None
    use_rslora: bool | None
    target_modules: Sequence[str] | None
    target_parameters: Sequence[str] | None
    layers: Sequence[int] | None


class TrainOptions(LoRAOptions, total=False):
    """Options of ``train``. At least one of max_steps and epochs is needed.

    Attributes:
        init_adapter, init_adapter_version: continue from this adapter, whose shape is kept.
        learning_rate: default: 1e-4.
        optimizer: "adamw" or "sgd".
        schedule: "constant", "linear" or "cosine", after ``warmup_steps``.
        max_grad_norm: clip the gradient's L2 norm; 0: never. Default: 1.
        batch_size: sequences of one optimizer step, in ``gradient_accumulation_steps`` micro-batches.
        max_seq_len: tokens of an example at most.
        packing: lay examples end to end, without attention from one to another.
        compute_dtype: "auto", "float32" or "bfloat16".
        loss_on: "completion" or "all".
        eval_fraction: hold out this fraction of the examples.
        eval_every: steps between evaluations on held-out examples; 0: at start and end only.
        early_stopping_patience: evaluations without improvement that end the run; 0: never.
        checkpoint_every: steps between resumable checkpoints; 0: at the end only.
        publish_every: steps between new live versions; 0: the final one only.
        publish: "best" or "last": which weights go live at the end.
        forward_tolerance: largest difference of logits, training against serving forward, that is accepted.
        activation_checkpointing: the backward runs each layer again: the same losses from less memory, for the time
            of a second forward. Default: False.
        on_disconnect: "continue" or "cancel": what becomes of the run when this client goes away.
        request_id: a repeated call with the same id attaches to the first one's run. Default: a new one.
        timeout: seconds to follow the run; default: without end.
    """

    init_adapter: str | None
    init_adapter_version: int | None
    learning_rate: float | None
    optimizer: str | None
    betas: tuple[float, float] | None
    eps: float | None
    momentum: float | None
    weight_decay: float | None
    schedule: str | None
    warmup_steps: int | None
    max_grad_norm: float | None
    batch_size: int | None
    gradient_accumulation_steps: int | None
    max_steps: int | None
    epochs: float | None
    max_seq_len: int | None
    packing: bool | None
    shuffle: bool | None
    seed: int | None
    compute_dtype: str | None
    loss_on: str | None
    eval_fraction: float | None
    eval_every: int | None
    early_stopping_patience: int | None
    checkpoint_every: int | None
    publish_every: int | None
    publish: str | None
    forward_tolerance: float | None
    activation_checkpointing: bool | None
    on_disconnect: str | None
    request_id: str | None
    timeout: float | None


class AdaptOptions(LoRAOptions, total=False):
    """Options of ``adapt``. The shape is for an adapter that does not exist yet.

    Attributes:
        steps: optimizer steps, each on all examples. Default: 1.
        learning_rate: default: 1e-4.
        optimizer: "adamw" or "sgd"; its state begins anew with each call.
        probe_prompts: each a text, token ids or chat messages, on which the adapted model is compared with its base.
        max_kl: how far it may go: mean over the positions of the probes of KL(base || adapted), nats per token. A step
            that would exceed it is halved, or not taken. Default: no limit.
        loss_on: "completion" or "all".
        request_id: a repeated call with the same id gets the first one's answer. Default: a new one.
        timeout: seconds; default: the client's.
    """

    steps: int | None
    learning_rate: float | None
    optimizer: str | None
    momentum: float | None
    weight_decay: float | None
    max_grad_norm: float | None
    max_seq_len: int | None
    loss_on: str | None
    seed: int | None
    probe_prompts: Sequence[Prompt] | None
    max_kl: float | None
    request_id: str | None
    timeout: float | None


class QuantizeOptions(TypedDict, total=False):
    """Options of ``quantize``.

    Attributes:
        group_size: inputs that share a scale: 32, 64 or 128; "q4" only. Default: 32.
        symmetric: without zero points. Default: True.
        quantize_embeddings, quantize_head: else they stay in the source's type.
        eval_text: text, or token ids, to measure perplexity and logit KL on.
        dry_run: report what would result; write nothing.
        load: load the result once it is written. Default: True.
        request_id: a repeated call with the same id finds the first one's work. Default: a new one.
        timeout: seconds; default: without end.
    """

    group_size: int | None
    symmetric: bool | None
    quantize_embeddings: bool | None
    quantize_head: bool | None
    eval_text: str | Sequence[int] | None
    dry_run: bool | None
    load: bool | None
    request_id: str | None
    timeout: float | None
