"""The low-rank update of a product, and its gradients; of many tokens, and of single rows with adapters of their own
(tests/unit/test_low_rank.py, test_lora_rows.py).

Shapes: T tokens, I in_features, O out_features, r rank, N slots of adapters.
"""

from __future__ import annotations

from torch import Tensor

from engine.ops.cpu.calls import _FLOAT, _INTEGER, _POINTER, _fields, _struct
from engine.ops.cpu.library import call, empty

_LOW_RANK, _LowRank = _struct(
    "low_rank",
    **_fields(_POINTER, "x a b y low"),
    **_fields(_INTEGER, "tokens inputs outputs rank"),
    **_fields(_FLOAT, "scaling reserved"),
)
_LOW_RANK_GRADIENT, _LowRankGradient = _struct(
    "low_rank_gradient",
    **_fields(_POINTER, "x a b low gradient d_x d_a d_b"),
    **_fields(_INTEGER, "tokens inputs outputs rank"),
    **_fields(_FLOAT, "scaling reserved"),
)

_LORA_ROWS, _LoraRows = _struct(
    "lora_rows",
    **_fields(_POINTER, "x y slots addresses ranks scalings"),
    **_fields(_INTEGER, "tokens inputs outputs address_stride rank_stride scaling_stride"),
)


def lora_rows(y: Tensor, x: Tensor, slots: Tensor, addresses: Tensor, ranks: Tensor, scalings: Tensor) -> None:
    """Adds to each row of y scaling B A x of its adapter. A row of the result does not depend on the other rows. What
    the tables hold is read when the operation runs.

    Args:
        y: [T, O], contiguous; written in place.
        x: [T, I], contiguous.
        slots: [T] int64, the slot of each row's adapter; -1: none.
        addresses: [N, 2] int64, where A [r, I] and B [O, r] of each slot lie, both contiguous float32; 0: it has none.
        ranks: [N] int64. scalings: [N] float32.
    """
    assert y.is_contiguous()
    assert x.is_contiguous()
    tables = (slots, addresses, ranks, scalings)
    args = _LoraRows(
        *(t.data_ptr() for t in (x, y, *tables)),
        *(len(x), x.shape[1], y.shape[1]),
        *(addresses.stride(0), ranks.stride(0), scalings.stride(0)),
    )
    call(_LORA_ROWS, args, (x, y, *tables))


def low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Adds scaling B A x to y. A row of the result does not depend on the other rows.

    Args:
        y: [T, O], contiguous; written in place. T is at least 1.
        x: [T, I]; a: [r, I]; b: [O, r].

    Returns: scaling A x, [T, r], which the gradient needs.
    """
    assert y.is_contiguous()
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    low = empty((len(x), len(a)))
    tensors = (x, a, b, y, low)
    args = _LowRank(*(t.data_ptr() for t in tensors), len(x), x.shape[1], len(b), len(a), scaling, 0.0)
    call(_LOW_RANK, args, tensors)
    return low


def low_rank_gradient(
    gradient: Tensor, x: Tensor, low: Tensor, a: Tensor, b: Tensor, scaling: float, d_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of ``low_rank`` for A and B, from that of y, which is that of y before the update as well. The sums
    over the tokens do not depend on the number of threads.

    Args:
        gradient: [T, O].
        low: [T, r], from ``low_rank``.
        d_x: [T, I], contiguous, to which that of x is added.
    """
    assert d_x is None or d_x.is_contiguous()
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    low, gradient = low.contiguous(), gradient.contiguous()
    d_a, d_b = empty(a.shape), empty(b.shape)
    tensors = (x, a, b, low, gradient, d_x, d_a, d_b)
    addresses = (None if t is None else t.data_ptr() for t in tensors)
    args = _LowRankGradient(*addresses, len(x), x.shape[1], len(b), len(a), scaling, 0.0)
    call(_LOW_RANK_GRADIENT, args, tensors)
    return d_a, d_b
