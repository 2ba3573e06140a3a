"""Nucleus sampling: keeps the smallest set of likeliest tokens whose probability reaches p (arXiv:1904.09751)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, processors

NUCLEUS_TOKENS = 512
"""Tokens to sort at first. Most nuclei lie within; only rows whose nucleus does not have their whole vocabulary
sorted."""


class TopP(LogitsProcessor):
    """Masks a token if those likelier than it have probability p or more already; the likeliest always stays."""

    order = 60
    keeps_argmax = True

    def applies(self, params: SamplingParams) -> bool:
        return params.top_p < 1.0

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        top_p = torch.tensor([s.sampling.top_p for s in sequences], dtype=torch.float64, device=logits.device)
        top_p = top_p.unsqueeze(-1)
        normaliser = logits.logsumexp(-1, keepdim=True)
        vocab_size = logits.shape[-1]
        best, tokens = logits.topk(min(NUCLEUS_TOKENS, vocab_size), dim=-1)
        keep, mass = nucleus(best, normaliser, top_p)
        filtered = torch.full_like(logits, -torch.inf)
        filtered.scatter_(-1, tokens, best.masked_fill_(~keep, -torch.inf))
        # What top_k left of a row may be fewer tokens than were sorted, without ever reaching p in rounded sums.
        whole = ((mass < top_p) & torch.isfinite(best[:, -1:])).squeeze(-1)
        if vocab_size > NUCLEUS_TOKENS and bool(whole.any()):
            rows = whole.nonzero().squeeze(-1)
            best, tokens = logits[rows].sort(dim=-1, descending=True)
            keep, _ = nucleus(best, normaliser[rows], top_p[rows])
            filtered[rows] = torch.full_like(best, -torch.inf).scatter_(
                -1, tokens, best.masked_fill_(~keep, -torch.inf)
            )
        return filtered


def nucleus(best: Tensor, normaliser: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the likeliest tokens are in the nucleus, and the probability of all given.

    Args:
        best: [N, K] float32, descending logits.
        normaliser: [N, 1] float32, log of the sum over the whole row.
        top_p: [N, 1] float64.

    Returns: [N, K] bool; [N, 1] float64.
    """
    probs = (best - normaliser).exp()
    # float64: over a large vocabulary the rounding of float32 sums would move the edge of the nucleus.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    keep = cumulative - probs < top_p
    keep[:, 0] = True
    return keep, cumulative[:, -1:]


processors.register("top_p")(TopP())
