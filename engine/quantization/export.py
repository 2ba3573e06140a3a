"""The files beside the weights of a checkpoint that we write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.durable import write_synced

COPIED = (
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "*_Normalize/config.json",
    "LICENSE*",
)
"""What a source directory may hold besides weights, configuration and tokenizer that the new one needs as well."""

_CAUSAL_LM = {
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
"""transformers' class of the language model that a multimodal one wraps."""


def write_config(
    directory: Path, config: ModelConfig, quantization_config: Mapping[str, Any] | None, *, dtype: str, tied: bool
) -> None:
    """Writes config.json.

    The source's own keys are kept. The language model inside a multimodal wrapper is written as the model that it is.

    Args:
        quantization_config: None: nothing is quantized.
        dtype: of the kept weights, as Hugging Face names it.
        tied: whether the head still shares the embeddings.
    """
    values = dict(config.raw)
    if isinstance(values.get("text_config"), Mapping):
        values = {
            **{k: v for k, v in values.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")},
            **values["text_config"],
            "architectures": [_CAUSAL_LM[config.model_type]],
        }
    values.pop("torch_dtype", None)  # the older name of dtype
    values.pop("quantization_config", None)
    values |= {"model_type": config.model_type, "dtype": dtype}
    if quantization_config is not None:
        values["quantization_config"] = dict(quantization_config)
    if config.task == "generate":
        values["tie_word_embeddings"] = tied
    elif (name := _first(values.get("architectures"))).endswith("ForCausalLM"):
        values["architectures"] = [name.removesuffix("ForCausalLM") + "Model"]  # what is written has no head
    write_config_values(directory, values)


def write_config_values(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes config.json with these contents; read-only maps of a ModelConfig may be among them."""

    def plain(value: object) -> object:
        if isinstance(value, Mapping):
            return dict(value)
        raise TypeError(f"config.json holds a {type(value).__name__}, which JSON has not")

    write_synced(directory / "config.json", json.dumps(values, indent=2, default=plain) + "\n")


def write_generation_config(directory: Path, config: ModelConfig) -> None:
    """Writes generation_config.json with the ids that the model's file names; for a source that has none itself."""
    values: dict[str, Any] = {}
    if config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if config.eos_token_ids:
        values["eos_token_id"] = list(config.eos_token_ids)
    if config.pad_token_id is not None:
        values["pad_token_id"] = config.pad_token_id
    write_synced(directory / "generation_config.json", json.dumps(values, indent=2) + "\n")


def copy_companions(source: Path, directory: Path) -> None:
    """Copies what COPIED names from a source directory, below the same relative names."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            target = directory / file.relative_to(source)
            if file.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _first(names: object) -> str:
    return str(names[0]) if isinstance(names, list) and names else ""
