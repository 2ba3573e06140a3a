"""Weights as they are stored, for the products of the CPU kernels.

Shapes: M rows of x, K inputs, N outputs, S group size, G = K / S.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.ops.cpu.library import KINDS, available, call, call_together, check_struct, empty, takes, takes_device

MAX_ROWS = 16
"""Rows of x up to which products by floats are taken here; with more, a weight is read less often than it is
multiplied, and the library behind torch is faster."""

MAX_ROWS_OF_INTEGERS = 32
"""The same for weights that torch would have to widen first."""

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3, torch.float16: 4}
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Weight(ctypes.Structure):
    """``Weight`` of kernels.h."""

    _fields_ = (
        ("data", _POINTER),
        ("scales", _POINTER),
        ("zeros", _POINTER),
        ("offsets", _POINTER),
        ("rows", _INTEGER),
        ("group_size", _INTEGER),
        ("storage", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        ("x", _POINTER),
        ("y", _POINTER),
        ("inputs", _INTEGER),
        ("rows", _INTEGER),
        ("rounds", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _FloatProduct(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        ("x", _POINTER),
        ("y", _POINTER),
        ("inputs", _INTEGER),
        ("rows", _INTEGER),
        ("begin", _INTEGER),
        ("end", _INTEGER),
        ("x_stride", _INTEGER),
        ("y_stride", _INTEGER),
        ("finish", _POINTER),
        ("transposed", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _WidenRows(ctypes.Structure):
    _fields_ = (
        ("weight", _POINTER),
        ("out", _POINTER),
        ("inputs", _INTEGER),
        ("begin", _INTEGER),
        ("end", _INTEGER),
    )


class _Gather(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("ids", _POINTER), ("out", _POINTER), ("inputs", _INTEGER), ("rows", _INTEGER))


_STRUCTS = {"linear": _Linear, "widen_rows": _WidenRows, "gather": _Gather, "float_product": _FloatProduct}
_LINEAR, _WIDEN_ROWS, _GATHER, _FLOAT_PRODUCT = map(KINDS.index, _STRUCTS)
for _kind, _struct in _STRUCTS.items():
    check_struct(_kind, _struct)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight, as a scheme holds it.

    Attributes:
        data: [N, K] float32, bfloat16, float16 or int8, or [N, K / 2] uint8, two 4-bit values a byte, the lower half
            first, each q + shift.
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

    def detached(self) -> StoredWeight:
        """The same memory, also when a parameter that is among the tensors has been given another."""
        scales, zeros, offsets = (None if t is None else t.detach() for t in (self.scales, self.zeros, self.offsets))
        return StoredWeight(self.data.detach(), scales, zeros, offsets, self.shift)

    def is_supported(self, inputs: int) -> bool:
        """Whether the kernels read it: on the CPU, contiguous, of a type above, in whole groups."""
        if not available() or self.data.dtype not in _STORAGE:
            return False
        if not all(t.is_contiguous() and t.device.type == "cpu" for t in self.tensors()):
            return False
        if self.scales is None:
            return self.data.dtype.is_floating_point
        grouped = self.tensors()[1:]
        if self.scales.dtype not in (torch.float32, torch.float16) or len({t.dtype for t in grouped}) > 1:
            return False
        group = inputs // self.scales.shape[1]
        return group * self.scales.shape[1] == inputs and group % (32 if self.data.dtype == torch.uint8 else 16) == 0


class PackedWeight:
    """A weight as the kernels read it; holds its tensors.

    Attributes:
        has_integers: or floats, which no product rounds x for.

    Args:
        weight: a supported one.
        inputs: K.
    """

    def __init__(self, weight: StoredWeight, inputs: int) -> None:
        assert weight.is_supported(inputs)
        scales = weight.scales
        self.inputs = inputs
        self.outputs = weight.data.shape[0]
        self.address = weight.data.data_ptr()
        self._weight = weight.detached()
        self._struct = struct = _Weight()
        struct.data, struct.rows, struct.shift = self.address, self.outputs, weight.shift
        struct.storage = _STORAGE[weight.data.dtype]
        struct.group_size = inputs if scales is None else inputs // scales.shape[1]
        struct.half_scales = scales is not None and scales.dtype == torch.float16
        for name in ("scales", "zeros", "offsets"):
            tensor = getattr(weight, name)
            setattr(struct, name, None if tensor is None else tensor.data_ptr())
        self._pointer = ctypes.addressof(struct)
        self.has_integers = scales is not None

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a module has tensors of its own and packs them itself."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def pointer(self) -> int:
        """Of its ``Weight`` of kernels.h."""
        return self._pointer

    def part(self, start: int, end: int) -> PackedWeight:
        """Rows [start, end) as a weight of its own, over the same memory; y of it is those columns, to the bit where
        start and end are multiples of four, as ``linear`` takes four rows at once."""
        data, *others = self._weight.data, self._weight.scales, self._weight.zeros, self._weight.offsets
        scales, zeros, offsets = (None if tensor is None else tensor[start:end] for tensor in others)
        weight = StoredWeight(data[start:end], scales, zeros, offsets, self._weight.shift)
        return PackedWeight(weight, self.inputs)

    def linear(self, x: Tensor, *, rounds: bool = False) -> Tensor:
        """x [..., K] float32 times the weight transposed: [..., N] float32. No gradient.

        Args:
            rounds: round x to int8 and multiply integers (engine.ops.cpu.gemm); ignored where the weight has floats.
        """
        assert x.shape[-1] == self.inputs
        x = x.contiguous()
        y = empty((*x.shape[:-1], self.outputs))
        rows = x.numel() // self.inputs
        rounds = rounds and self.has_integers
        args = _Linear(self._pointer, x.data_ptr(), y.data_ptr(), self.inputs, rows, rounds, 0)
        call(_LINEAR, args, (self, x, y), lasts=rows > MAX_ROWS)
        return y

    def product(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """x [..., K] float32 times rows [start, end) of the weight, transposed: [..., end - start]. No gradient.

        For many rows of x; ``linear`` is the faster for a few. The sums are float32, in order, so a row of the result
        does not depend on the other rows.
        """
        return self._product(x, start, self.outputs if end is None else end, transposed=False)

    def product_transposed(self, x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """x [..., end - start] float32 times rows [start, end) of the weight: [..., K], the input's gradient of
        ``product`` for that of its result. No gradient."""
        return self._product(x, start, self.outputs if end is None else end, transposed=True)

    def _product(self, x: Tensor, start: int, end: int, *, transposed: bool) -> Tensor:
        assert 0 <= start < end <= self.outputs
        assert x.shape[-1] == (end - start if transposed else self.inputs)
        outputs = self.inputs if transposed else end - start
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        y = empty((*x.shape[:-1], outputs))
        args = _FloatProduct(
            self._pointer,
            flat.data_ptr(),
            y.data_ptr(),
            self.inputs,
            flat.shape[0],
            start,
            end,
            flat.stride(0),
            outputs,
            None,
            transposed,
            0,
        )
        call(_FLOAT_PRODUCT, args, (self, flat, y))
        return y

    def widen(self, start: int, end: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, end), as float32 [end - start, K].

        Args:
            out: where to write them, contiguous.
        """
        out = torch.empty(end - start, self.inputs) if out is None else out
        call(_WIDEN_ROWS, _WidenRows(self._pointer, out.data_ptr(), self.inputs, start, end), (self, out))
        return out

    def gather(self, ids: Tensor) -> Tensor:
        """Rows ids [M] int64, as float32 [M, K].

        Raises:
            IndexError: an id is not in [0, N).
        """
        out = empty((len(ids), self.inputs))
        struct = _Gather(self._pointer, ids.data_ptr(), out.data_ptr(), self.inputs, len(ids))
        call(_GATHER, struct, (self, ids, out))
        return out


