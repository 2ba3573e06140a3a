"""A tokenizer of bytes with a chat template: every text has tokens, and every token is within a vocabulary of 300."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.tokenizer.token_bytes import byte_alphabet

BOS, EOS = 1, 2
BYTE_OFFSET = 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_tiny_tokenizer(directory: Path) -> Path:
    """Writes the tokenizer's files into a directory; byte b has id BYTE_OFFSET + b."""
    directory.mkdir(parents=True, exist_ok=True)
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate(specials)}
    vocabulary |= {character: BYTE_OFFSET + byte for character, byte in byte_alphabet().items()}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
