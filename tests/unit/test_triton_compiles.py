"""Triton kernels compile for a GPU, down to its machine code, at the shapes of real models in bfloat16.

The interpreter shows what they compute and takes much that a GPU's compiler refuses; that needs no GPU to be asked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

SHARED_BYTES = 227 << 10
"""That a program may have on the target, compute capability 9.0."""


def narrow(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def index(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def paged_attention(num: int, heads: int, kv_heads: int, width: int, window: int | None, softcap: float | None) -> None:
    from engine.ops.triton import paged_attention

    cache = narrow(4, 16, kv_heads, width)
    k = narrow(num, kv_heads, width)
    paged_attention.store(k, k, cache, cache, index(num))
    q = narrow(num, heads, width)
    tables = torch.zeros(num, 2048, dtype=torch.int32)
    lens, rows = index(num), index(num)
    paged_attention.decode_attention(
        q, cache, cache, rows, tables, lens, torch.empty_like(q), scale=0.1, window=window, softcap=softcap
    )


def delta_step() -> None:
    from engine.ops.triton import delta_step

    x = narrow(8, 16, 128)
    gates, heads = narrow(8, 16), torch.zeros(16)
    matrices = torch.zeros(4, 16, 128, 128)
    delta_step.gated_delta_step_slots(x, x, x, gates, gates, heads, heads, matrices, index(8), index(8), x, 1e-6)


def conv_step() -> None:
    from engine.ops.triton import conv_step

    conv_step.causal_conv_step_slots(narrow(8, 6144), narrow(6144, 4), torch.zeros(4, 3, 6144), index(8))


def rms_norm() -> None:
    from engine.ops.triton import rms_norm

    x = narrow(8, 1024)
    rms_norm.rms_norm(x, x[0], 1e-6, shifted=True)
    rms_norm.add_rms_norm(x, x, x[0], 1e-6, shifted=True)
    rms_norm.rms_norm(x.view(-1, 128), x[0, :128], 1e-6, gate=x.view(-1, 128))


def gated_activation() -> None:
    from engine.ops.triton import gated_activation

    x = narrow(8, 3584)
    for name in ("silu", "sigmoid", "gelu_new"):
        gated_activation.gated_activation(x, x, name)


def rope() -> None:
    from engine.ops.triton import rope

    rope.apply_rope(narrow(8, 8, 512)[..., :256], torch.zeros(8, 64), torch.zeros(8, 64))


def lora_rows() -> None:
    from engine.ops.triton import lora_rows

    addresses, numbers, scalings = index(32, 7, 2), index(32, 7), torch.zeros(32, 7)
    for rank in (8, 64):
        table = addresses[:, 3], numbers[:, 3], scalings[:, 3]
        lora_rows.add_rows(narrow(8, 2048), narrow(8, 1024), index(8), *table, rank)


def lora_segments() -> None:
    from engine.ops.triton import lora_segments

    addresses, numbers, scalings = index(5, 7, 2), index(5, 7), torch.zeros(5, 7)
    for rank in (8, 256):
        table = addresses[:, 3], numbers[:, 3], scalings[:, 3]
        lora_segments.add_segments(narrow(300, 2048), narrow(300, 1024), index(12, 3), *table, rank)


def int8_rows() -> None:
    from engine.ops.triton import int8_rows

    for rows in (1, 128):
        int8_rows.linear(narrow(rows, 1024), torch.zeros(3584, 1024, dtype=torch.int8), narrow(3584, 1))


def grouped_rows() -> None:
    from engine.ops.triton import grouped_rows

    values, signed = torch.zeros(3584, 512, dtype=torch.uint8), torch.zeros(3584, 1024, dtype=torch.int8)
    x, scale, half = narrow(128, 1024), narrow(3584, 8), torch.zeros(3584, 32, dtype=torch.float16)
    grouped_rows.linear(x, values, scale, zero=scale, shift=8)
    for rows in (1, 128):
        grouped_rows.linear(x[:rows], values, half, offset=half)
    grouped_rows.linear(x, signed, torch.zeros(3584, 64))


def backwards() -> None:
    from engine.ops.triton import gated_activation, rms_norm

    x = narrow(8, 1024)
    rms_norm.rms_norm_backward(x, x[0], x, 1e-6, shifted=True)
    rms_norm.rms_norm_backward(x.view(-1, 128), x[0, :128], x.view(-1, 128), 1e-6, gate=x.view(-1, 128))
    for name in ("silu", "sigmoid", "gelu_new"):
        gated_activation.gated_activation_backward(x, x, x, name)


def softmax_gradient() -> None:
    from engine.ops.triton import softmax_gradient

    logits = torch.zeros(2, 248320)
    softmax_gradient.nll_and_gradient(logits, index(2), logits)


CALLS: dict[str, tuple[Callable[[], None], int]] = {
    # By name: what calls the kernels, and how many it launches.
    "paged_attention, 0.8B hybrid": (lambda: paged_attention(1, 8, 2, 256, None, None), 3),
    "paged_attention, window, no split": (lambda: paged_attention(128, 9, 3, 64, 512, 50.0), 2),
    "delta_step": (delta_step, 1),
    "conv_step": (conv_step, 1),
    "rms_norm": (rms_norm, 3),
    "gated_activation": (gated_activation, 3),
    "rope": (rope, 1),
    "lora_rows": (lora_rows, 4),
    "lora_segments": (lora_segments, 4),
    "int8_rows": (int8_rows, 2),
    "grouped_rows": (grouped_rows, 4),
    "backwards": (backwards, 5),
    "softmax_gradient": (softmax_gradient, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches only compile, for a driver that says it has such a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    compiled: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append(run(self, *args, **(kwargs | {"warmup": True})))

    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    call, launches = CALLS[name]
    call()
    assert len(compiled) == launches
    for kernel in compiled:
        assert len(kernel.asm["cubin"]) > 1000
        assert kernel.metadata.shared <= SHARED_BYTES
