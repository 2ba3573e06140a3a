"""What a model's files say about embedding with it. Free of torch, so that the front end can read the prefixes.

Source: the layout of sentence-transformers: ``modules.json`` lists Transformer, Pooling and perhaps Normalize;
``1_Pooling/config.json`` says how to pool; ``config_sentence_transformers.json`` holds the prefixes of queries and
documents. A GGUF file has ``<architecture>.pooling_type``, as llama.cpp numbers it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from engine.errors import FormatError
from engine.loading.fields import MAX_JSON_BYTES, Fields, read_json
from engine.loading.gguf_file import GGUFFile

Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")

_MODES: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_GGUF_TYPES: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
_MAX_PROMPTS = 256
_INSTRUCTED = re.compile(r"Instruct: .*\nQuery:( ?)", re.DOTALL)
"""The form in which Qwen3-Embedding and E5 take instructions; some end with a space."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prefixes of texts.

    Attributes:
        prefixes: name ("query", "document" …) to the prefix that goes before the text.
        default: name of the prefix that texts of no stated kind get; None: none.
    """

    prefixes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    default: str | None = None

    def prefix(self, *names: str) -> str:
        """The prefix of the first of ``names`` that there is, else the default one; "" if there is neither."""
        for name in (*names, self.default):
            if name is not None and name in self.prefixes:
                return self.prefixes[name]
        return ""

    def instructed(self, instruction: str) -> str | None:
        """The prefix of a query for a task in the caller's own words, in the form of the model's own query prefix.

        Returns: None for a model whose prefixes have no place for an instruction.
        """
        for name in ("query", *self.prefixes):
            if (form := _INSTRUCTED.fullmatch(self.prefixes.get(name, ""))) is not None:
                return f"Instruct: {instruction}\nQuery:{form[1]}"
        return None


NO_PROMPTS = Prompts()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """How a model's authors embed with it.

    Attributes:
        pooling: from hidden states of tokens to one vector.
        normalize: whether vectors are scaled to length 1.
        prompts: prefixes of texts.
    """

    pooling: Pooling
    normalize: bool = True
    prompts: Prompts = NO_PROMPTS


@lru_cache(maxsize=64)
def read_embedding_config(path: Path, *, causal: bool) -> EmbeddingConfig:
    """The embedding configuration that lies beside a model's weights.

    Args:
        path: the model's directory, or its .gguf file.
        causal: decides what holds where the files say nothing: mean pooling for an encoder, the last token for a
            causal model, normalised either way.

    Raises:
        FormatError: the files are malformed, or ask for a step that is not supported (a Dense module, maximum pooling).
    """
    default: Pooling = "last" if causal else "mean"
    if path.is_file():
        return EmbeddingConfig(pooling=_gguf_pooling(path) or default)
    pooling, normalize = _modules(path)
    return EmbeddingConfig(pooling=pooling or default, normalize=normalize, prompts=read_prompts(path))


def read_prompts(path: Path) -> Prompts:
    """The prefixes alone, which hold whatever the model's pooling is.

    Args:
        path: the model's directory, or its .gguf file, which has none.

    Raises:
        FormatError: they are malformed.
    """
    settings = _optional(path / "config_sentence_transformers.json")
    prefixes = _prompts(settings)
    default = settings.string("default_prompt_name") if settings.has("default_prompt_name") else None
    if default is not None and default not in prefixes:
        settings.reject("default_prompt_name", default, f"one of the prompts ({', '.join(prefixes) or 'none'})")
    return Prompts(MappingProxyType(prefixes), default)


def _optional(file: Path) -> Fields:
    return Fields(read_json(file) if file.is_file() else {}, str(file))


def _prompts(settings: Fields) -> dict[str, str]:
    prompts = settings.mapping("prompts") or {}
    if len(prompts) > _MAX_PROMPTS or not all(isinstance(text, str) for text in prompts.values()):
        settings.reject("prompts", prompts, f"at most {_MAX_PROMPTS} names with a string each")
    return prompts


def _modules(path: Path) -> tuple[Pooling | None, bool]:
    """Pooling and whether to normalise, from modules.json; without that file nothing is said about pooling."""
    file = path / "modules.json"
    if not file.is_file():
        return None, True
    pooling: Pooling | None = None
    normalize = False
    for module in _read_list(file):
        fields = Fields(module if isinstance(module, dict) else {}, str(file))
        kind = fields.string("type").rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(_inside(path, fields))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            fields.reject("type", fields.string("type"), "Transformer, Pooling and Normalize modules")
    return pooling, normalize


def _inside(path: Path, module: Fields) -> Path:
    """The module's own folder, which never lies outside of the model's."""
    name = module.string("path")
    folder = (path / name).resolve()
    if not folder.is_relative_to(path.resolve()):
        module.reject("path", name, "a folder inside the model's directory")
    return folder / "config.json"


def _pooling(file: Path) -> Pooling:
    fields = Fields(read_json(file), str(file))
    if fields.has("pooling_mode"):
        name = fields.string("pooling_mode")
        if name not in _NAMES:
            fields.reject("pooling_mode", name, ", ".join(_NAMES))
        return _NAMES[name]
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key in fields.values if key.startswith(prefix) and fields.boolean(key, False)]
    if len(modes) != 1 or modes[0] not in _MODES:
        fields.reject("pooling_mode", ", ".join(modes) or "none", f"exactly one of {', '.join(_MODES)}")
    return _MODES[modes[0]]


def _read_list(file: Path) -> list[Any]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{file}: {file.stat().st_size} bytes; accepted: at most {MAX_JSON_BYTES}")
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, list):
        raise FormatError(f"{file}: holds a JSON {type(value).__name__}; accepted: a list of modules")
    return value


def _gguf_pooling(path: Path) -> Pooling | None:
    metadata = GGUFFile(path).metadata
    fields = Fields(metadata, str(path))
    key = f"{fields.string('general.architecture')}.pooling_type"
    number = fields.integer(key, 0, low=0)
    if number == 0:  # llama.cpp's NONE: the file leaves it to the caller
        return None
    if number not in _GGUF_TYPES:
        fields.reject(key, number, "1 (mean), 2 (cls) or 3 (last)")
    return _GGUF_TYPES[number]
