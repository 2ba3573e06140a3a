"""A tiny random model laid out as Qwen/Qwen3-Embedding-0.6B is: bare tensor names, an end token after each text,
sentence-transformers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

END, TURN_END = "<|endoftext|>", "<|im_end|>"
TASK = "Given a web search query, retrieve relevant passages that answer the query"
PROMPTS = {"query": f"Instruct: {TASK}\nQuery:", "document": ""}

_CORPUS = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: what is a passage? "
    "The capital of China is Beijing. Gravity is a force that attracts two bodies towards each other. "
)


def save_tiny_embedder(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A two-layer Qwen3 saved from transformers' bare Qwen3Model, with a byte-level BPE of 400 tokens.

    Args:
        overrides: of the Qwen3Config.
    """
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    vocab_size = _save_tokenizer(directory)
    values: dict[str, Any] = {
        "vocab_size": vocab_size + 5,  # published tables are padded, too
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    model = Qwen3Model(Qwen3Config(**(values | overrides)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    entries = [
        {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for name, path, kind in modules
    ]
    pooling = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in ("cls_token", "mean_tokens", "lasttoken")}
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, **pooling, "include_prompt": True})
    )
    (directory / "modules.json").write_text(json.dumps(entries))
    settings = {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return directory


def _save_tokenizer(directory: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS] * 4, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]),
        ]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END,
        "padding_side": "left",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    return int(tokenizer.get_vocab_size())
