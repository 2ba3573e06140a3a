"""What encoders do between their products (tests/unit/test_cpu_ops.py), and all of their layers in one call
(tests/unit/test_encoder_layers.py), over tensors that ``takes`` took.

Shapes: M rows or T tokens of S sequences, D their width, F that of the feed-forward block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ops.cpu.calls import ACTIVATIONS
from engine.ops.cpu.library import KINDS, call, check_struct, empty
from engine.ops.cpu.weights import PackedWeight

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
        ("stride", _INTEGER),
        ("activation", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _EncoderLayer(ctypes.Structure):
    _fields_ = (("weights", _POINTER * 6), ("biases", _POINTER * 6), ("norms", _POINTER * 4))


class _EncoderLayers(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("layers", "x", "seq_starts")),
        *((name, _INTEGER) for name in ("count", "sequences", "width", "inner", "heads")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
    )


_LAYER_NORM, _BIAS_ACTIVATION = KINDS.index("layer_norm"), KINDS.index("bias_activation")
_ENCODER_LAYERS = KINDS.index("encoder_layers")
check_struct("layer_norm", _LayerNorm)
check_struct("bias_activation", _BiasActivation)
check_struct("encoder_layers", _EncoderLayers)


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """One layer of an encoder, as kernels.h has it.

    Attributes:
        weights: of q, k, v and the output of attention [D, D]; of the feed-forward block up [F, D] and down [D, F].
        biases: of each.
        norms: weight and bias [D] of the norm after attention, and of that after the feed-forward block.
    """

    weights: tuple[PackedWeight, ...]
    biases: tuple[Tensor | None, ...]
    norms: tuple[Tensor, ...]

    def is_supported(self) -> bool:
        """Whether the kernels read what is not packed: float32 on the CPU, contiguous."""
        return all(
            t is None or (t.is_cpu and t.dtype == torch.float32 and t.is_contiguous()) for t in self.biases + self.norms
        )


class EncoderStack:
    """The layers of an encoder for ``encoder_layers``; holds their tensors.

    Args:
        layers: at least one; what ``EncoderWeights.is_supported``, of the same sizes.
    """

    def __init__(self, layers: Sequence[EncoderWeights]) -> None:
        self._layers = tuple(layers)
        self._structs = (_EncoderLayer * len(self._layers))()
        for struct, layer in zip(self._structs, self._layers, strict=True):
            struct.weights[:] = [weight.pointer for weight in layer.weights]
            struct.biases[:] = [_pointer(bias) for bias in layer.biases]
            struct.norms[:] = [norm.data_ptr() for norm in layer.norms]
        self.inner = self._layers[0].weights[4].outputs

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model has tensors of its own."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def encoder_layers(
    x: Tensor,
    stack: EncoderStack,
    seq_starts: Tensor,
    *,
    heads: int,
    eps: float,
    scale: float,
    activation: str,
    rounds: bool,
) -> Tensor:
    """x [T, D] after all layers, each sequence by itself; x is used up.

    Args:
        seq_starts: [S + 1] int64, from 0 to T.
        heads: that divide D.
        scale: of scores, above 0.
        activation: of the feed-forward blocks, one of ACTIVATIONS.
        rounds: round x to int8 where a weight has integers, as PackedWeight.linear.
    """
    assert x.is_contiguous()
    tensors = (x, stack, seq_starts)
    args = _EncoderLayers(
        ctypes.addressof(stack._structs),
        x.data_ptr(),
        seq_starts.data_ptr(),
        len(stack._layers),
        len(seq_starts) - 1,
        x.shape[1],
        stack.inner,
        heads,
        eps,
        scale,
        ACTIVATIONS[activation],
        rounds,
    )
    call(_ENCODER_LAYERS, args, tensors)
    return x


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
        x.data_ptr(), _pointer(bias), x.data_ptr(), x.numel() // width, width, width, ACTIVATIONS[activation], 0
    )
    call(_BIAS_ACTIVATION, args, (x, bias))
    return x
