"""The shared library of the CPU kernels, and how an operation of kernels.h is run or recorded.

It is built when the package is installed (setup.py). Whoever asks for an operation asks ``available`` or ``takes``
first, and keeps the torch form, which is the reference.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ops.cpu import results

logger = logging.getLogger(__name__)

LEVELS = ("none", "avx2", "avx512", "avx512vnni")

KINDS = (
    "linear",
    "widen_rows",
    "gather",
    "rms_norm",
    "rope_table",
    "rope",
    "attention",
    "gated_activation",
    "add",
    "conv_step",
    "delta_step",
    "tiled_attention",
    "conv",
    "delta_chunk",
    "float_product",
    "layer_norm",
    "bias_activation",
    "token_likelihood",
    "rms_norm_gradient",
    "gated_activation_gradient",
    "attention_gradient",
    "conv_gradient",
    "delta_chunk_gradient",
    "choose",
    "low_rank",
    "low_rank_gradient",
    "encoder_layers",
    "lora_rows",
)
"""``Kind`` of kernels.h, in its order."""

_LASTING = frozenset(
    KINDS.index(kind)
    for kind in (
        "widen_rows",
        "tiled_attention",
        "delta_chunk",
        "float_product",
        "token_likelihood",
        "attention_gradient",
        "delta_chunk_gradient",
        "low_rank",
        "low_rank_gradient",
        "encoder_layers",
    )
)
"""Kinds during which the interpreter's lock is free."""

_LINE_BYTES = 64


class Op(ctypes.Structure):
    """``Op`` of kernels.h."""

    _fields_ = (("kind", ctypes.c_int64), ("args", ctypes.c_void_p))


def _path() -> str | None:
    here = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"_kernels{suffix}").is_file()]
    return os.fspath(found[0]) if found else None


def _open() -> ctypes.CDLL | None:
    """The library, or None where it was not built or this CPU lacks its instructions."""
    path = _path()
    if path is None:
        logger.warning("the CPU kernels were not built (is there a C++ compiler?); torch's own are used")
        return None
    # PyDLL keeps the interpreter's lock: most calls last microseconds, and another thread that took the lock in between
    # would keep it for milliseconds.
    library = ctypes.PyDLL(path)
    if library.whet_cpu_level() == 0:
        logger.warning("this CPU lacks AVX2; torch's own kernels are used")
        return None
    return declare(library)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the functions of a library the types of their arguments and results."""
    library.whet_cpu_call.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    library.whet_cpu_run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.whet_cpu_run_timed.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.whet_cpu_set_num_threads.argtypes = [ctypes.c_int]
    library.whet_cpu_set_num_threads.restype = None
    library.whet_cpu_size.argtypes = [ctypes.c_int64]
    library.whet_cpu_size.restype = ctypes.c_int64
    return library


_library = _open()
# A whole program, or a product of many rows, lasts milliseconds: other threads of the process go on meanwhile.
_unlocked = None if _library is None else declare(ctypes.CDLL(_path()))


def _check(status: int) -> None:
    """Raises what ``Status`` of kernels.h says."""
    if status == 1:
        raise IndexError("an index is not that of a row of the weight, or of a logit")
    if status == 2:
        raise MemoryError("there is no memory for an operation of the CPU kernels")


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


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute with these: float32 on the CPU, no gradient wanted."""
    if _library is None or torch.is_autocast_enabled("cpu"):
        return False
    wants_gradient = torch.is_grad_enabled()
    # A loop, and is_cpu: this runs for every operation of a step.
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype is not torch.float32 or (wants_gradient and tensor.requires_grad):
            return False
    return True


def takes_device(tensor: Tensor) -> bool:
    """Whether there are kernels for the device of a tensor, and their result has the type that is wanted."""
    return _library is not None and tensor.is_cpu and not torch.is_autocast_enabled("cpu")


