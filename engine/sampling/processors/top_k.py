"""Keeps the k likeliest tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, processors


class TopK(LogitsProcessor):
    """Masks tokens less likely than the k-th likeliest; those as likely as it all stay. Selects, and does not sort."""

    order = 50
    keeps_argmax = True

    def applies(self, params: SamplingParams) -> bool:
        return params.top_k > 0

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        vocab_size = logits.shape[-1]
        ks = [min(s.sampling.top_k, vocab_size) for s in sequences]
        best = logits.topk(max(ks), dim=-1).values
        kth = best.gather(-1, torch.tensor(ks, device=logits.device).sub_(1).unsqueeze(-1))
        return logits.masked_fill_(logits < kth, -torch.inf)


processors.register("top_k")(TopK())
