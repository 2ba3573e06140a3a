"""Sums and gated activations. Each is plain torch, which is the reference, or one pass of a kernel.

Proof of the kernels: tests/unit/test_cpu_ops.py and test_triton_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from engine.errors import FormatError
from engine.ops import cpu, fused_gradients
from engine.ops.backends import uses_triton_forward

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": lambda x: x.sigmoid(),
}
"""Hugging Face ``hidden_act`` to the function."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that Hugging Face name.

    Raises:
        FormatError: the name is not known.
    """
    if name not in ACTIVATIONS:
        raise FormatError(f"hidden_act is {name!r}; accepted: {', '.join(sorted(ACTIVATIONS))}", field="hidden_act")
    return ACTIVATIONS[name]


def gated_activation(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """activation(gate) * up (arXiv:2002.05202); both [..., D], ``name`` one of ACTIVATIONS."""
    if gate.shape == up.shape and gate.dtype == up.dtype and uses_triton_forward(gate, up):
        from engine.ops.triton import gated_activation as kernels

        if name in kernels.ACTIVATIONS:
            return kernels.gated_activation(gate, up, name)
    same = gate.shape == up.shape and gate.dtype == up.dtype
    if (
        same
        and name in fused_gradients.SLOPES
        and (fused_gradients.takes(gate, up) or fused_gradients.takes_on_cpu(gate, up))
    ):
        return fused_gradients.gated_activation(gate, up, name)
    if gate.shape == up.shape and name in cpu.ACTIVATIONS and cpu.takes(gate, up):
        return cpu.gated_activation(gate, up, name)
    return gated_activation_reference(gate, up, name)


def gated_activation_reference(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """See ``gated_activation``."""
    return ACTIVATIONS[name](gate) * up


def bias_activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """activation(x + bias) of the output x [..., D] of a product, which is used up; bias is [D], ``name`` one of
    ACTIVATIONS."""
    given = (x,) if bias is None else (x, bias)
    if name in cpu.ACTIVATIONS and cpu.takes(*given) and x.is_contiguous():
        return cpu.bias_activation(x, bias, name)
    return ACTIVATIONS[name](x if bias is None else x + bias)


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b; a [..., D], b of the same shape or [D]."""
    if (a.shape == b.shape or a.shape[-1:] == b.shape) and cpu.takes(a, b):
        return cpu.add(a, b)
    return a + b
