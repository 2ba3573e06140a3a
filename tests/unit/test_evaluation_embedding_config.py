"""read_embedding_config: what a model's files say, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from engine.errors import FormatError
from engine.evaluation.embedding_config import NO_PROMPTS, Prompts, read_embedding_config

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def write(path: Path, modules: Any, pooling: Any = None, settings: Any = None) -> Path:
    (path / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if settings is not None:
        (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return path


def test_minilm(minilm_dir: Path) -> None:
    """The real model: mean pooling, normalised, no prefixes."""
    config = read_embedding_config(minilm_dir, causal=False)
    assert (config.pooling, config.normalize, config.prompts) == ("mean", True, NO_PROMPTS)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_modes(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    """Flags and names; without a Normalize module vectors keep their length."""
    config = read_embedding_config(write(tmp_path, [TRANSFORMER, POOLING], pooling), causal=False)
    assert (config.pooling, config.normalize) == (expected, False)


def test_prompts(tmp_path: Path) -> None:
    """Prefixes of queries and documents, and the one that applies by default."""
    settings = {"prompts": {"query": "search: ", "document": ""}, "default_prompt_name": "document"}
    path = write(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode": "cls"}, settings)
    config = read_embedding_config(path, causal=False)
    assert config.prompts.prefixes == {"query": "search: ", "document": ""}
    assert config.prompts.default == "document"
    assert config.normalize


def test_which_prefix_a_text_gets() -> None:
    """That of the first name there is; else the default one; else none."""
    prompts = Prompts({"query": "q: ", "passage": "p: "}, "passage")
    assert prompts.prefix("query") == "q: "
    assert prompts.prefix("document", "passage") == "p: "
    assert prompts.prefix("other") == prompts.prefix() == "p: "
    assert Prompts({"query": "q: "}).prefix("document") == NO_PROMPTS.prefix() == ""


def test_instructions_take_the_form_of_the_models_query_prompt() -> None:
    """With the space that some end with; models without such a prompt take none."""
    assert Prompts({"query": "Instruct: Find it\nQuery:"}).instructed("Be\nbrief") == "Instruct: Be\nbrief\nQuery:"
    assert Prompts({"web": "Instruct: Find it\nQuery: "}).instructed("Find") == "Instruct: Find\nQuery: "
    both = Prompts({"web": "Instruct: a\nQuery: ", "query": "Instruct: b\nQuery:"})
    assert both.instructed("c") == "Instruct: c\nQuery:"
    for prefixes in ({}, {"query": "query: "}, {"query": "Instruct: a\nQuery: b"}, {"query": "An Instruct: a\nQuery:"}):
        assert Prompts(prefixes).instructed("c") is None


def test_defaults_without_files(tmp_path: Path) -> None:
    """An encoder pools the mean, a causal model takes the last token; both normalise."""
    assert read_embedding_config(tmp_path, causal=False).pooling == "mean"
    assert read_embedding_config(tmp_path, causal=True).pooling == "last"
    assert read_embedding_config(tmp_path, causal=True).normalize


@pytest.mark.parametrize(("number", "expected"), [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls"), (3, "last")])
def test_gguf(tmp_path: Path, number: int | None, expected: str) -> None:
    """llama.cpp's pooling_type; none said means the default."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    if number is not None:
        writer.add_uint32("bert.pooling_type", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_embedding_config(tmp_path / "model.gguf", causal=False).pooling == expected


@pytest.mark.parametrize(
    ("modules", "pooling", "settings", "message"),
    [
        ([POOLING], {"pooling_mode_max_tokens": True}, None, "pooling_mode is 'max_tokens'"),
        ([POOLING], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None, "exactly one of"),
        ([POOLING], {"pooling_mode": "weightedmean"}, None, "'weightedmean'; accepted: mean, cls, lasttoken"),
        ([POOLING], {"pooling_mode_mean_tokens": "yes"}, None, "accepted: true or false"),
        ([POOLING], None, None, "cannot be read as JSON"),
        ([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], None, None, "models.Dense'; accepted"),
        ([{"path": "../../etc", "type": "x.Pooling"}], None, None, "a folder inside the model's directory"),
        ([{"path": "/etc", "type": "x.Pooling"}], None, None, "a folder inside the model's directory"),
        (["Pooling"], None, None, "type is None; accepted: a string"),
        ({"0": POOLING}, None, None, "accepted: a list of modules"),
        ([], None, {"prompts": {"query": 3}}, "names with a string each"),
        ([], None, {"prompts": {}, "default_prompt_name": "query"}, "default_prompt_name is 'query'"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, modules: Any, pooling: Any, settings: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_embedding_config(write(tmp_path, modules, pooling, settings), causal=False)


def test_the_front_end_can_read_it_without_torch() -> None:
    program = "import sys, engine.evaluation.embedding_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
