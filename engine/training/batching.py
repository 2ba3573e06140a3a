"""Which examples make up which step, and how a step's batch is cut into forwards.

Everything here is a function of the configuration, the seed and the step alone, never of time or of what ran before, so
that a resumed run continues with the very batches that the uninterrupted one would have had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from engine.context import ForwardContext, LayerRunner, packed_context
from engine.lora.adapter import Adapter, LoRABatch
from engine.training.dataset import Example
from engine.training.seeds import derive_seed


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Order of the examples in one epoch, counted from 0."""
    if not shuffle:
        return list(range(num_examples))
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order: list[int] = torch.randperm(num_examples, generator=generator).tolist()
    return order


class BatchOrder:
    """The batches of a run. The last one of an epoch may be smaller; none reaches into the next.

    Args:
        batch_size: examples of one optimizer step.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return math.ceil(self._num_examples / self._batch_size)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step, counted from 1."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(self._num_examples, self._seed, epoch, self._shuffle)
            self._epoch = epoch
        return self._order[index * self._batch_size : (index + 1) * self._batch_size]

    def epoch_of(self, step: int) -> float:
        """Epochs completed after a step, with the fraction of the present one."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch + min(index * self._batch_size / self._num_examples, 1.0)


@dataclass(slots=True)
class MicroBatch:
    """Examples of one forward, laid end to end. T tokens, N predictions that count.

    Attributes:
        token_ids: [T] int64.
        lengths: of the examples.
        rows: [N] int64, positions whose hidden state predicts a token that counts.
        targets: [N] int64, those tokens.
    """

    token_ids: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> MicroBatch:
        """Packs examples, none of them empty."""
        token_ids = torch.from_numpy(np.concatenate([e.token_ids for e in examples]).astype(np.int64))
        # The mask marks the predicted token; its predecessor predicts it. A first token is never marked, so no
        # prediction reaches from one example into another.
        marked = torch.from_numpy(np.concatenate([e.loss_mask for e in examples])).nonzero()[:, 0]
        return cls(
            token_ids=token_ids.to(device),
            lengths=[len(e) for e in examples],
            rows=(marked - 1).to(device),
            targets=token_ids[marked].to(device),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        """N."""
        return len(self.targets)

    def context(
        self,
        adapter: Adapter | None,
        generator: torch.Generator | None = None,
        run_layer: LayerRunner | None = None,
    ) -> ForwardContext:
        """For a forward of these examples; each attends to itself alone."""
        lora = None if adapter is None else LoRABatch([(adapter, 0, self.num_tokens)], self.num_tokens, generator)
        return packed_context(self.lengths, device=self.token_ids.device, lora=lora, run_layer=run_layer)


def micro_batches(
    examples: Sequence[Example],
    *,
    max_tokens: int,
    parts: int = 1,
    packing: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[MicroBatch]:
    """Cuts a batch into forwards. Losses are normalised over the whole batch, so the cut does not change the gradient.

    Args:
        max_tokens: of one forward; an example that is longer runs alone.
        parts: forwards at least, where there are as many examples (gradient accumulation).
        packing: False: one example a forward.
    """
    parts = min(parts, len(examples))
    bounds = [round(part * len(examples) / parts) for part in range(parts + 1)]
    for begin, end in pairwise(bounds):
        taken: list[Example] = []
        num_tokens = 0
        for example in examples[begin:end]:
            if taken and (not packing or num_tokens + len(example) > max_tokens):
                yield MicroBatch.of(taken, device)
                taken, num_tokens = [], 0
            taken.append(example)
            num_tokens += len(example)
        yield MicroBatch.of(taken, device)
