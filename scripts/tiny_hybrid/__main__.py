"""``make tiny-hybrid``: text, tokenizer, training, files, figures, card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from engine.models.qwen3_5_text import Qwen3_5ForCausalLM
from scripts.tiny_hybrid.card import card
from scripts.tiny_hybrid.files import save
from scripts.tiny_hybrid.measure import acceptance, score
from scripts.tiny_hybrid.text import HELD_OUT_BYTES, NUM_BYTES, encode, make_tokenizer, pages, read_text
from scripts.tiny_hybrid.training import Recipe, train

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "tiny-hybrid"
OUTPUT = ROOT / "tests" / "models" / "tiny-hybrid"
HELD_OUT_TOKENS = 40_000
SNIPPET_BYTES = range(3000, 4000)
"""Of the page that is kept beside the model: the first held-out one of such a length."""


def main() -> None:
    """Trains and writes everything."""
    torch.set_num_threads(1)  # the order of sums, and so the result, depends on it
    recipe = Recipe()
    text = read_text(CACHE)
    tokenizer = make_tokenizer(text)
    ids, _ = encode(tokenizer, pages(text, 0, NUM_BYTES - HELD_OUT_BYTES), recipe.num_tokens + 2)
    model, seconds = train(recipe, ids)
    finish(recipe, text, tokenizer, ids, model, seconds)


def finish(
    recipe: Recipe, text: bytes, tokenizer: Tokenizer, ids: np.ndarray, model: Qwen3_5ForCausalLM, seconds: float
) -> None:
    """Saves, measures what was saved, and writes the card."""
    save(model, tokenizer, OUTPUT)
    held_out = list(pages(text, NUM_BYTES - HELD_OUT_BYTES, NUM_BYTES))
    snippet = next(page for page in held_out if len(page.encode()) in SNIPPET_BYTES)
    (OUTPUT / "held_out.txt").write_text(snippet, encoding="utf-8", newline="")
    tail, num_bytes = encode(tokenizer, held_out, HELD_OUT_TOKENS)
    readme = card(
        recipe,
        seconds=seconds,
        parameters=sum(p.numel() for p in model.parameters()),
        mtp_parameters=sum(p.numel() for name, p in model.named_parameters() if name.startswith("mtp.")),
        num_bytes=(OUTPUT / "model.safetensors").stat().st_size,
        score=score(OUTPUT, tail, num_bytes, ids),
        snippet=score(OUTPUT, *_alone(tokenizer, snippet), ids),
        acceptance=acceptance(OUTPUT, tail),
    )
    (OUTPUT / "README.md").write_text(readme, encoding="utf-8")
    print(readme)


def _alone(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, int]:
    """A text's tokens without an end, and its bytes."""
    return np.array(tokenizer.encode(text).ids, dtype=np.uint16), len(text.encode())


if __name__ == "__main__":
    main()
