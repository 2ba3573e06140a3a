"""ModelConfig from GGUF metadata. Free of torch.

The metadata is rewritten into the keys that a ``config.json`` of the same model would have, and read by the same
normaliser; so a GGUF file and a Hugging Face directory cannot disagree, and ``ModelConfig.raw`` is a config.json that
other programs load.

Source: the hparams of each architecture in llama.cpp's ``src/llama-model.cpp`` and its ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.config import ModelConfig
from engine.errors import FormatError
from engine.loading.fields import Fields
from engine.loading.gguf_file import GGUFFile
from engine.loading.hf_config import MAX_LAYERS, MAX_WIDTH, model_config

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "bert": ("bert", "BertModel"),
}
"""``general.architecture`` to Hugging Face's model type and class."""

GEMMA3_27B_LAYERS = 62
"""The one Gemma 3 whose query scale is not head_dim ** -0.5; GGUF does not store it, llama.cpp goes by the depth."""


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        FormatError: malformed, out of range, or of an unsupported architecture.
    """
    return model_config(gguf_config_json(file), str(file.path))


def gguf_config_json(file: GGUFFile) -> dict[str, Any]:
    """The metadata in the keys of a Hugging Face config.json."""
    source = str(file.path)
    general = Fields(file.metadata, source)
    arch = general.string("general.architecture")
    if arch not in ARCHITECTURES:
        general.reject("general.architecture", arch, ", ".join(sorted(ARCHITECTURES)))
    # Keys without the architecture's prefix, which all that follow share.
    prefix = f"{arch}."
    f = Fields({k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}, source)
    if f.integer("expert_count", 0, low=0):
        f.reject("expert_count", f.values["expert_count"], "a dense model (no experts)")
    model_type, class_name = ARCHITECTURES[arch]
    heads = f.integer("attention.head_count")
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": _vocab_size(file, f),
        "hidden_size": f.integer("embedding_length", high=MAX_WIDTH),
        "intermediate_size": f.integer("feed_forward_length", high=MAX_WIDTH),
        "num_hidden_layers": f.integer("block_count", high=MAX_LAYERS),
        "num_attention_heads": heads,
        "max_position_embeddings": f.integer("context_length"),
        **{
            key: file.metadata[f"tokenizer.ggml.{key}"]
            for key in ("bos_token_id", "eos_token_id")
            if f"tokenizer.ggml.{key}" in file.metadata
        },
    }
    if "tokenizer.ggml.padding_token_id" in file.metadata:
        config["pad_token_id"] = file.metadata["tokenizer.ggml.padding_token_id"]
    if model_type == "bert":
        return {**config, **_bert(file, f)}
    end_of_turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None:
        config["eos_token_id"] = [t for t in (config.get("eos_token_id"), end_of_turn) if t is not None]
    config |= {
        "num_key_value_heads": f.integer("attention.head_count_kv", heads),
        "rms_norm_eps": f.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if f.has(name):
            config.setdefault("head_dim", f.integer(name))
            if config["head_dim"] != f.integer(name):
                f.reject(name, f.values[name], f"the head size of the keys ({config['head_dim']})")
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    rope = _rope(file, f, int(config["max_position_embeddings"]))
    if model_type != "gemma3_text":
        return {**config, "rope_parameters": rope}
    return {**config, **_gemma3(f, config, rope)}


def _vocab_size(file: GGUFFile, f: Fields) -> int:
    """Rows of the embedding; metadata does not always say, and files exist that pad the one and not the other."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{file.path}: the GGUF file has no matrix token_embd.weight")
    return embedding.shape[0]


def _rope(file: GGUFFile, f: Fields, max_position: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": f.number("rope.freq_base", 10000.0, low=1e-3)}
    kind = f.string("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": f.number("rope.scaling.factor", low=1e-3)}
        if f.has("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = f.integer("rope.scaling.original_context_length")
    elif kind != "none":
        f.reject("rope.scaling.type", kind, "none, linear, yarn")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return rope
    # Llama 3's scaling arrives as the divisors themselves. Long RoPE with the same list for short and long contexts
    # and no attention factor says exactly that, in terms that Hugging Face configurations have.
    if rope["rope_type"] != "default" or factors.type_id != 0 or factors.num_bytes > 4 * MAX_WIDTH:
        raise FormatError(f"{file.path}: rope_freqs.weight must be float32, without another rope scaling beside it")
    divisors = file.data(factors).view("<f4").astype(np.float64).tolist()
    return rope | {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": max_position,
    }


def _gemma3(f: Fields, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    num_layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    pattern = f.values.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        sliding = [bool(p) for p in pattern]
    else:
        period = f.integer("attention.sliding_window_pattern", 6, high=MAX_LAYERS)
        sliding = [(i + 1) % period != 0 for i in range(num_layers)]
    if "rope.freq_base" not in f.values:
        rope["rope_theta"] = 1e6
    extra: dict[str, Any] = {
        "head_dim": config.get("head_dim", 256),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": f.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": f.number("rope.freq_base_swa", 10000.0, low=1e-3),
            },
        },
        "final_logit_softcapping": f.optional_number("final_logit_softcapping", low=1e-3),
        "attn_logit_softcapping": f.optional_number("attn_logit_softcapping", low=1e-3),
    }
    extra["query_pre_attn_scalar"] = hidden // heads if num_layers == GEMMA3_27B_LAYERS else extra["head_dim"]
    return extra


def _bert(file: GGUFFile, f: Fields) -> dict[str, Any]:
    types = file.tensors.get("token_types.weight")
    return {
        "layer_norm_eps": f.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "type_vocab_size": types.shape[0] if types is not None and len(types.shape) == 2 else 1,
    }
