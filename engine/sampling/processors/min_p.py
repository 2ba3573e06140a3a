"""Drops tokens that are much less likely than the likeliest (arXiv:2407.01082)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, processors


class MinP(LogitsProcessor):
    """Masks tokens whose probability is below min_p times that of the likeliest.

    That is a distance between logits, so it takes no softmax and does not depend on what other filters removed.
    """

    order = 70
    keeps_argmax = True

    def applies(self, params: SamplingParams) -> bool:
        return params.min_p > 0.0

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        min_p = torch.tensor([s.sampling.min_p for s in sequences], dtype=torch.float32, device=logits.device)
        lowest = logits.amax(-1, keepdim=True) + min_p.log().unsqueeze(-1)
        return logits.masked_fill_(logits < lowest, -torch.inf)


processors.register("min_p")(MinP())
