"""The sampler for CPUs: one pass of a kernel in place of some of torch's operations over the vocabulary.

The kernel (engine/ops/cpu/choose.cpp) gives the tokens of engine.sampling.sampler, which decides what it leaves, as it
does for devices; and all where there are no kernels.

Proof: tests/unit/test_cpu_choose.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.ops import cpu
from engine.sampling.base import SamplingSequence
from engine.sampling.on_device import DeviceSampler, parameters
from engine.sampling.sampler import SampledTokens


class CpuSampler(DeviceSampler):
    """Takes the place of Sampler, and hands it what it cannot do."""

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Sequence[SamplingSequence]) -> SampledTokens:
        """See Sampler.sample."""
        if not cpu.takes(logits):
            return self._reference.sample(logits, sequences)
        return super().sample(logits, sequences)

    def _choose(self, logits: Tensor, sequences: Sequence[SamplingSequence]) -> list[int]:
        params, _ = parameters(sequences, logits.device)
        return cpu.choose(logits, params).tolist()
