"""Our kernels for CPUs: a shared library that is built when the package is installed (setup.py).

What it offers is in kernels.h. The functions here take tensors, and decide by themselves nothing but whether they can:
``supports`` says so, and callers keep the torch form, which is the reference (tests/unit/test_cpu_kernels.py).

Shapes: M rows of x, K inputs, N outputs, S group size, G = K / S.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_ROWS = 16
"""Rows of x up to which products by floats are taken here; with more, a weight is read less often than it is
multiplied, and the library behind torch is faster."""

MAX_ROWS_OF_INTEGERS = 32
"""The same for weights that torch would have to widen first."""

LEVELS = ("none", "avx2", "avx512")

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


class _Weight(ctypes.Structure):
    """``Weight`` of kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("storage", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


def _open() -> ctypes.PyDLL | None:
    """The library, or None where it was not built or this CPU lacks its instructions.

    PyDLL keeps the interpreter's lock: the calls last microseconds, and another thread that took the lock in between
    would keep it for milliseconds.
    """
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).parent / f"_kernels{suffix}").is_file()]
    if not found:
        logger.warning("the CPU kernels were not built (is there a C++ compiler?); torch's own are used")
        return None
    library = ctypes.PyDLL(os.fspath(found[0]))
    if library.whet_cpu_level() == 0:
        logger.warning("this CPU lacks AVX2; torch's own kernels are used")
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.whet_cpu_linear.argtypes = [pointer, integer, integer, pointer, integer, pointer]
    library.whet_cpu_linear.restype = None
    library.whet_cpu_widen.argtypes = [pointer, integer, integer, integer, pointer]
    library.whet_cpu_widen.restype = None
    library.whet_cpu_set_num_threads.argtypes = [ctypes.c_int]
    library.whet_cpu_set_num_threads.restype = None
    return library


_library = _open()


def level() -> str:
    """Instructions that the kernels use on this machine: one of LEVELS."""
    return LEVELS[0] if _library is None else LEVELS[_library.whet_cpu_level()]


def set_num_threads(count: int) -> None:
    """Threads of every later call, the calling one included."""
    if _library is not None:
        _library.whet_cpu_set_num_threads(count)


def available() -> bool:
    """Whether there are kernels."""
    return _library is not None


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight, as a scheme holds it.

    Attributes:
        data: [N, K] float32, bfloat16 or int8, or [N, K / 2] uint8, two 4-bit values a byte, the lower half first,
            each q + shift.
        scales, zeros, offsets: of integers, [N, G] all float32 or all float16: w = (q - zero) * scale + offset. None:
            zeros and offsets of 0.
        shift: 0 or 8.
    """

    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    shift: int = 8

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [t for t in (self.data, self.scales, self.zeros, self.offsets) if t is not None]

    def is_supported(self, inputs: int) -> bool:
        """Whether the kernels read it: on the CPU, contiguous, of a type above, in whole groups."""
        if _library is None or self.data.dtype not in _STORAGE:
            return False
        if not all(t.is_contiguous() and t.device.type == "cpu" for t in self.tensors()):
            return False
        if self.scales is None:
            return self.data.dtype in (torch.float32, torch.bfloat16)
        grouped = self.tensors()[1:]
        if self.scales.dtype not in (torch.float32, torch.float16) or len({t.dtype for t in grouped}) > 1:
            return False
        group = inputs // self.scales.shape[1]
        return group * self.scales.shape[1] == inputs and group % (32 if self.data.dtype == torch.uint8 else 16) == 0


class PackedWeights:
    """Weights of the same K, as the kernels read them; holds their tensors.

    Args:
        weights: supported ones.
        inputs: K.
    """

    def __init__(self, weights: list[StoredWeight], inputs: int) -> None:
        assert all(weight.is_supported(inputs) for weight in weights)
        self._weights = weights
        self._structs = (_Weight * len(weights))()
        self.inputs = inputs
        self.outputs = [weight.data.shape[0] for weight in weights]
        self.address = weights[0].data.data_ptr()
        for struct, weight in zip(self._structs, weights, strict=True):
            scales = weight.scales
            struct.data, struct.rows = weight.data.data_ptr(), weight.data.shape[0]
            struct.storage = _STORAGE[weight.data.dtype]
            struct.group_size = inputs if scales is None else inputs // scales.shape[1]
            struct.shift = weight.shift
            struct.half_scales = scales is not None and scales.dtype == torch.float16
            for name in ("scales", "zeros", "offsets"):
                tensor = getattr(weight, name)
                setattr(struct, name, None if tensor is None else tensor.data_ptr())
        self._pointer = ctypes.addressof(self._structs)
        self._count = len(weights)
        self._total = sum(self.outputs)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a module has tensors of its own and packs them itself."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] float32 times each weight transposed, side by side: [..., sum of N] float32. No gradient."""
        x = x.detach().contiguous()
        y = x.new_empty((*x.shape[:-1], self._total))
        rows = x.numel() // self.inputs
        _library.whet_cpu_linear(  # type: ignore[union-attr]
            self._pointer, self._count, self.inputs, x.data_ptr(), rows, y.data_ptr()
        )
        return y

    def widen(self, start: int, end: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, end) of the one weight of integers, as float32 [end - start, K].

        Args:
            out: where to write them, contiguous.
        """
        assert self._count == 1
        out = torch.empty(end - start, self.inputs) if out is None else out
        _library.whet_cpu_widen(self._pointer, self.inputs, start, end, out.data_ptr())  # type: ignore[union-attr]
        return out


class _Scratch(threading.local):
    tensor: Tensor | None = None


_scratch = _Scratch()


def scratch_rows(packed: PackedWeights, start: int, end: int) -> Tensor:
    """As PackedWeights.widen, in memory that the next call of this thread takes again: fresh memory would cost a page
    fault for every 4 KiB of it."""
    size = (end - start) * packed.inputs
    if _scratch.tensor is None or _scratch.tensor.numel() < size:
        _scratch.tensor = torch.empty(size)
    return packed.widen(start, end, _scratch.tensor[:size].view(end - start, packed.inputs))


def takes(x: Tensor, max_rows: int = MAX_ROWS) -> bool:
    """Whether ``linear`` pays for x [..., K] and is allowed: a few rows of float32 on the CPU, no gradient wanted."""
    return (
        x.dtype == torch.float32
        and 0 < x.numel() <= max_rows * x.shape[-1]
        and _library is not None
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def packed(module: Any, data: Tensor, stored: Callable[[], StoredWeight]) -> PackedWeights | None:
    """The module's weight as the kernels read it, made at first use and kept on the module; None where they cannot.

    Args:
        module: has ``in_features``. Its tensors may be replaced: the weight is then packed again.
        data: that of the weight, by whose place a replaced one is known.
        stored: the weight; called only where it is to be packed, since this runs for every product.
    """
    kept: PackedWeights | None = module.__dict__.get("_packed")
    if kept is not None and kept.address == data.data_ptr():
        return kept
    weight = stored()
    if not weight.is_supported(module.in_features):
        return None
    module.__dict__["_packed"] = made = PackedWeights([weight], module.in_features)
    return made
