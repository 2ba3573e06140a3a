"""Keeps a completion from ending before it has its least length."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, processors


class MinTokens(LogitsProcessor):
    """Masks end-of-sequence and stop tokens while fewer than min_tokens are made. After logit_bias, so that no bias
    brings them back."""

    order = 20
    keeps_argmax = False

    def applies(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        rows: list[int] = []
        tokens: list[int] = []
        for row, sequence in enumerate(sequences):
            if sequence.num_output_tokens < sequence.sampling.min_tokens:
                rows.extend([row] * len(sequence.ending_token_ids))
                tokens.extend(sequence.ending_token_ids)
        if rows:
            index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
            logits[index] = -torch.inf
        return logits


processors.register("min_tokens")(MinTokens())
