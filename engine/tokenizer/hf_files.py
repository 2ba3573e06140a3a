"""A tokenizer from the files of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import FormatError
from engine.loading.fields import Fields, read_json

MAX_TEMPLATE_BYTES = 1 << 20
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""What a directory may hold of a tokenizer; tokenizer.json is the one that is read for the vocabulary."""


@dataclass(slots=True, kw_only=True)
class TokenizerParts:
    """What a tokenizer is made of, whatever file it came from.

    Attributes:
        special_tokens: "bos_token" and the like to the token's text.
        config: for tokenizer_config.json.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def read_directory(path: Path) -> TokenizerParts:
    """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    Raises:
        FormatError: naming the file and the fault; a directory with a SentencePiece model alone is one.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        others = [p.name for p in path.glob("*.model")]
        hint = f"; {others[0]} alone is not read: save it once with transformers to convert it" if others else ""
        raise FormatError(f"{path}: holds no tokenizer.json{hint}")
    read_json(file)  # its faults are easier to understand than those of the next line
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise FormatError(f"{file}: {error}") from error
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    named = path / "special_tokens_map.json"
    values = {**(read_json(named) if named.is_file() else {}), **config}
    special = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = values.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            special[name] = token
    fields = Fields(config, str(path / "tokenizer_config.json"))
    flags = {
        name: fields.boolean(f"{name}_token", False) if fields.has(f"{name}_token") else None
        for name in ("add_bos", "add_eos")
    }
    return TokenizerParts(
        backend=backend,
        special_tokens=special,
        chat_template=_chat_template(path, config),
        add_bos=flags["add_bos"],
        add_eos=flags["add_eos"],
        config=config,
    )


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise FormatError(f"{file}: {file.stat().st_size} bytes; accepted: at most {MAX_TEMPLATE_BYTES}")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{file}: not UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; without a name, "default" is meant
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
