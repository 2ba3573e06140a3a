"""Small model files that tests write: GGUF through the gguf package's own writer, safetensors directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
"""Byte-fallback tokens of a SentencePiece vocabulary."""

WORDS = [
    "▁",
    "▁a",
    "▁b",
    "ab",
    "▁ab",
    "a",
    "b",
    "c",
    "é",
    "▁é",
    "世",
    "界",
    "世界",
    "▁the",
    "t",
    "h",
    "e",
    "th",
    "he",
    "the",
]


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file of these tensors (float32 unless ``types`` says what to quantize them to)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of TINY_LLAMA."""
    values = {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of TINY_LLAMA under their GGUF names, values as a GGUF file has them."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (32, 64), "output_norm.weight": (64,), "output.weight": (32, 64)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_norm.weight": (64,),
            f"{block}ffn_norm.weight": (64,),
            f"{block}attn_q.weight": (64, 64),
            f"{block}attn_k.weight": (32, 64),
            f"{block}attn_v.weight": (32, 64),
            f"{block}attn_output.weight": (64, 64),
            f"{block}ffn_gate.weight": (96, 64),
            f"{block}ffn_up.weight": (96, 64),
            f"{block}ffn_down.weight": (64, 96),
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_directory(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] = TINY_LLAMA) -> Path:
    """A Hugging Face directory of one safetensors file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")
    return path


def sentencepiece_metadata() -> dict[str, Any]:
    """A SentencePiece BPE vocabulary with byte fallback, of a few words."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *WORDS]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(WORDS))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def bert_metadata() -> dict[str, Any]:
    """A WordPiece vocabulary as llama.cpp's converter spells it."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁hello", "▁world", "s", "▁,", "▁'", "▁!", "▁he", "llo"]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 3, 3, *[1] * (len(tokens) - 5)],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
