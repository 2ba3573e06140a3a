"""The sampler for CPUs: one pass of a kernel in place of some of torch's operations over the vocabulary.

The kernel (engine/ops/cpu/choose.cpp) gives the tokens of engine.sampling.sampler, which decides what it leaves, as it
does for devices; and all where there are no kernels. Processors that change which token is the likeliest, of single
logits, run before it, and log-probabilities after it, as there.

Proof: tests/unit/test_cpu_choose.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops import cpu
from engine.sampling.base import SamplingSequence, processors
from engine.sampling.on_device import DeviceSampler, parameters
from engine.sampling.sampler import SampledTokens, add_logprobs, applies, check_rows, process_rows


class CpuSampler(DeviceSampler):
    """Takes the place of Sampler, and hands it what it cannot do."""

    def __init__(self) -> None:
        super().__init__()
        every = (processors.get(name) for name in processors.names())
        self._changing = sorted((p for p in every if not p.keeps_argmax), key=lambda p: p.order)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Sequence[SamplingSequence]) -> SampledTokens:
        """See Sampler.sample."""
        check_rows(logits, sequences)
        if not cpu.takes(logits):
            return self._reference.sample(logits, sequences)
        steps = [
            (processor, rows)
            for processor in self._changing
            if (rows := [row for row, s in enumerate(sequences) if applies(processor, s)])
        ]
        raw = logits
        if steps:
            raw = logits.clone()
            for processor, rows in steps:
                logits = process_rows(processor, logits, rows, sequences)
        params, _ = parameters(sequences, logits.device)
        tokens: list[int] = cpu.choose(logits, params).tolist()
        if steps:  # a processor may hide that the model's own logits are not finite
            tokens = [-1 if own < 0 else token for own, token in zip(cpu.choose(raw).tolist(), tokens, strict=True)]
        sampled = self.settle(tokens, sequences, lambda rows: raw[rows])
        if asking := [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]:
            of_asking = raw if len(asking) == len(sequences) else raw[asking]
            add_logprobs(sampled, of_asking, asking, sequences)
        return sampled
