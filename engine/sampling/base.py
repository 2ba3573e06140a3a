"""What the sampler needs of a sequence, and what a logits processor is.

Shapes: N rows, one per sequence of the batch; V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from torch import Tensor

from engine.registry import Registry
from engine.request import SamplingParams
from engine.sampling.counts import TokenCounts

MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: logits that float32 can tell apart are then further apart than any draw reaches."""


class SamplingSequence(Protocol):
    """A sequence as the sampler sees it (engine.core.sequence.Sequence)."""

    @property
    def sampling(self) -> SamplingParams:
        """What was asked."""
        ...

    @property
    def num_output_tokens(self) -> int:
        """Completion tokens so far; numbers the random draws."""
        ...

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """End-of-sequence and stop tokens."""
        ...

    @property
    def sampling_key(self) -> bytes:
        """Key of the random draws (engine.sampling.random)."""
        ...

    @property
    def token_counts(self) -> TokenCounts | None:
        """Tokens seen so far; None only where no penalty is asked for."""
        ...


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is taken, without a draw."""
    return params.temperature < MIN_TEMPERATURE


class LogitsProcessor(ABC):
    """Changes the logits of the rows that ask for it.

    A row's result depends on that row alone, never on what else is in the batch.

    Attributes:
        order: processors run in ascending order.
        keeps_argmax: True: greedy rows have no need of it, and none is passed to it.
    """

    order: ClassVar[int]
    keeps_argmax: ClassVar[bool]

    @abstractmethod
    def applies(self, params: SamplingParams) -> bool:
        """Whether a request with these parameters asks for it."""

    @abstractmethod
    def process(self, logits: Tensor, sequences: list[SamplingSequence]) -> Tensor:
        """Logits after processing.

        Args:
            logits: [N, V] float32, of the rows that ask for it; may be overwritten. -inf: the token cannot be chosen.
            sequences: of these rows.

        Returns: [N, V] float32.
        """


processors: Registry[LogitsProcessor] = Registry("logits processor", "engine.sampling.processors")