def check_struct(kind: str, struct: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """The struct, if it is as large as that of the library.

    Raises:
        ImportError: it is not: the library is of another version of the package.
    """
    if _library is not None:
        built = _library.whet_cpu_size(KINDS.index(kind))
        if built != ctypes.sizeof(struct):
            raise ImportError(
                f"the CPU kernels at {_path()} are of another version: {kind} has {built} bytes there and "
                f"{ctypes.sizeof(struct)} here; install the package again"
            )
    return struct


def call(kind: int, args: ctypes.Structure, tensors: tuple[object, ...], *, lasts: bool = False) -> None:
    """Runs one operation, and records it where a program is being captured.

    Args:
        kind: index into KINDS.
        args: its struct.
        tensors: what the struct points into.
        lasts: longer than what else is of this kind, so that the interpreter's lock is to be free.
    Raises:
        IndexError: a row is asked for that its weight lacks.
        MemoryError: none is left for what the operation needs beside its result.
    """
    library = _unlocked if lasts or kind in _LASTING else _library
    _check(library.whet_cpu_call(kind, ctypes.addressof(args)))  # type: ignore[union-attr]
    if _capture.program is not None:
        _capture.program.record(kind, args, tensors)


def call_together(kind: int, args: Sequence[ctypes.Structure], tensors: tuple[object, ...]) -> None:
    """The same of several operations of one kind, in one call, during which the interpreter's lock is free."""
    ops = (Op * len(args))(*(Op(kind, ctypes.addressof(each)) for each in args))
    _check(_unlocked.whet_cpu_run(ctypes.addressof(ops), len(ops)))  # type: ignore[union-attr]
    if _capture.program is not None:
        for each in args:
            _capture.program.record(kind, each, tensors)


class Arena:
    """Memory for the results of programs, which all start at its beginning: they never run at the same time, and what
    one leaves is read before the next one runs.

    What a program took stays where it is, so that a larger one takes a further chunk for what fits into none. Sizes of
    chunks are powers of two, and all of them together less than four times what the largest program takes at once.
    """

    MIN_NUMBERS = 1 << 20

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        """Starts again at the beginning."""
        self._chunk, self._used = 0, 0

    def __len__(self) -> int:
        """Chunks of memory that are held."""
        return len(self._chunks)

    @property
    def nbytes(self) -> int:
        """Of all chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def shrink(self, count: int) -> None:
        """Lets go of all chunks but the first ``count``; those that a tensor still shows live on with it."""
        del self._chunks[count:]

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """float32 of that shape, of which nothing is known."""
        count = math.prod(shape)
        while True:
            if self._chunk == len(self._chunks):
                self._chunks.append(torch.empty(max(1 << (count - 1).bit_length(), self.MIN_NUMBERS)))
            chunk = self._chunks[self._chunk]
            if self._used + count <= len(chunk):
                start = self._used
                self._used += -(-count // 16) * 16  # whole lines of the processor's cache
                return chunk[start : start + count].view(shape)
            self._chunk, self._used = self._chunk + 1, 0


def empty(shape: tuple[int, ...]) -> Tensor:
    """float32 on the CPU, for a result: from the arena of the capture where there is one; see ``results``."""
    return results.empty(shape) if _capture.arena is None else _capture.arena.take(shape)


class Program:
    """Operations that were captured, to be run again over the same memory.

    Attributes:
        foreign: the first operation of torch that computed something during the capture; with one, the program is not
            the whole of what ran, and must not be replayed.
    """

    def __init__(self) -> None:
        self.foreign: str | None = None
        self._recorded: list[tuple[int, ctypes.Structure]] = []
        self._kept: list[object] = []
        self._ops: ctypes.Array[Op] | None = None

    def __len__(self) -> int:
        return len(self._recorded)

    def record(self, kind: int, args: ctypes.Structure, tensors: tuple[object, ...]) -> None:
        """Adds an operation, and keeps what it points into."""
        self._recorded.append((kind, args))
        self._kept.append(tensors)

    def replay(self) -> None:
        """Runs all operations in order.

        Raises:
            IndexError, MemoryError: as ``call``.
        """
        assert self.foreign is None
        if self._ops is None:
            self._ops = self._end_to_end()
        _check(_unlocked.whet_cpu_run(ctypes.addressof(self._ops), len(self._recorded)))  # type: ignore[union-attr]

    def _end_to_end(self) -> ctypes.Array[Op]:
        """The operations, their structs copied into one piece of memory in order, each from a line of the processor's
        cache on: a program finds the caches empty, and reads its structs faster as one stream."""
        starts = [0]
        for _, args in self._recorded:
            starts.append(starts[-1] + -(-ctypes.sizeof(args) // _LINE_BYTES) * _LINE_BYTES)
        memory = ctypes.create_string_buffer(starts[-1] + _LINE_BYTES)
        self._kept.append(memory)
        first = -(-ctypes.addressof(memory) // _LINE_BYTES) * _LINE_BYTES
        ops = (Op * len(self._recorded))()
        for op, start, (kind, args) in zip(ops, starts, self._recorded, strict=False):
            ctypes.memmove(first + start, ctypes.addressof(args), ctypes.sizeof(args))
            op.kind, op.args = kind, first + start
        return ops


class _Capture(threading.local):
    program: Program | None = None
    arena: Arena | None = None


_capture = _Capture()


class capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``with capture(arena) as program``: records what the kernels run in this thread, as they run, with results in
    the arena.

    Operations of torch that look at memory in another way, or reserve some, are free; any other makes the program
    incomplete, which it says in ``foreign``.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._program = Program()
        self._arena = arena

    def __enter__(self) -> Program:
        assert _capture.program is None, "captures do not nest"
        super().__enter__()  # type: ignore[no-untyped-call]
        self._arena.rewind()
        _capture.program, _capture.arena = self._program, self._arena
        return self._program

    def __exit__(self, *error: object) -> None:
        _capture.program, _capture.arena = None, None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's switch: else the first operation in a capture imports torch._dynamo (2 s, 65 MB) to tell it to keep
        away from here. Nothing is compiled within a capture."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func.overloadpacket in _RESERVING) and self._program.foreign is None:
            self._program.foreign = str(func)
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_RESERVING = frozenset({_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided})
