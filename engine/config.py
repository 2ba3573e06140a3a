"""Configuration of a model's shape and of the engine. Free of torch, so that the front end can read it.

Field names are those of Hugging Face configurations; what one ``config.json`` spells in several ways is normalised by
``engine.loading.hf_config`` and, from GGUF metadata, by ``engine.loading.gguf_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

LayerType = Literal["full_attention", "sliding_attention", "linear_attention"]
Device = str  # "auto", "cpu", "cuda", "cuda:N"
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

GGUFWeights = Literal["auto", "stored", "float"]
HalfWeights = Literal["auto", "stored", "float"]
ActivationQuantization = Literal["auto", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        rope_type: "default", "linear", "dynamic", "llama3", "yarn" or "longrope", as Hugging Face names them.
        partial_rotary_factor: fraction of head_dim that rotates.
        parameters: the further keys of ``rope_parameters`` / ``rope_scaling`` (factor, low_freq_factor …).
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionConfig:
    """Gated delta-net layers.

    Attributes:
        num_key_heads: of queries and keys; each serves num_value_heads / num_key_heads value heads.
        conv_width: taps of the causal convolution over queries, keys and values.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int

    @property
    def key_dim(self) -> int:
        """Width of all keys of a token."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all values of a token."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of the MLP.

    Attributes:
        intermediate_size: width of one routed expert.
        shared_intermediate_size: width of the expert that every token takes.
        normalize_top_k: the weights of a token's chosen experts sum to 1.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    normalize_top_k: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one model.

    Attributes:
        model_type: Hugging Face ``model_type``; names the file in engine/models.
        task: "generate" (causal language model), or "embed" (encoder, or a decoder that was saved without its head).
        layer_types: one per layer.
        rope: per layer type; Gemma 3 has one for full and one for sliding layers.
        qk_norm: RMSNorm over head_dim on q and k.
        query_scale: multiplies q·k; head_dim ** -0.5 unless the family says otherwise.
        attn_logit_softcapping, final_logit_softcapping: tanh caps; None: none.
        sliding_window: tokens a sliding layer sees, itself included; None if there is no such layer.
        embedding_multiplier: multiplies token embeddings (Gemma: sqrt(hidden_size)).
        attention_output_gate: q_proj gives a gate beside each query; its sigmoid multiplies the attention's output.
        linear_attention: of "linear_attention" layers; None if there are none.
        moe: None: a dense MLP.
        mtp_num_hidden_layers: of the head for multi-token prediction that the checkpoint may carry; 0: none.
        mtp_dedicated_embeddings: that head has embeddings of its own.
        eos_token_ids: any of them ends a completion.
        quantization_config: ``quantization_config`` of config.json as read, or None.
        raw: the whole of config.json, or what GGUF metadata gave in its place.
    """

    model_type: str
    task: Literal["generate", "embed"] = "generate"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str = "silu"
    layer_types: tuple[LayerType, ...] = ()
    rope: Mapping[str, RopeConfig] = field(default_factory=lambda: MappingProxyType({"full_attention": RopeConfig()}))
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_scale: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    embedding_multiplier: float = 1.0
    attention_output_gate: bool = False
    linear_attention: LinearAttentionConfig | None = None
    moe: MoEConfig | None = None
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 0
    mtp_dedicated_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    quantization_config: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def has_own_head(self) -> bool:
        """Whether there is a head that is not the embeddings."""
        return self.task == "generate" and not self.tie_word_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs.

    Attributes:
        device: "auto" takes the first CUDA device, or else the CPU.
        dtype: compute type; "auto" is float32 on the CPU and bfloat16 on CUDA. "float32" is exact: no fast path that
            computes in a narrower type.
        num_threads: of torch on the CPU; 0: as many as cores.
        max_batch_tokens: tokens one step may process; the budget of the scheduler.
        max_running_requests: completions that decode together.
        max_waiting_requests: completions that may queue; beyond it add_request raises OverloadedError.
        max_model_len: longest context to serve; None: the model's own.
        kv_cache_bytes: of attention cache per model, recurrent states included; None: planned from free memory.
        block_size: tokens of one attention cache block.
        enable_prefix_caching: share blocks among equal prefixes.
        enable_decode_graphs: capture decode steps once and replay them. The results are the same.
        enable_overlap: where decode steps are CUDA graphs that choose their tokens, launch each before the tokens of
            the one before have been read. The results are the same.
        gguf_weights: how a GGUF file's quantized matrices are held: "stored" as the file has them, "float" in the
            compute type. The numbers that they stand for are the same. "auto": stored where there are kernels for it.
        half_weights: how matrices that a checkpoint has in bfloat16 or float16 are held where the compute type is
            float32: "stored" in those 16 bits, and widened as they are multiplied, "float" widened once. The numbers
            are the same. "auto": stored where there are kernels for it, on the CPU.
        activation_quantization: whether activations are rounded to int8 where a linear weight is stored as integers on
            the CPU, in serving, scoring and the forward of training: products are then of integers, and faster. "auto":
            where there are kernels for it, unless dtype is "float32". "off": products are of floats. Gradients are
            computed by floats either way.
        state_checkpoint_interval: blocks between the checkpoints of recurrent state that prefixes are shared from,
            besides those at the ends of prompts and completions; 0: only those.
        job_slice_seconds: no slice of a job is planned to take longer.
        job_share: fraction of the loop's time that jobs may take while requests are running, (0, 1].
        job_max_slowdown: largest factor by which jobs may stretch the time between two tokens of a stream, above 1;
            inf: any. Of F, jobs get at most a fraction 1 - 1/F of the time while streams decode. A step after a slice
            is slower itself, as the slice has taken the caches; so the p99 grows by more than this factor.
        state_dir: adapters, checkpoints and quantized models live below it.
    """

    device: Device = "auto"
    dtype: DTypeName = "auto"
    num_threads: int = 0
    max_batch_tokens: int = 2048
    max_running_requests: int = 128
    max_waiting_requests: int = 1024
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    enable_decode_graphs: bool = True
    enable_overlap: bool = True
    gguf_weights: GGUFWeights = "auto"
    half_weights: HalfWeights = "auto"
    activation_quantization: ActivationQuantization = "auto"
    state_checkpoint_interval: int = 64
    job_slice_seconds: float = 0.05
    job_share: float = 0.5
    job_max_slowdown: float = 1.4
    state_dir: str = ""

    @property
    def rounds_activations(self) -> bool:
        """Whether serving, scoring and the forward of training may round activations to int8."""
        return self.activation_quantization == "auto" and self.dtype != "float32"
