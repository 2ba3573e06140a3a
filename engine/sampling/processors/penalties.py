"""Makes tokens that were seen before less likely."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.base import LogitsProcessor, SamplingSequence, processors


class Penalties(LogitsProcessor):
    """Repetition (arXiv:1909.05858): logits of tokens of prompt and completion are divided by the penalty if
    positive, multiplied if negative. Then, of tokens of the completion: minus the presence penalty, and minus the
    frequency penalty for each occurrence, as OpenAI's API defines them.
    """

    order = 30
    keeps_argmax = False

    def applies(self, params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        device = logits.device
        seen = [sequence.token_counts for sequence in sequences]
        assert all(counts is not None for counts in seen), "a sequence with penalties counts its tokens"
        present = [counts for counts in seen if counts is not None]
        tokens = torch.cat([torch.frombuffer(counts.tokens, dtype=torch.int64) for counts in present]).to(device)
        counts = torch.cat([torch.frombuffer(counts.counts, dtype=torch.int64) for counts in present]).to(device)
        lengths = torch.tensor([len(counts.tokens) for counts in present], device=device)
        rows = torch.repeat_interleave(torch.arange(len(sequences), device=device), lengths)
        params = [sequence.sampling for sequence in sequences]
        repetition = _column([p.repetition_penalty for p in params], device)[rows]
        presence = _column([p.presence_penalty for p in params], device)[rows]
        frequency = _column([p.frequency_penalty for p in params], device)[rows]

        values = logits[rows, tokens]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= presence * (counts > 0) + frequency * counts
        logits[rows, tokens] = values
        return logits


def _column(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


processors.register("penalties")(Penalties())
