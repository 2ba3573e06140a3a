"""What an exception that nobody raised on purpose is to a caller."""

from __future__ import annotations

import torch

from engine.errors import EngineError, InternalError, OutOfMemoryError


def as_engine_error(error: BaseException, what: str) -> EngineError:
    """The error to report.

    Args:
        what: subject of the message ("the step", "the train job").
    Returns: the error itself if it is an EngineError; OutOfMemoryError where memory ran out, after letting go of what
        the device's allocator holds unused; else InternalError, with the original as its cause.
    """
    if isinstance(error, EngineError):
        return error
    # The CPU's allocator raises a plain RuntimeError.
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if exhausted and torch.cuda.is_available():
        torch.cuda.empty_cache()
    text = f"{what} ran out of memory: {error}" if exhausted else f"{what} failed: {type(error).__name__}: {error}"
    reported: EngineError = OutOfMemoryError(text) if exhausted else InternalError(text)
    reported.__cause__ = error
    return reported
