"""The model as a Hugging Face directory, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from engine.models.qwen3_5_text import Qwen3_5ForCausalLM
from scripts.tiny_hybrid.text import END, END_ID
from scripts.tiny_hybrid.training import CONFIG


def save(model: Qwen3_5ForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes weights, configurations and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file keeps it to its owner
    _write(directory / "config.json", CONFIG)
    _write(directory / "generation_config.json", {"eos_token_id": END_ID, "pad_token_id": END_ID})
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": END,
            "pad_token": END,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    )


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
