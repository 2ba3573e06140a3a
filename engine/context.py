"""The tensors of one forward, passed explicitly.

Shapes: T tokens of all sequences laid end to end, S sequences, B blocks of the cache, P block size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class FrozenProduct(Protocol):
    """A product by a weight that gets no gradient; its results are in memory of their own."""

    def product(self, x: Tensor) -> Tensor:
        """x [T, I] times W transposed, with or without a bias: [T, O]."""
        ...

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Of ``product`` for x: grad [T, O] times W, [T, I]."""
        ...


class LoRADelta(Protocol):
    """What a Linear asks of the adapters of a batch (engine.lora.adapter.LoRABatch)."""

    def linear(self, name: str, x: Tensor, layer: FrozenProduct) -> Tensor:
        """The product of x by module ``name``, which is ``layer``, plus its low-rank update; both [T, ·]."""
        ...

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y plus the low-rank update of module ``name`` for input x; both [T, ·]."""
        ...

    def add_grouped(self, name: str, x: Tensor, y: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        """y plus the low-rank updates of the stacked experts ``name`` for rows x sorted by expert; both [M, ·].
        ``tokens`` [M] tells the token of each row, ``counts`` [E] the rows of each expert."""
        ...


State = tuple["Tensor", ...]
"""What a stage of a layer hands to the next."""

Stage = Callable[[State], State]


class LayerRunner(Protocol):
    """How a decoder layer is run (engine.training.recompute)."""

    def __call__(self, layer: nn.Module, x: Tensor, ctx: ForwardContext, *args: Tensor) -> Tensor:
        """layer(x, ctx, *args)."""
        ...


@dataclass(slots=True)
class PagedCache:
    """Keys and values of all attention layers in blocks.

    Attributes:
        keys, values: one tensor per attention layer, each [B, P, H_kv, head_dim]; written in place.
        block_size: P.
    """

    keys: list[Tensor]
    values: list[Tensor]
    block_size: int


@dataclass(slots=True)
class RecurrentStates:
    """What recurrent layers carry from step to step, in slots; slot 0 is never a sequence's.

    Attributes:
        windows: one tensor per recurrent layer, [slots, W - 1, C] float32: the last inputs of its convolution.
        matrices: one per recurrent layer, [slots, H_v, K, V] float32. Both written in place.
    """

    windows: list[Tensor]
    matrices: list[Tensor]

    def copy(self, source: int, target: int) -> None:
        """Slot ``target`` becomes a copy of ``source``, in all layers."""
        for tensor in (*self.windows, *self.matrices):
            tensor[target].copy_(tensor[source])

    def copy_each(self, sources: Tensor, targets: Tensor) -> None:
        """``copy`` of several, [n] int64 both, in a number of operations that does not depend on n."""
        for tensor in (*self.windows, *self.matrices):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))


@dataclass(frozen=True, slots=True)
class StateSave:
    """A state to keep on the way: that of sequence ``row`` of the batch after its first ``num_tokens`` new tokens, at
    least 1, into ``slot``."""

    row: int
    num_tokens: int
    slot: int


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a batch of one new token per sequence, each with a past, has on the device: kernels read it there, so that
    a captured step can be replayed with other numbers in the same places.

    Attributes:
        rows: [S] int64, 0 to S - 1: each sequence's token.
        kv_lens: [S] int64, tokens visible to each sequence's token.
        state_slots: [S] int64, slots of the recurrent states; None without any.
    """

    rows: Tensor
    kv_lens: Tensor
    state_slots: Tensor | None


@dataclass(slots=True)
class ForwardContext:
    """One packed batch.

    Without ``cache`` each sequence attends to itself alone (training, scoring, embedding). With ``cache`` the new keys
    and values are stored at ``slot_mapping`` and each sequence attends to all ``kv_lens[s]`` of its tokens.

    Attributes:
        positions: [T] int64, position of each token in its sequence.
        cu_seqlens: [S + 1] int32, where sequences begin in the packed tokens; last is T.
        seq_starts: cu_seqlens on the host.
        kv_lens: per sequence, tokens visible to its last token.
        cache: None: no cache is read or written.
        block_tables: [S, max blocks] int32, the blocks of each sequence in order; padded with 0.
        slot_mapping: [T] int64, block * P + offset of each token.
        decode: set if every sequence has one new token and a past, and no state is to be kept on the way.
        states: of recurrent layers; with it, each sequence goes on from its slot, or from nothing if it has no past.
        state_slots: per sequence, its slot.
        state_saves: states to keep on the way.
        lora: adapters of the batch, or None.
        causal: False for encoders.
        run_layer: how decoder layers are run; None: plainly.
    """

    positions: Tensor
    cu_seqlens: Tensor
    seq_starts: Sequence[int]
    kv_lens: Sequence[int]
    cache: PagedCache | None = None
    block_tables: Tensor | None = None
    slot_mapping: Tensor | None = None
    decode: DecodeInputs | None = None
    states: RecurrentStates | None = None
    state_slots: Sequence[int] = ()
    state_saves: Sequence[StateSave] = ()
    lora: LoRADelta | None = None
    causal: bool = True
    run_layer: LayerRunner | None = None
    # Index tensors and masks that every attention layer of one forward needs; made by the first that does.
    scratch: dict[Any, Any] | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.seq_starts[-1])

    @property
    def num_sequences(self) -> int:
        return len(self.seq_starts) - 1

    def seq_lens(self) -> list[int]:
        """New tokens per sequence."""
        return [b - a for a, b in zip(self.seq_starts, self.seq_starts[1:], strict=False)]


def packed_context(
    lengths: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    lora: LoRADelta | None = None,
    causal: bool = True,
    run_layer: LayerRunner | None = None,
) -> ForwardContext:
    """Context of whole sequences without a cache: training, perplexity, embedding.

    Args:
        lengths: tokens of each sequence, each at least 1.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = torch.cat([torch.arange(length, dtype=torch.int64) for length in lengths])
    return ForwardContext(
        positions=positions.to(device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_starts=starts,
        kv_lens=list(lengths),
        lora=lora,
        causal=causal,
        run_layer=run_layer,
        scratch={},
    )
