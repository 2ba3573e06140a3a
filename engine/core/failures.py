"""What an exception that nobody raised on purpose is to a caller."""

from __future__ import annotations

import errno
import re

import torch
from safetensors import SafetensorError

from engine.errors import EngineError, InternalError, OutOfMemoryError, OverloadedError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def as_engine_error(error: BaseException, what: str) -> EngineError:
    """The error to report.

    Args:
        what: subject of the message ("the step", "the train job").
    Returns: the error itself if it is an EngineError; OutOfMemoryError where memory ran out, after letting go of what
        the device's allocator holds unused; OverloadedError where the disk is full; else InternalError, with the
        original as its cause.
    """
    if isinstance(error, EngineError):
        return error
    if _errno(error) in _DISK_FULL:
        full = OverloadedError(f"{what} cannot write its files: {error}", reason="DISK_FULL")
        full.__cause__ = error
        return full
    # The CPU's allocator raises a plain RuntimeError.
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if exhausted and torch.cuda.is_available():
        torch.cuda.empty_cache()
    text = f"{what} ran out of memory: {error}" if exhausted else f"{what} failed: {type(error).__name__}: {error}"
    reported: EngineError = OutOfMemoryError(text) if exhausted else InternalError(text)
    reported.__cause__ = error
    return reported


def _errno(error: BaseException) -> int | None:
    """The system's number for a failed write; safetensors has it in its message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None
