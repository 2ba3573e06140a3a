"""Adds what the request says to single logits."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, processors

FLOAT32_MAX = torch.finfo(torch.float32).max


class LogitBias(LogitsProcessor):
    """logits[token] += bias. Biases beyond float32 count as its largest value: they decide alike."""

    order = 10
    keeps_argmax = False

    def applies(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        rows: list[int] = []
        tokens: list[int] = []
        biases: list[float] = []
        for row, sequence in enumerate(sequences):
            bias = sequence.sampling.logit_bias
            rows.extend([row] * len(bias))
            tokens.extend(bias.keys())
            biases.extend(min(FLOAT32_MAX, max(-FLOAT32_MAX, value)) for value in bias.values())
        index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
        addends = torch.tensor(biases, dtype=torch.float32, device=logits.device)
        logits[index] = (logits[index] + addends).clamp_(max=FLOAT32_MAX)
        return logits


processors.register("logit_bias")(LogitBias())
