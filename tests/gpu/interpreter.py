"""Lets flash-linear-attention run in Triton's interpreter on a CPU, which lacks two things that its kernels use."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any


def prepare() -> None:
    """Call with TRITON_INTERPRET=1 set, before its first use."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("fla") is None:
        return
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    # Without a driver nothing can be timed; any configuration gives the same numbers.
    Autotuner._bench = lambda self, *args, **kwargs: [1.0, 1.0, 1.0]

    def tensors(*bounds: Any) -> Iterator[Any]:
        """range, its numbers as tensors: compiled loops have them so, and kernels call their methods."""
        ends = [int(x.handle.data.item()) if hasattr(x, "handle") else int(getattr(x, "value", x)) for x in bounds]
        for i in builtins.range(*ends):
            yield interpreter.interpreter_semantic.to_tensor(i)

    importlib.import_module("fla.ops.common.chunk_delta_h").range = tensors  # type: ignore[attr-defined]
