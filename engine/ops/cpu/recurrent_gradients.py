"""Gradients of the recurrent layers over whole sequences (tests/unit/test_cpu_gradients.py).

Shapes: T packed tokens, S sequences, C channels, W taps; H_k key and H_v value heads of widths K and V.
"""

from __future__ import annotations

from torch import Tensor

from engine.ops.cpu.calls import _INTEGER, _POINTER, _delta_sizes, _DeltaChunk, _end_to_end, _fields, _struct
from engine.ops.cpu.library import call, empty

_CONV_GRADIENT, _ConvGradient = _struct(
    "conv_gradient",
    **_fields(_POINTER, "x weight gradient seq_starts d_x"),
    **_fields(_INTEGER, "sequences channels taps silu"),
)
_DELTA_CHUNK_GRADIENT, _DeltaChunkGradient = _struct(
    "delta_chunk_gradient",
    forward=_DeltaChunk,
    **_fields(_POINTER, "gradient seq_starts d_q d_k d_v d_a d_b"),
    sequences=_INTEGER,
)


def conv_gradient(x: Tensor, weight: Tensor, gradient: Tensor, seq_starts: Tensor, *, silu: bool) -> Tensor:
    """The gradient for x of ``conv`` over packed sequences without a window, from that of its results.

    Args:
        x, gradient: [T, C].
        weight: [W, C], contiguous, at most MAX_TAPS taps.
        seq_starts: [S + 1] int64.
        silu: of the results.
    """
    x, gradient = x.contiguous(), gradient.contiguous()
    d_x = empty(x.shape)
    taps, channels = weight.shape
    tensors = (x, weight, gradient, seq_starts, d_x)
    args = _ConvGradient(*(t.data_ptr() for t in tensors), len(seq_starts) - 1, channels, taps, silu)
    call(_CONV_GRADIENT, args, tensors)
    return d_x


def delta_chunk_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    gradient: Tensor,
    seq_starts: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients for q, k, v, a and b of ``delta_chunk`` over packed sequences without a state before.

    Args:
        gradient: [T, H_v, V], of the results.
        seq_starts: [S + 1] int64.
    """
    q, k, v = _end_to_end(q), _end_to_end(k), _end_to_end(v)
    a, b, gradient = a.contiguous(), b.contiguous(), gradient.contiguous()
    given = (q, k, v, a, b, a_log, dt_bias)
    d_q, d_k, d_v, d_a, d_b = (empty(tensor.shape) for tensor in given[:5])
    forward = _DeltaChunk(*(t.data_ptr() for t in given), None, None, *_delta_sizes(q, k, v), eps, 0.0)
    others = (gradient, seq_starts, d_q, d_k, d_v, d_a, d_b)
    args = _DeltaChunkGradient(forward, *(t.data_ptr() for t in others), len(seq_starts) - 1)
    call(_DELTA_CHUNK_GRADIENT, args, (*given, *others))
    return d_q, d_k, d_v, d_a, d_b
