"""GGUF files against transformers: the same tokens from the same file, and the same weights under the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from engine.loading import open_checkpoint
from engine.tokenizer import Tokenizer
from tests.unit.loading_files import write_gguf


@pytest.fixture(scope="module")
def tokenizers(
    smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]
) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
    return Tokenizer.from_path(smollm2_gguf), smollm2_reference[1]


def test_smollm2_tokens_are_those_of_transformers(
    tokenizers: tuple[Tokenizer, transformers.PreTrainedTokenizerBase], shared: Path
) -> None:
    """Hard strings and WikiText lines give the same ids and text.

    Where they differ, transformers ignores that this vocabulary splits digits first (llama.cpp and the model's own
    tokenizer.json do), which shows where a digit other than 0-9 or several spaces precede a digit.
    """
    ours, theirs = tokenizers
    hard = (shared / "data/utf8-strings.inp").read_text(encoding="utf-8", errors="replace").split("__ggml_vocab_test__")
    lines = (shared / "data/wikitext2-raw.test.txt").read_text().splitlines()[:800]
    texts = [text for text in hard + lines if "½" not in text]
    assert len(texts) > 800
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_smollm2_chat_is_that_of_transformers(
    tokenizers: tuple[Tokenizer, transformers.PreTrainedTokenizerBase],
) -> None:
    ours, theirs = tokenizers
    messages = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    for opens in (False, True):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        assert ours.apply_chat_template(messages, add_generation_prompt=opens) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=opens)["input_ids"]
        assert ours.encode_chat(messages, add_generation_prompt=opens)[0] == ids


def test_smollm2_weights_are_those_of_transformers(smollm2_gguf: Path, smollm2_reference: tuple[Any, Any]) -> None:
    """Every tensor, dequantized and un-permuted, bit by bit."""
    expected = smollm2_reference[0].state_dict()
    checkpoint = open_checkpoint(smollm2_gguf)
    assert set(checkpoint.names()) == expected.keys() - {"lm_head.weight"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.get(name).to(torch.float32), expected[name]), name


SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL, rms_norm_eps=1e-5),
    "qwen2": transformers.Qwen2Config(**SMALL, rms_norm_eps=1e-5),
    "qwen3": transformers.Qwen3Config(**SMALL, rms_norm_eps=1e-5, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL, rms_norm_eps=1e-5, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, pad_token_id=0
    ),
    "bert": transformers.BertConfig(**SIZES, max_position_embeddings=64),
}


@pytest.mark.parametrize("architecture", MODELS)
def test_converted_models_come_back_as_they_were(architecture: str, tmp_path: Path) -> None:
    """A model converted as llama.cpp converts it has its own configuration, names and values again."""
    config = MODELS[architecture]
    if architecture == "bert":
        model: torch.nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    else:
        model = AutoModelForCausalLM.from_config(config)
    state = {name: value.clone() for name, value in model.state_dict().items() if "position_ids" not in name}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, value in state.items():  # fresh norms are all ones or zeros, which would hide a wrong shift
        state[name] = torch.randn_like(value)
    path = write_gguf(tmp_path / "m.gguf", converted(architecture, state), architecture, metadata(architecture))
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.names()) == set(state)
    for name, value in state.items():
        torch.testing.assert_close(checkpoint.get(name), value, rtol=0, atol=1e-6 if architecture == "gemma3" else 0)
    ours = checkpoint.config
    assert ours.model_type == config.model_type
    for key in (*SIZES, "max_position_embeddings"):
        assert getattr(ours, key) == getattr(config, key), key
    if architecture != "bert":
        assert (ours.num_key_value_heads, ours.head_dim) == (2, getattr(config, "head_dim", None) or 16)
        assert ours.tie_word_embeddings == config.tie_word_embeddings
        assert ours.layer_types == tuple(getattr(config, "layer_types", None) or ["full_attention"] * 2)


def converted(architecture: str, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """GGUF names by the gguf package's own table, and what convert_hf_to_gguf.py does to the values."""
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 2)
    tensors = {}
    for name, value in state.items():
        stem, suffix = name.rsplit(".", 1)
        array = value.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = 4 if stem.endswith("q_proj") else 2
            array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        tensors[f"{names.get_name(stem)}.{suffix}"] = array
    return tensors


def metadata(architecture: str) -> dict[str, object]:
    """The metadata of SIZES."""
    values: dict[str, object] = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-12,
    }
    if architecture in ("qwen3", "gemma3"):
        values |= {"attention.key_length": 32, "attention.value_length": 32}
    if architecture == "gemma3":
        values["attention.sliding_window"] = 8
    return {f"{architecture}.{key}": value for key, value in values.items()}
