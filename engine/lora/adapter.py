"""Adapters in memory, and the adapters of one batch.

Shapes: r rank, I in_features, O out_features, T tokens; E experts, M pairs of token and expert, sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.context import FrozenProduct
from engine.lora.segments import SegmentTable, takes_rows
from engine.ops.low_rank import add_low_rank, low_rank_linear
from engine.ops.moe import grouped_linear


@dataclass(slots=True)
class Adapter:
    """Low-rank updates of some linear modules (arXiv:2106.09685). In training, A and B are the float32 masters.

    Attributes:
        modules: full module name ("model.layers.0.self_attn.q_proj") to (A [r, I], B [O, r]); of experts stacked in
            one parameter, its name ("model.layers.0.mlp.experts.down_proj") to (A [E, r, I], B [E, O, r]).
        alpha: read from the adapter's own configuration; never assumed equal to the rank.
        use_rslora: scale by alpha / sqrt(r) (arXiv:2312.03732) in place of alpha / r.
        dropout: probability on the input of A; only a trainer sets it.
        alphas: modules whose alpha differs (PEFT's alpha_pattern). A rank that differs shows in the shape of A.
    """

    name: str
    version: int
    rank: int
    alpha: float
    use_rslora: bool = False
    modules: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dropout: float = 0.0
    alphas: dict[str, float] = field(default_factory=dict)
    _digest: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def rank_of(self, name: str) -> int:
        """Rank of that module's update."""
        return self.modules[name][0].shape[-2]

    def scaling(self, name: str) -> float:
        """What B A x of that module is multiplied by."""
        rank = self.rank_of(name)
        return self.alphas.get(name, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def weights_digest(self) -> bytes:
        """Identifies what the adapter does to the base, whatever its name and version: equal digests mean equal keys,
        values and states. b"" for one that does nothing, as all its B are zero.

        Computed once, at about 1 GB/s, and kept: for adapters whose tensors change no more.
        """
        if self._digest is None:
            hasher, acts = blake2b(digest_size=32, person=b"whet-adapter"), False
            for name in sorted(self.modules):
                if not bool(self.modules[name][1].any()) or self.scaling(name) == 0.0:
                    continue  # A is finite, as the loader sees to
                acts = True
                hasher.update(f"{len(name)} {name} {self.scaling(name)!r}".encode())
                for tensor in self.modules[name]:
                    hasher.update(f" {tensor.dtype} {tuple(tensor.shape)} ".encode())
                    hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._digest = hasher.digest() if acts else b""
        return self._digest

    def num_parameters(self) -> int:
        return sum(a.numel() + b.numel() for a, b in self.modules.values())

    def delta_weight(self, name: str) -> Tensor:
        """What that module's update adds to its weight, scaling * B A, in the type of B: [O, I], or [E, O, I]."""
        a, b = self.modules[name]
        return b @ a * self.scaling(name)

    def delta(self, name: str, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """scaling * B A x for x [T, I]: [T, O], in the type of x; None where this module has no update."""
        factors = self.factors(name, x, generator)
        return None if factors is None else F.linear(*factors)

    def factors(self, name: str, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor] | None:
        """scaling * A x for x [T, I], [T, r], and B [O, r], whose product is the update: scaled while it is narrow."""
        pair = self.modules.get(name)
        if pair is None:
            return None
        a, b = pair
        x = self._dropped(x, generator)
        return F.linear(x, a.to(x.dtype)) * self.scaling(name), b.to(x.dtype)

    def linear(self, name: str, x: Tensor, layer: FrozenProduct, generator: torch.Generator | None = None) -> Tensor:
        """The layer's product for x [T, I] plus the update: [T, O]."""
        if name not in self.modules:
            return layer.product(x)
        dropped = None if self.dropout == 0.0 else self._dropped(x, generator)
        return low_rank_linear(layer, x, *self.modules[name], self.scaling(name), dropped)

    def add(self, name: str, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """y [T, O] plus the update for x [T, I]."""
        if name not in self.modules:
            return y
        return add_low_rank(y, self._dropped(x, generator), *self.modules[name], self.scaling(name))

    def _dropped(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.dropout == 0.0:
            return x
        keep = torch.empty_like(x).bernoulli_(1.0 - self.dropout, generator=generator)
        return x * keep / (1.0 - self.dropout)

    def delta_grouped(self, name: str, x: Tensor, counts: Tensor) -> Tensor | None:
        """scaling * B[e] A[e] x of stacked experts for rows x [M, I], counts [E] of each expert: [M, O]; None where
        they have no update. Without dropout, as in PEFT, which refuses it here."""
        pair = self.modules.get(name)
        if pair is None:
            return None
        assert self.dropout == 0.0
        a, b = pair
        low = grouped_linear(x, a.to(x.dtype), counts)
        return grouped_linear(low, b.to(low.dtype), counts) * self.scaling(name)


class LoRABatch:
    """The adapters of one packed batch; sequences of the base have none.

    Args:
        segments: (adapter, first token, one past the last token), in ascending order without overlap.
        num_tokens: T of the batch.
        generator: for dropout in training.
    """

    def __init__(
        self,
        segments: Sequence[tuple[Adapter, int, int]],
        num_tokens: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self._segments = segments
        self._generator = generator
        self._table: SegmentTable | None = None
        self._whole = len(segments) == 1 and segments[0][1:] == (0, num_tokens)

    def linear(self, name: str, x: Tensor, layer: FrozenProduct) -> Tensor:
        """The layer's product for x [T, I] plus each segment's update: [T, O]."""
        if self._whole:
            return self._segments[0][0].linear(name, x, layer, self._generator)
        return self.add(name, x, layer.product(x))

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y [T, O] plus each segment's update for x [T, I]; y is used up."""
        if self._whole:
            return self._segments[0][0].add(name, x, y, self._generator)
        if takes_rows(x, y) and not any(adapter.dropout for adapter, _, _ in self._segments):
            if self._table is None:
                self._table = SegmentTable(self._segments, x.device, x.dtype)
            if self._table.add(name, x, y):
                return y
        if torch.is_grad_enabled():
            y = y.clone()
        for adapter, start, end in self._segments:
            delta = adapter.delta(name, x[start:end], self._generator)
            if delta is not None:
                y[start:end] += delta
        return y

    def add_grouped(self, name: str, x: Tensor, y: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        """y [M, O] plus the updates of stacked experts for x [M, I].

        Each adapter's rows are one grouped product, in which a row's sums are those that it has alone.

        Args:
            tokens: [M] int64, the token that each row is of.
            counts: [E] int64, rows of each expert; they sum to M.
        """
        if self._whole:
            delta = self._segments[0][0].delta_grouped(name, x, counts)
            return y if delta is None else y + delta
        spans: dict[int, tuple[Adapter, list[tuple[int, int]]]] = {}
        for adapter, start, end in self._segments:
            if name in adapter.modules:
                spans.setdefault(id(adapter), (adapter, []))[1].append((start, end))
        if not spans:
            return y
        experts = torch.repeat_interleave(counts, output_size=len(tokens))
        if torch.is_grad_enabled():
            y = y.clone()
        for adapter, ranges in spans.values():
            chosen = torch.zeros_like(tokens, dtype=torch.bool)
            for start, end in ranges:
                chosen |= (tokens >= start) & (tokens < end)
            rows = chosen.nonzero().flatten()
            delta = adapter.delta_grouped(name, x[rows], torch.bincount(experts[rows], minlength=len(counts)))
            assert delta is not None
            y.index_add_(0, rows, delta.to(y.dtype))
        return y
