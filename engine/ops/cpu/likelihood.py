"""How likely rows of logits find some tokens, and which they find likeliest (tests/unit/test_cpu_ops.py).

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.ops.cpu.library import KINDS, call, check_struct


class _TokenLikelihood(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "stride")),
    )


class _Likeliest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "places")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
    )


_TOKEN_LIKELIHOOD, _LIKELIEST = KINDS.index("token_likelihood"), KINDS.index("likeliest")
check_struct("token_likelihood", _TokenLikelihood)
check_struct("likeliest", _Likeliest)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats: [N] float64, from logits [N, V] that ``takes`` took.

    Args:
        targets: [N] int64.
    Raises:
        IndexError: a target is not in [0, V).
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    targets = targets.contiguous()
    rows, width = logits.shape
    assert targets.dtype == torch.int64
    assert targets.shape == (rows,)
    out = torch.empty(rows, dtype=torch.float64)
    args = _TokenLikelihood(logits.data_ptr(), targets.data_ptr(), out.data_ptr(), rows, width, logits.stride(0))
    call(_TOKEN_LIKELIHOOD, args, (logits, targets, out))
    return out


def likeliest(logits: Tensor) -> Tensor:
    """The first token that has the largest of each row of logits [N, V] that ``takes`` took: [N] int64; -1 where that
    logit is not finite, or the row holds a NaN."""
    logits = logits.contiguous()
    rows, width = logits.shape
    places = torch.empty(rows, dtype=torch.int64)
    call(_LIKELIEST, _Likeliest(logits.data_ptr(), places.data_ptr(), rows, width), (logits, places))
    return places
