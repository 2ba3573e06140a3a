"""How likely rows of logits find some tokens, and which are chosen (tests/unit/test_cpu_ops.py, test_cpu_choose.py).

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


class _Choose(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "params", "tokens")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
    )


_TOKEN_LIKELIHOOD, _CHOOSE = KINDS.index("token_likelihood"), KINDS.index("choose")
check_struct("token_likelihood", _TokenLikelihood)
check_struct("choose", _Choose)


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


def choose(logits: Tensor, params: Tensor | None = None) -> Tensor:
    """A token for each row of logits [N, V] that ``takes`` took, as engine.sampling.sampler chooses it; -1 where it is
    to tell: the largest logit is not finite, the row holds a NaN, or rounding may decide.

    Args:
        params: [N, 5] float64, contiguous: uniform number, temperature (0: greedy), top_k (0: all), top_p, min_p. None:
            all rows are greedy, and the token is the first that has the largest logit.
    Returns: [N] int64.
    """
    logits = logits.contiguous()
    rows, width = logits.shape
    assert params is None or (params.shape == (rows, 5) and params.dtype == torch.float64 and params.is_contiguous())
    tokens = torch.empty(rows, dtype=torch.int64)
    pointer = None if params is None else params.data_ptr()
    args = _Choose(logits.data_ptr(), pointer, tokens.data_ptr(), rows, width)
    call(_CHOOSE, args, (logits, params, tokens))
    return tokens