def rounded_products(x: Tensor, weights: Sequence[PackedWeight]) -> list[Tensor]:
    """``PackedWeight.linear`` of each for one x [T, K], which is rounded once for all that round it alike."""
    x = x.contiguous()
    ys = [empty((len(x), weight.outputs)) for weight in weights]
    pairs = zip(weights, ys, strict=True)
    args = [_Linear(w.pointer, x.data_ptr(), y.data_ptr(), w.inputs, len(x), w.has_integers, 0) for w, y in pairs]
    call_together(_LINEAR, args, (weights, x, ys))
    return ys


class _Scratch(threading.local):
    tensor: Tensor | None = None


_scratch = _Scratch()


def scratch_rows(packed: PackedWeight, start: int, end: int) -> Tensor:
    """As PackedWeight.widen, in memory that the next call of this thread takes again: fresh memory would cost a page
    fault for every 4 KiB of it."""
    size = (end - start) * packed.inputs
    if _scratch.tensor is None or _scratch.tensor.numel() < size:
        _scratch.tensor = torch.empty(size)
    return packed.widen(start, end, _scratch.tensor[:size].view(end - start, packed.inputs))


def takes_rows(x: Tensor, max_rows: int = MAX_ROWS) -> bool:
    """Whether ``PackedWeight.linear`` pays for x [..., K] and is allowed: a few rows, of what ``takes`` takes."""
    return 0 < x.numel() <= max_rows * x.shape[-1] and takes(x)


def takes_ids(ids: Tensor) -> bool:
    """Whether ``PackedWeight.gather`` reads these."""
    return ids.dtype == torch.int64 and ids.dim() == 1 and ids.is_contiguous() and takes_device(ids)


def packed(module: Any, data: Tensor, stored: Callable[[], StoredWeight]) -> PackedWeight | None:
    """The module's weight as the kernels read it, made at first use and kept on the module; None where they cannot.

    Args:
        module: has ``in_features``. Its ``data`` may be replaced, with or without the others: the weight is then packed
            again.
        data: that of the weight, by whose place a replaced one is known.
        stored: the weight; called only where it is to be packed, since this runs for every product.
    """
    kept: PackedWeight | None = module.__dict__.get("_packed")
    if kept is not None and kept.address == data.data_ptr():
        return kept
    weight = stored()
    if not weight.is_supported(module.in_features):
        return None
    module.__dict__["_packed"] = made = PackedWeight(weight, module.in_features)
    return made
