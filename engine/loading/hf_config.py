"""ModelConfig from a Hugging Face ``config.json``, in the spellings of transformers 4 and 5. Free of torch.

Only values are read. Keys that ask for code (``auto_map``) are never looked at. Defaults are those of the
configuration classes in transformers, because ``config.json`` leaves out what equals its class's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.config import LayerType, LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig
from engine.loading.fields import Fields, read_json

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_CONTEXT = 1 << 30
MAX_EXPERTS = 4096
MAX_CONV_WIDTH = 64

ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
"""rope_type to the keys that it reads; others in a file mean nothing to it and are left out."""

ROPE_TYPES = tuple(ROPE_PARAMETERS)
MIN_THETA = 1.001
"""Frequencies fall with powers of theta; YaRN divides by its logarithm."""

LAYER_TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")


def load_hf_config(path: Path) -> ModelConfig:
    """Reads ``config.json``, and end-of-sequence ids from ``generation_config.json`` where there is one.

    Args:
        path: a model directory, or its config.json.

    Raises:
        FormatError: malformed, out of range, or of an unsupported model type.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = read_json(file)
    generation = file.with_name("generation_config.json")
    extra = read_json(generation) if generation.is_file() else {}
    return model_config(raw, str(file), generation=extra)


def model_config(raw: Mapping[str, Any], source: str, *, generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Normalises a configuration mapping.

    Args:
        raw: the keys of a config.json.
        source: where they come from, for messages.
        generation: the keys of generation_config.json; its end-of-sequence ids are added.

    Raises:
        FormatError: out of range, or of an unsupported model type.
    """
    fields = Fields(raw, source)
    model_type = fields.string("model_type")
    values: Mapping[str, Any] = raw
    if model_type in _MULTIMODAL and isinstance(raw.get("text_config"), dict):
        # The multimodal wrapper keeps the language model's values one level down, ids and quantization above.
        outer = {k: raw[k] for k in ("eos_token_id", "bos_token_id", "pad_token_id", "quantization_config") if k in raw}
        values = {**outer, **raw["text_config"]}
        if model_type != "gemma3" and "tie_word_embeddings" in raw:
            values["tie_word_embeddings"] = raw["tie_word_embeddings"]  # the wrapper ties, and so its word counts
        model_type = _MULTIMODAL[model_type]
    family = _FAMILIES.get(model_type)
    if family is None:
        fields.reject("model_type", model_type, ", ".join(sorted([*_FAMILIES, *_MULTIMODAL])))
    given = family(Fields(values, source), model_type)
    vocab_size: int = given["vocab_size"]
    eos = Fields(values, source).token_ids("eos_token_id", vocab_size)
    eos += Fields(generation or {}, source).token_ids("eos_token_id", vocab_size)
    bos = Fields(values, source).token_ids("bos_token_id", vocab_size)
    pad = Fields(values, source).token_ids("pad_token_id", vocab_size)
    quantization = Fields(values, source).mapping("quantization_config")
    return ModelConfig(
        model_type=model_type,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        pad_token_id=pad[0] if pad else None,
        quantization_config=None if quantization is None else MappingProxyType(quantization),
        raw=MappingProxyType(dict(raw)),
        **given,
    )


def _decoder(f: Fields, *, heads: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    """What all decoder families share; sizes without a default must be given."""
    num_heads = f.integer("num_attention_heads", heads, high=MAX_HEADS)
    num_kv_heads = f.integer("num_key_value_heads", kv_heads or num_heads, high=MAX_HEADS)
    if num_heads % num_kv_heads:
        f.reject("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    hidden_size = f.integer("hidden_size", high=MAX_WIDTH)
    if not f.has("head_dim") and hidden_size % num_heads:
        f.reject(
            "num_attention_heads", num_heads, f"a divisor of hidden_size ({hidden_size}) where no head_dim is given"
        )
    head_dim = f.integer("head_dim", max(hidden_size // num_heads, 1), high=MAX_HEAD_DIM)
    if head_dim % 2:
        f.reject("head_dim", head_dim, "an even number, because rotary embedding turns pairs")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": f.integer("intermediate_size", high=MAX_WIDTH),
        "num_hidden_layers": f.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "norm_eps": f.number("rms_norm_eps", 1e-6, low=1e-12, high=1.0),
        "hidden_act": f.string("hidden_act", "silu"),
        "query_scale": head_dim**-0.5,
    }


def _llama(f: Fields, model_type: str) -> dict[str, Any]:
    common = _decoder(f)
    num_layers = common["num_hidden_layers"]
    max_position = f.integer("max_position_embeddings", 2048 if model_type == "llama" else 32768, high=MAX_CONTEXT)
    if model_type == "mistral":
        window = f.integer("sliding_window", high=MAX_CONTEXT) if f.has("sliding_window") else None
        default: list[LayerType] = ["sliding_attention" if window else "full_attention"] * num_layers
        biased = False
    elif model_type in ("qwen2", "qwen3"):
        use_window = f.boolean("use_sliding_window", False)
        window = f.integer("sliding_window", 4096, high=MAX_CONTEXT) if use_window else None
        first = f.integer("max_window_layers", 28, low=0)
        default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
        biased = True if model_type == "qwen2" else f.boolean("attention_bias", False)
    else:
        window = None
        default = ["full_attention"] * num_layers
        biased = f.boolean("attention_bias", False)
    layer_types = _layer_types(f, default, window)
    return {
        **common,
        "vocab_size": f.integer("vocab_size", high=MAX_VOCAB),
        "max_position_embeddings": max_position,
        "layer_types": layer_types,
        "rope": _rope(f, layer_types, max_position),
        "attention_bias": biased,
        "attention_out_bias": biased and model_type != "qwen2",
        "mlp_bias": f.boolean("mlp_bias", False) if model_type == "llama" else False,
        "qk_norm": model_type == "qwen3",
        "sliding_window": window,
        "tie_word_embeddings": f.boolean("tie_word_embeddings", False),
    }


def _gemma3_text(f: Fields, model_type: str) -> dict[str, Any]:
    if f.boolean("use_bidirectional_attention", False):
        f.reject("use_bidirectional_attention", True, "false")
    common = _decoder(Fields({"head_dim": 256, **f.values}, f.source), heads=8, kv_heads=4)
    pattern = f.integer("sliding_window_pattern", f.values.get("_sliding_window_pattern", 6), high=MAX_LAYERS)
    window = f.integer("sliding_window", 4096, high=MAX_CONTEXT)
    default: list[LayerType] = [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(common["num_hidden_layers"])
    ]
    layer_types = _layer_types(f, default, window)
    max_position = f.integer("max_position_embeddings", 131072, high=MAX_CONTEXT)
    biased = f.boolean("attention_bias", False)
    return {
        **common,
        "vocab_size": f.integer("vocab_size", 262208, high=MAX_VOCAB),
        "max_position_embeddings": max_position,
        "hidden_act": f.string("hidden_activation", "gelu_pytorch_tanh"),
        "layer_types": layer_types,
        "rope": _gemma3_rope(f, layer_types, max_position),
        "attention_bias": biased,
        "attention_out_bias": biased,
        "qk_norm": True,
        "query_scale": f.number("query_pre_attn_scalar", 256, low=1e-3) ** -0.5,
        "attn_logit_softcapping": f.optional_number("attn_logit_softcapping", low=1e-3),
        "final_logit_softcapping": f.optional_number("final_logit_softcapping", low=1e-3),
        "sliding_window": window if "sliding_attention" in layer_types else None,
        "embedding_multiplier": common["hidden_size"] ** 0.5,
        "tie_word_embeddings": f.boolean("tie_word_embeddings", True),
    }


def _qwen3_5(f: Fields, model_type: str) -> dict[str, Any]:
    """The hybrid family; the mixture of experts differs by its MLP alone."""
    if not f.boolean("attn_output_gate", True):
        f.reject("attn_output_gate", False, "true")
    moe = _qwen3_5_moe(f) if model_type == "qwen3_5_moe_text" else None
    assumed = {"head_dim": 256} if moe is None else {"head_dim": 256, "intermediate_size": moe.intermediate_size}
    heads = (16, 4) if moe is None else (16, 2)
    common = _decoder(Fields({**assumed, **f.values}, f.source), heads=heads[0], kv_heads=heads[1])
    interval = f.integer("full_attention_interval", 4, high=MAX_LAYERS)
    default: list[LayerType] = [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(common["num_hidden_layers"])
    ]
    layer_types = _layer_types(f, default, None, accepted=("full_attention", "linear_attention"))
    max_position = f.integer("max_position_embeddings", 32768, high=MAX_CONTEXT)
    biased = f.boolean("attention_bias", False)
    rope = _rope(Fields({"partial_rotary_factor": 0.25, **f.values}, f.source), ("full_attention",), max_position)
    return {
        **common,
        "vocab_size": f.integer("vocab_size", 248320, high=MAX_VOCAB),
        "max_position_embeddings": max_position,
        "layer_types": layer_types,
        "rope": rope,
        "attention_bias": biased,
        "attention_out_bias": biased,
        "qk_norm": True,
        "attention_output_gate": True,
        "linear_attention": _linear_attention(f),
        "moe": moe,
        "mtp_num_hidden_layers": f.integer("mtp_num_hidden_layers", 0, low=0, high=MAX_LAYERS),
        "mtp_dedicated_embeddings": f.boolean("mtp_use_dedicated_embeddings", False),
        "tie_word_embeddings": f.boolean("tie_word_embeddings", False),
    }


def _linear_attention(f: Fields) -> LinearAttentionConfig:
    num_key_heads = f.integer("linear_num_key_heads", 16, high=MAX_HEADS)
    num_value_heads = f.integer("linear_num_value_heads", 32, high=MAX_HEADS)
    if num_value_heads % num_key_heads:
        f.reject("linear_num_value_heads", num_value_heads, f"a multiple of linear_num_key_heads ({num_key_heads})")
    return LinearAttentionConfig(
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_head_dim=f.integer("linear_key_head_dim", 128, high=MAX_HEAD_DIM),
        value_head_dim=f.integer("linear_value_head_dim", 128, high=MAX_HEAD_DIM),
        conv_width=f.integer("linear_conv_kernel_dim", 4, low=2, high=MAX_CONV_WIDTH),
    )


def _qwen3_5_moe(f: Fields) -> MoEConfig:
    if f.values.get("mlp_only_layers"):
        f.reject("mlp_only_layers", f.values["mlp_only_layers"], "no layers: each has its experts")
    num_experts = f.integer("num_experts", 256, high=MAX_EXPERTS)
    return MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=f.integer("num_experts_per_tok", 8, high=num_experts),
        intermediate_size=f.integer("moe_intermediate_size", 512, high=MAX_WIDTH),
        shared_intermediate_size=f.integer("shared_expert_intermediate_size", 512, high=MAX_WIDTH),
        normalize_top_k=f.boolean("norm_topk_prob", True),
    )


def _encoder(f: Fields, model_type: str) -> dict[str, Any]:
    """BERT and its siblings: learned positions (or relative ones, for MPNet), biases everywhere, LayerNorm."""
    if f.string("position_embedding_type", "absolute") != "absolute":
        f.reject("position_embedding_type", f.values["position_embedding_type"], '"absolute"')
    if model_type == "distilbert":
        names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
        names |= {"hidden_dim": "intermediate_size", "activation": "hidden_act"}
        f = Fields({**f.values, **{new: f.values[old] for old, new in names.items() if old in f.values}}, f.source)
    hidden_size = f.integer("hidden_size", 768, high=MAX_WIDTH)
    num_heads = f.integer("num_attention_heads", 12, high=MAX_HEADS)
    if hidden_size % num_heads:
        f.reject("num_attention_heads", num_heads, f"a divisor of hidden_size ({hidden_size})")
    num_layers = f.integer("num_hidden_layers", 6 if model_type == "distilbert" else 12, high=MAX_LAYERS)
    return {
        "task": "embed",
        "vocab_size": f.integer("vocab_size", 30527 if model_type == "mpnet" else 30522, high=MAX_VOCAB),
        "hidden_size": hidden_size,
        "intermediate_size": f.integer("intermediate_size", 3072, high=MAX_WIDTH),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": f.integer("max_position_embeddings", 512, high=MAX_CONTEXT),
        "norm_eps": f.number("layer_norm_eps", 1e-12, low=1e-15, high=1.0),
        "hidden_act": f.string("hidden_act", "gelu"),
        "layer_types": ("full_attention",) * num_layers,
        "rope": MappingProxyType({}),
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "query_scale": (hidden_size // num_heads) ** -0.5,
        "tie_word_embeddings": f.boolean("tie_word_embeddings", True),
    }


def _layer_types(
    f: Fields, default: list[LayerType], window: int | None, accepted: tuple[LayerType, ...] = LAYER_TYPES
) -> tuple[LayerType, ...]:
    value = f.values.get("layer_types")
    if value is None:
        return tuple(default)
    if not isinstance(value, list) or len(value) != len(default) or any(v not in accepted for v in value):
        f.reject("layer_types", value, f"{len(default)} entries, each of {', '.join(accepted)}")
    if "sliding_attention" in value and window is None:
        f.reject("sliding_window", None, "a window, because layer_types has sliding_attention")
    return tuple(value)


def _rope(f: Fields, layer_types: tuple[LayerType, ...], max_position: int) -> Mapping[str, RopeConfig]:
    """One RopeConfig per layer type that occurs, from ``rope_parameters`` or ``rope_theta`` and ``rope_scaling``."""
    given = f.mapping("rope_scaling") or f.mapping("rope_parameters") or {}
    theta = f.number("rope_theta", 10000.0, low=1e-3)
    partial = f.number("partial_rotary_factor", 1.0, low=1e-3, high=1.0)
    rope: dict[str, RopeConfig] = {}
    for kind in dict.fromkeys(layer_types):
        values = given.get(kind, given) if isinstance(given.get(kind), dict) else given
        rope[kind] = _rope_config(Fields(values, f.source), f, theta, partial, max_position)
    return MappingProxyType(rope)


def _gemma3_rope(f: Fields, layer_types: tuple[LayerType, ...], max_position: int) -> Mapping[str, RopeConfig]:
    """Gemma 3 has a base per layer type; the old spelling's ``rope_scaling`` is for full layers alone."""
    given = f.mapping("rope_parameters") or {}
    bases = {
        "full_attention": f.number("rope_theta", 1e6, low=1e-3),
        "sliding_attention": f.number("rope_local_base_freq", 1e4, low=1e-3),
    }
    rope: dict[str, RopeConfig] = {}
    for kind in dict.fromkeys(layer_types):
        values = dict(Fields(given, f.source).mapping(kind) or {})
        if kind == "full_attention":
            values |= f.mapping("rope_scaling") or {}
        rope[kind] = _rope_config(Fields(values, f.source), f, bases[kind], 1.0, max_position)
    return MappingProxyType(rope)


def _rope_config(values: Fields, f: Fields, theta: float, partial: float, max_position: int) -> RopeConfig:
    rope_type = values.string("rope_type", values.string("type", "default"))
    if rope_type == "su":  # the name longrope had at first
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        values.reject("rope_type", rope_type, ", ".join(ROPE_TYPES))
    known = ROPE_PARAMETERS[rope_type]
    parameters = {key: values.values[key] for key in known if values.values.get(key) is not None}
    checked = Fields(parameters, f.source)
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if key in parameters:
            checked.number(key, low=1e-6, high=1e6)
    if rope_type in ("linear", "dynamic", "llama3", "yarn"):
        checked.number("factor", low=1e-3, high=1e6)
    if rope_type in ("llama3", "yarn", "longrope"):
        original = f.values.get("original_max_position_embeddings")
        parameters.setdefault("original_max_position_embeddings", max_position if original is None else original)
        checked.integer("original_max_position_embeddings", low=2, high=MAX_CONTEXT)
    if rope_type == "llama3":
        low = checked.number("low_freq_factor", low=1e-6, high=1e6)
        high = checked.number("high_freq_factor", low=1e-6, high=1e6)
        if high <= low:
            checked.reject("high_freq_factor", high, f"more than low_freq_factor ({low})")
    if rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = parameters.get(name)
            if not isinstance(factors, list) or not 0 < len(factors) <= MAX_HEAD_DIM:
                checked.reject(name, factors, "a list of numbers, one per rotated pair")
            for factor in factors:
                Fields({name: factor}, f.source).number(name, low=1e-6, high=1e6)
    return RopeConfig(
        theta=values.number("rope_theta", theta, low=MIN_THETA),
        rope_type=rope_type,
        partial_rotary_factor=values.number("partial_rotary_factor", partial, low=1e-3, high=1.0),
        parameters=MappingProxyType(parameters),
    )


_FAMILIES: dict[str, Callable[[Fields, str], dict[str, Any]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama),
    "gemma3_text": _gemma3_text,
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), _qwen3_5),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "mpnet"), _encoder),
}

_MULTIMODAL = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Types with a nested ``text_config``, and that of their language model, which is all that is loaded."""


def supported_model_types() -> tuple[str, ...]:
    """Model types that a configuration may have."""
    return tuple(sorted(_FAMILIES))
