"""Which implementation of an operation runs.

Every operation has a form in plain torch, which is its reference. On CUDA devices Triton kernels of our own
(engine.ops.triton) and flash-linear-attention's chunked delta rule take its place where those packages are installed;
neither is imported before a device asks for it. Kernels that compute no gradients serve where none is wanted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be used, if it is installed.

    Attributes:
        triton: our Triton kernels.
        fla: flash-linear-attention.
        device_types: devices that they may run on. Triton's interpreter also runs kernels on the CPU, for tests.
    """

    triton: bool = True
    fla: bool = True
    device_types: tuple[str, ...] = ("cuda",)


_allowed = Allowed()


@contextmanager
def allow(
    *, triton: bool | None = None, fla: bool | None = None, device_types: tuple[str, ...] | None = None
) -> Iterator[None]:
    """Changes what may be used within the block, for all threads: for tests and comparisons."""
    global _allowed
    before = _allowed
    changes = {"triton": triton, "fla": fla, "device_types": device_types}
    _allowed = replace(before, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    try:
        yield
    finally:
        _allowed = before


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(device: torch.device) -> bool:
    """Whether our Triton kernels run there."""
    return _allowed.triton and device.type in _allowed.device_types and _has_triton()


def uses_triton_forward(x: Tensor, *others: Tensor) -> bool:
    """Whether a Triton kernel without a backward may compute from these tensors: float64 is the reference's alone."""
    if not uses_triton(x.device) or x.dtype == torch.float64:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)))


def uses_fla(device: torch.device) -> bool:
    """Whether flash-linear-attention may run there."""
    if not (_allowed.fla and device.type in _allowed.device_types):
        return False
    from engine.ops import flash_linear_attention

    return flash_linear_attention.load() is not None


def implementations(device: torch.device) -> dict[str, str]:
    """Operation to the implementation that runs on the device: "torch", "triton", "flash-linear-attention"."""
    kernels = "triton" if uses_triton(device) else "torch"
    return {
        "delta_rule.chunk": "flash-linear-attention" if uses_fla(device) else "torch",
        "delta_rule.step": kernels,
        "causal_conv.step": kernels,
        "attention.decode": kernels,
        "rms_norm": kernels,
        "gated_rms_norm": kernels,
        "gated_activation": kernels,
        "rope": kernels,
        "rms_norm.backward": kernels,
        "gated_activation.backward": kernels,
        "cross_entropy.gradient": kernels,
        "int8.linear": kernels,
        "int4.linear": kernels,
        "gguf.linear": kernels,
    }
