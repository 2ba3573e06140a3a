"""Flattens or sharpens the distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, is_greedy, processors


class Temperature(LogitsProcessor):
    """(logits - max) / temperature. The shift changes no probability and keeps a small temperature from overflowing."""

    order = 40
    keeps_argmax = True

    def applies(self, params: SamplingParams) -> bool:
        return params.temperature != 1.0 and not is_greedy(params)

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        temperatures = torch.tensor([s.sampling.temperature for s in sequences], device=logits.device)
        return logits.sub_(logits.amax(-1, keepdim=True)).div_(temperatures.unsqueeze(-1))


processors.register("temperature")(Temperature())
