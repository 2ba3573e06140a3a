"""Tokenizers from GGUF metadata and Hugging Face directories: special tokens, limits, saving, broken files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine.errors import FormatError, InvalidArgumentError, OutOfRangeError
from engine.tokenizer import Tokenizer
from engine.tokenizer.token_bytes import byte_alphabet
from tests.conftest import REPOSITORY
from tests.tiny_embedder import save_tiny_embedder
from tests.unit.loading_files import TINY_LLAMA, bert_metadata, sentencepiece_metadata, write_gguf


def byte_level_metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """All bytes, a few merges, a control token and a user-defined one that is not in the byte alphabet."""
    alphabet = sorted(byte_alphabet())
    merges = ["a b", "Ġ a", "Ġa b", "1 2"]
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges), "abab", "<|end|>", "<think 世>"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }
    return {**values, **changes}


def from_metadata(folder: Path, metadata: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    return Tokenizer.from_path(write_gguf(folder / "t.gguf", {}, architecture, metadata))


def pieces(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def test_control_and_user_defined_tokens_stay_whole(tmp_path: Path) -> None:
    """Both are one id; only the control token is special, so only it is left out of text."""
    tokenizer = from_metadata(tmp_path, byte_level_metadata())
    ids = tokenizer.encode("ab<|end|><think 世>ab")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "ab<think 世>ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab<|end|><think 世>ab"
    assert tokenizer.special_ids == {tokenizer.eos_token_id}
    assert tokenizer.vocab_size == 256 + 4 + 3


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġa", "Ġ", "12", "ab", "ab"]),
        ("smollm", ["Ġa", "Ġ", "1", "2", "ab", "ab"]),
        ("qwen2", ["Ġa", "Ġ", "1", "2", "ab", "ab"]),
        ("llama-bpe", ["Ġa", "Ġ", "12", "abab"]),
    ],
)
def test_pre_tokenizer_kinds_split_as_their_models_were_trained(tmp_path: Path, pre: str, expected: list[str]) -> None:
    """Digits alone, in runs, or in threes; Llama 3 takes a word of the vocabulary before merging."""
    assert pieces(from_metadata(tmp_path, byte_level_metadata(pre)), " a 12abab") == expected


def test_beginning_of_sequence_follows_the_flag(tmp_path: Path) -> None:
    """The flag if there is one, or else what the kind of vocabulary does."""
    for pre, flag, expected in [
        ("gpt-2", None, 0),
        ("gpt-2", True, 1),
        ("llama-bpe", None, 1),
        ("llama-bpe", False, 0),
    ]:
        extra = {} if flag is None else {"tokenizer.ggml.add_bos_token": flag}
        tokenizer = from_metadata(tmp_path, byte_level_metadata(pre, **extra))
        assert tokenizer.encode("ab").count(tokenizer.bos_token_id) == expected
        assert tokenizer.bos_token_id not in tokenizer.encode("ab", add_special_tokens=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["A", "<|endoftext|>"]),
        ({"add_bos_token": False}, ["A", "<|endoftext|>"]),
        ({"add_bos_token": False, "add_eos_token": False}, ["A", "<|endoftext|>"]),
        ({"add_eos_token": True}, ["A", "<|endoftext|>", "<|im_end|>"]),
        ({"add_eos_token": False, "eos_token": "<|endoftext|>"}, ["A"]),
        ({"add_bos_token": True, "bos_token": "<|im_end|>"}, ["<|im_end|>", "A", "<|endoftext|>"]),
    ],
)
def test_flags_speak_of_their_own_tokens_alone(tmp_path: Path, flags: dict[str, Any], expected: list[str]) -> None:
    """What else the template of tokenizer.json adds stays: Qwen3-Embedding says add_bos_token: false, and ends texts
    with its padding token."""
    path = save_tiny_embedder(tmp_path / "qwen")
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["add_bos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config | flags))
    tokenizer = Tokenizer.from_path(path)
    assert [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode("A")] == expected


def test_sentencepiece_merges_are_recovered_from_scores(tmp_path: Path) -> None:
    """The best score merges first; characters without a token fall back to bytes."""
    tokenizer = from_metadata(tmp_path, sentencepiece_metadata())
    assert pieces(tokenizer, "ab the") == ["▁ab", "▁the"]
    assert pieces(tokenizer, "世界ü") == ["▁", "世界", "<0xC3>", "<0xBC>"]


def test_sentencepiece_agrees_with_its_own_library(shared: Path, tmp_path: Path) -> None:
    """Real text over the 512-token vocabulary of stories260K, against the sentencepiece library."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from tests.unit.test_tokenizer_streaming import stories_metadata

    tokenizer = from_metadata(tmp_path, stories_metadata())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(shared / "models/stories260K/tok512.model"))
    lines = (shared / "data/tinyshakespeare.txt").read_text().splitlines()[:300]
    for line in [line for line in lines if line.strip()]:
        # The library also collapses spaces; this vocabulary's metadata does not say so.
        text = " ".join(line.split())
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_wordpiece_spelling_is_undone(tmp_path: Path) -> None:
    """llama.cpp's marks become ## again, so BERT's own tokenisation results."""
    tokenizer = from_metadata(tmp_path, bert_metadata(), "bert")
    ids = tokenizer.encode("Hello worlds, hé!")
    assert [tokenizer.id_to_token(i) for i in ids] == ["[CLS]", "hello", "world", "##s", ",", "he", "!", "[SEP]"]
    assert tokenizer.decode(ids) == "hello worlds, he!"


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model"),
    "unknown pre-tokenizer": ({"tokenizer.ggml.pre": "magic"}, "tokenizer.ggml.pre"),
    "types too short": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type"),
    "merge of three": ({"tokenizer.ggml.merges": ["a b c"]}, "merges"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["zz yy"]}, "vocabulary"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokens"),
    "a token without end": ({"tokenizer.ggml.tokens": ["a" * 5000]}, "512"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_faults_are_named(tmp_path: Path, fault: str) -> None:
    changes, named = FAULTS[fault]
    with pytest.raises(FormatError, match=named) as caught:
        from_metadata(tmp_path, byte_level_metadata(**changes))
    assert "t.gguf" in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_gguf_vocabularies_raise_format_errors_alone(tmp_path: Path, data: st.DataObject) -> None:
    """A file with bytes changed makes a tokenizer or a FormatError."""
    path = write_gguf(tmp_path / "f.gguf", {}, metadata=sentencepiece_metadata())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    fault = path.name
    try:
        tokenizer = Tokenizer.from_path(path)
        tokenizer.decode(tokenizer.encode("ab the 世界"))
    except FormatError as error:
        fault = str(error)
    assert path.name in fault


def test_directory_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(FormatError, match=r"tokenizer\.json.*tokenizer\.model.*transformers"):
        Tokenizer.from_path(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": {"type": "BPE"}}', b"\xff" * 9])
def test_malformed_tokenizer_json_is_a_format_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.from_path(tmp_path)


def test_truncation_and_padding_of_a_file_are_not_applied(minilm_dir: Path) -> None:
    """all-MiniLM's tokenizer.json truncates to 128 and pads to 128; the service does neither behind one's back."""
    tokenizer = Tokenizer.from_path(minilm_dir)
    assert len(tokenizer.encode("word " * 500)) == 502
    assert len(tokenizer.encode("word")) == 3


def test_limits_and_surrogates(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer.from_path(smollm2_gguf)
    with pytest.raises(OutOfRangeError, match="5 tokens; accepted: at most 4"):
        tokenizer.encode("1 2 3", max_tokens=4)
    with pytest.raises(InvalidArgumentError, match=r"U\+D83D at 2"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("source", ["smollm2", "minilm", "spm"])
def test_saved_tokenizers_are_read_back_by_transformers(
    tmp_path: Path, smollm2_gguf: Path, minilm_dir: Path, source: str
) -> None:
    """save writes a directory from which transformers and this class make the same tokenizer."""
    spm = write_gguf(tmp_path / "spm.gguf", {}, metadata=sentencepiece_metadata())
    ours = Tokenizer.from_path({"smollm2": smollm2_gguf, "minilm": minilm_dir, "spm": spm}[source])
    out = tmp_path / "saved"
    ours.save(out)
    if source != "minilm":
        (out / "config.json").write_text(json.dumps(TINY_LLAMA))
    else:
        shutil.copyfile(minilm_dir / "config.json", out / "config.json")
    theirs, again = AutoTokenizer.from_pretrained(out), Tokenizer.from_path(out)
    for text in ["Hello world 12", "ab the 世界 ü", "<|im_start|>user\nx<|im_end|>", " a  b", "👍🏽"]:
        assert ours.encode(text) == again.encode(text) == theirs.encode(text)
    assert (again.bos_token_id, again.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    if ours.has_chat_template:
        messages = [{"role": "user", "content": "Hi"}]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == ours.apply_chat_template(messages) == again.apply_chat_template(messages)


def test_front_end_needs_no_torch() -> None:
    """Importing and using a tokenizer loads neither torch nor transformers."""
    code = (
        "import sys; from engine.tokenizer import Tokenizer; from engine.loading import embedded_models\n"
        "for path in embedded_models().values(): Tokenizer.from_path(path).encode('x')\n"
        "sys.exit(bool({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
