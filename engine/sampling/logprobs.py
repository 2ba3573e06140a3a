"""Log-probabilities of chosen tokens, their ranks and the likeliest alternatives.

All are of the model itself: from logits before bias, penalties, temperature and filters.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import ShapeError
from engine.request import TokenLogprob

CHUNK_ELEMENTS = 1 << 23
"""Logits to normalise at a time: 32 MiB in float32."""


@torch.inference_mode()
def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """What the model thinks of given tokens.

    Args:
        logits: [N, V] float32; not changed.
        token_ids: N chosen tokens.
        num_top: N numbers of alternatives to report.

    Returns: N entries; the chosen token has its own log-probability and rank whether or not it is among the top.
    Raises: ShapeError: the three differ in length.
    """
    count, vocab_size = logits.shape
    if not count == len(token_ids) == len(num_top):
        raise ShapeError(f"{count} rows of logits, {len(token_ids)} tokens, {len(num_top)} numbers of alternatives")
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    entries: list[TokenLogprob] = []
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        entries += _chunk(logits[part], token_ids[part], num_top[part])
    return entries


def prompt_logprobs(logits: Tensor, next_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of a stretch of a prompt.

    Args:
        logits: [N, V] float32, at positions p … p + N - 1 of the prompt.
        next_ids: N tokens of the prompt, at positions p + 1 … p + N.
        num_top: alternatives to report at each.

    Returns: entries for positions p + 1 … p + N.
    """
    return token_logprobs(logits, next_ids, [num_top] * len(next_ids))


def _chunk(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    chosen = torch.tensor(list(token_ids), device=logits.device).unsqueeze(-1)
    logits = logits.float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen_logits = logits.gather(-1, chosen)
    values = (chosen_logits - normaliser).squeeze(-1).tolist()
    ranks = (logits > chosen_logits).sum(-1).add_(1).tolist()
    best, best_ids = logits.topk(max(num_top), dim=-1)
    top_values, top_ids = (best - normaliser).tolist(), best_ids.tolist()
    return [
        TokenLogprob(
            token_id=token,
            logprob=values[row],
            rank=ranks[row],
            top=list(zip(top_ids[row][:wanted], top_values[row][:wanted], strict=True)),
        )
        for row, (token, wanted) in enumerate(zip(token_ids, num_top, strict=True))
    ]
