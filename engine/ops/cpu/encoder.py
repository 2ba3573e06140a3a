"""What encoders do between their products, over tensors that ``takes`` took (tests/unit/test_cpu_ops.py).

Shapes: M rows, D their width.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from engine.ops.cpu.calls import ACTIVATIONS
from engine.ops.cpu.library import KINDS, call, check_struct, empty

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _LayerNorm(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("x", "added", "residual", "weight", "bias", "out")),
        ("rows", _INTEGER),
        ("width", _INTEGER),
        ("eps", ctypes.c_float),
        ("reserved", ctypes.c_float),
    )


class _BiasActivation(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("x", "bias", "out")),
        ("rows", _INTEGER),
        ("width", _INTEGER),
        ("activation", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


_LAYER_NORM, _BIAS_ACTIVATION = KINDS.index("layer_norm"), KINDS.index("bias_activation")
check_struct("layer_norm", _LayerNorm)
check_struct("bias_activation", _BiasActivation)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None, residual: Tensor | None
) -> Tensor:
    """See engine.ops.norm.layer_norm."""
    out = empty(x.shape)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    added = None if added is None else added.contiguous()
    residual = None if residual is None else residual.contiguous()
    pointers = (_pointer(t) for t in (x, added, residual, weight, bias, out))
    width = x.shape[-1]
    args = _LayerNorm(*pointers, x.numel() // width, width, eps, 0.0)
    call(_LAYER_NORM, args, (x, added, residual, weight, bias, out))
    return out


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x + bias), written over x, which is contiguous; ``activation`` is one of ACTIVATIONS."""
    width = x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    args = _BiasActivation(
        x.data_ptr(), _pointer(bias), x.data_ptr(), x.numel() // width, width, ACTIVATIONS[activation], 0
    )
    call(_BIAS_ACTIVATION, args, (x, bias))
    return x
