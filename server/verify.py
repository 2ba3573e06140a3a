"""``whet-server verify``: figures that show whether a model on disk is computed rightly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import FormatError

if TYPE_CHECKING:
    from engine.loading import Checkpoint
    from engine.verification.figures import Figure

COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def verify_model(
    path: Path, *, num_layers: int | None, num_tokens: int, rank: int, num_threads: int, seed: int, as_json: bool
) -> bool:
    """Runs every check on the model and prints what it found.

    Returns: whether none failed.
    Raises:
        EngineError: the model cannot be read, does not fit into memory, or a parameter is out of its range.
    """
    # Before torch starts its threads: as workers do, lest they spin while they wait for each other.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from engine.verification.verify import VerifyParams, open_for_verification, verify

    begin = time.monotonic()
    checkpoint = open_for_verification(path, num_layers)
    token_ids, source = _tokens(checkpoint, num_tokens, seed)
    params = VerifyParams(
        path=path, token_ids=token_ids, num_layers=num_layers, adapter_rank=rank, num_threads=num_threads, seed=seed
    )
    config = checkpoint.config
    about = {
        "model": str(checkpoint.path),
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_tokens": len(token_ids),
        "tokens": source,
    }
    figures = _collect(verify(params), quiet=as_json)
    about["seconds"] = round(time.monotonic() - begin, 1)
    if as_json:
        _print_json(about, figures)
    else:
        _print_table(about, figures)
    return all(figure.status != "failed" for figure in figures)


def _tokens(checkpoint: Checkpoint, num_tokens: int, seed: int) -> tuple[list[int], str]:
    """Ids of a text where the model has a tokenizer, or else random ones; and which."""
    from engine.tokenizer import Tokenizer
    from engine.verification.text import TEXT
    from engine.verification.verify import random_tokens

    try:
        ids = Tokenizer.from_path(checkpoint.path).encode(TEXT)
    except FormatError:
        return random_tokens(checkpoint, num_tokens, seed), "random"
    if max(ids) >= checkpoint.config.vocab_size:
        return random_tokens(checkpoint, num_tokens, seed), "random"
    while len(ids) < num_tokens:
        ids = ids + ids
    return ids[:num_tokens], "text"


def _collect(figures: Iterable[Figure], *, quiet: bool) -> list[Figure]:
    """All figures; on a terminal, the last one is shown while the next is made."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    found: list[Figure] = []
    with console.status("loading"):
        for figure in figures:
            found.append(figure)
            if console.is_terminal:
                console.print(f"({figure.group}) {figure.name}: {figure.status}")
    return found


def _print_json(about: dict[str, Any], figures: list[Figure]) -> None:
    counts = {status: sum(figure.status == status for figure in figures) for status in COLOURS}
    print(json.dumps({**about, **counts, "figures": [asdict(figure) for figure in figures]}))


def _print_table(about: dict[str, Any], figures: list[Figure]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    table = Table(title=None, box=None, pad_edge=False)
    for name, justify in (("", "left"), ("check", "left"), ("figure", "right"), ("accepted", "right")):
        table.add_column(name, justify=justify, no_wrap=name != "check")  # type: ignore[arg-type]
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for figure in sorted(figures, key=lambda figure: figure.group):
        table.add_row(
            f"({figure.group})",
            figure.name,
            "" if figure.value is None else f"{figure.value:.1e}",
            "" if figure.accepted is None else f"{figure.accepted:.1e}",
            f"[{COLOURS[figure.status]}]{figure.status}[/]",
            _escaped(figure.detail),
        )
    console.print(
        f"{about['model']}: {about['model_type']}, {about['num_layers']} layers, {about['num_tokens']} tokens of "
        f"{'a text' if about['tokens'] == 'text' else 'random ids'}, {about['seconds']} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(table, highlight=False)
    console.print(summary(figures), markup=False, highlight=False, soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def summary(figures: list[Figure]) -> str:
    """The last line: counts, and what did not run with its reason."""
    counts = ", ".join(f"{sum(f.status == status for f in figures)} {status}" for status in COLOURS)
    reasons: dict[str, list[str]] = {}
    for figure in figures:
        if figure.status == "skipped":
            reasons.setdefault(figure.detail, []).append(f"({figure.group})")
    skipped = "; ".join(f"{' '.join(sorted(set(groups)))} {reason}" for reason, groups in reasons.items())
    return f"{counts}. Not run: {skipped}" if skipped else f"{counts}. Everything ran"
