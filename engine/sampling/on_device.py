"""The sampler for devices that the host should not wait for: one read a step, of the tokens that were chosen.

It does what engine.sampling.sampler does, to the same numbers in the same order, but for all rows at once and by
operations whose shapes do not depend on what is in them. The uniform number of a draw depends on the sequence's key and
count alone, so the host sends it with the parameters. What takes a look at the numbers is left to that sampler, which
is told by a -1 in a token's place: logits that are not finite, and nuclei of more tokens than are sorted here. It also
takes rows that ask for more than these filters, such as penalties or log-probabilities. Captured decode steps hold
``choose`` as their last part (engine.core.cuda_graphs).

Shapes: N rows, V vocabulary. Proof: tests/unit/test_sampling_on_device.py, tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.ops.transfer import to_device
from engine.sampling.base import SamplingSequence, is_greedy, processors
from engine.sampling.processors.top_p import NUCLEUS_TOKENS, nucleus
from engine.sampling.random import uniform
from engine.sampling.sampler import SampledTokens, Sampler, check_rows, draw

HANDLED = ("temperature", "top_k", "top_p", "min_p")
"""The logits processors that are done here."""


class DeviceSampler:
    """Takes the place of Sampler, and hands it what it cannot do."""

    def __init__(self) -> None:
        self._reference = Sampler()
        self._others = [processors.get(name) for name in processors.names() if name not in HANDLED]

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Sequence[SamplingSequence]) -> SampledTokens:
        """See Sampler.sample."""
        check_rows(logits, sequences)
        if not self.takes(sequences):
            return self._reference.sample(logits, sequences)
        tokens = choose(logits, *parameters(sequences, logits.device))
        return self.settle(tokens.tolist(), sequences, lambda rows: logits[rows])

    def settle(
        self, token_ids: list[int], sequences: Sequence[SamplingSequence], logits: Callable[[list[int]], Tensor]
    ) -> SampledTokens:
        """What ``choose`` gave, with the rows that it left to the plain sampler.

        Args:
            token_ids: of the sequences, for which ``takes`` holds; becomes a part of what is returned.
            logits: of some rows, [n, V] float32, in memory of their own; asked for where a row was left.
        """
        sampled = SampledTokens(token_ids, [None] * len(token_ids))
        left = [row for row, token in enumerate(token_ids) if token < 0]
        if left:
            rest = self._reference.sample(logits(left), [sequences[row] for row in left])
            for i, row in enumerate(left):
                token_ids[row] = rest.token_ids[i]
                if i in rest.errors:
                    sampled.errors[row] = rest.errors[i]
        return sampled

    def takes(self, sequences: Sequence[SamplingSequence]) -> bool:
        """Whether ``choose`` does all that the sequences ask for."""
        asked = [s.sampling for s in sequences]
        return all(p.logprobs is None and not any(other.applies(p) for other in self._others) for p in asked)


def parameters(sequences: Sequence[SamplingSequence], device: torch.device) -> tuple[Tensor | None, bool]:
    """What ``choose`` needs of the sequences, on the device: params and filters."""
    numbers, filters = row_numbers(sequences)
    return to_device(numbers, device, torch.float64).view(-1, 5) if numbers else None, filters


def row_numbers(sequences: Sequence[SamplingSequence], ahead: int = 0) -> tuple[list[float], bool]:
    """What ``choose`` needs of the sequences, on the host.

    Args:
        ahead: tokens of each that have been chosen and are not known here yet.

    Returns: params row after row, none where all rows are greedy; filters.
    """
    if all(is_greedy(s.sampling) for s in sequences):
        return [], False
    numbers: list[float] = []
    filters = False
    for s in sequences:
        params = s.sampling
        if is_greedy(params):
            numbers += (0.0, 0.0, 0, 1.0, 0.0)
        else:
            filters |= params.top_k > 0 or params.top_p < 1.0
            number = uniform(s.sampling_key, s.num_output_tokens + ahead)
            numbers += (number, params.temperature, params.top_k, params.top_p, params.min_p)
    return numbers, filters


def choose(logits: Tensor, params: Tensor | None, filters: bool) -> Tensor:
    """A token for each row, or -1 where it takes the host to tell.

    Args:
        logits: [N, V] float32; not changed.
        params: [N, 5] float64: uniform number, temperature (0: greedy), top_k (0: all), top_p, min_p. None: all rows
            are greedy.
        filters: whether some row has a top_k or a top_p.

    Returns: [N] int64.
    """
    best, likeliest = logits.max(-1)
    known = torch.isfinite(best)  # a NaN anywhere in the row is its maximum
    if params is None:
        return likeliest.where(known, -1)
    uniforms, temperatures, ks, top_p, min_p = params.unbind(-1)
    greedy = temperatures == 0.0
    temperatures = temperatures.where(~greedy, 1.0).float().unsqueeze(-1)
    scores = logits.where(temperatures == 1.0, (logits - best.unsqueeze(-1)) / temperatures)
    if filters:
        scores, certain = _filter(scores, ks.long().unsqueeze(-1), top_p.unsqueeze(-1))
        known &= certain | greedy
    lowest = scores.amax(-1, keepdim=True) + min_p.float().log().unsqueeze(-1)
    drawn = draw(scores.masked_fill(scores < lowest, -torch.inf), uniforms)
    return likeliest.where(greedy, drawn).where(known, -1)


def _filter(scores: Tensor, ks: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """top_k and top_p (engine.sampling.processors) from the likeliest NUCLEUS_TOKENS.

    Args:
        scores: [N, V] float32.
        ks, top_p: [N, 1] int64 and float64.

    Returns: [N, V] float32; [N] bool, False for rows that need more tokens sorted than that.
    """
    vocab_size = scores.shape[-1]
    count = min(NUCLEUS_TOKENS, vocab_size)
    best, tokens = scores.topk(count, dim=-1)
    kth = best.gather(-1, ks.clamp(1, count) - 1).where((ks > 0) & (ks <= count), -torch.inf)
    certain = (ks <= count) | (ks >= vocab_size)
    scores = scores.masked_fill(scores < kth, -torch.inf)
    best = best.masked_fill(best < kth, -torch.inf)
    keep, mass = nucleus(best, scores.logsumexp(-1, keepdim=True), top_p)
    if count < vocab_size:
        certain &= (mass >= top_p) | ~torch.isfinite(best[:, -1:]) | (top_p >= 1.0)
    inside = torch.full_like(scores, -torch.inf).scatter_(-1, tokens, best.masked_fill(~keep, -torch.inf))
    return inside.where(top_p < 1.0, scores), certain.squeeze(-1)
