"""Blocks taken apart and put together again are what the gguf package dequantizes them to, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.loading.gguf_blocks import BLOCK_TYPES, block_type, take_apart

ROWS, INPUTS = 7, 512


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_parts_give_the_dequantized_weight(name: str) -> None:
    block = BLOCK_TYPES[name]
    kind = GGMLQuantizationType[name.upper()]
    assert GGML_QUANT_SIZES[kind] == (block.block_size, block.block_bytes)
    assert block_type(int(kind)) is block
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (ROWS * INPUTS // block.block_size, block.block_bytes), dtype=np.uint8)
    for start in (0, 2) if name != "q6_k" else (208,):  # the float16 fields, which random bytes could make NaN
        if start == 0 or block.has_offsets or name == "q6_k":
            halves = rng.normal(0, 0.05, (len(blocks), 1)).astype(np.float16)
            blocks[:, start : start + 2] = halves.view(np.uint8)
    rows = blocks.reshape(ROWS, -1)
    values, scales, offsets = take_apart(block, rows, INPUTS)
    assert scales.dtype == (np.float16 if block.half_scales else np.float32)
    assert (offsets is not None) == block.has_offsets
    if block.bits == 4:
        wide = np.empty((ROWS, INPUTS), np.uint8)
        wide[:, 0::2], wide[:, 1::2] = values & 15, values >> 4
        values = wide
    groups = values.astype(np.float64).reshape(ROWS, -1, block.group_size) - block.zero_point
    together = groups * scales.astype(np.float64)[..., None]
    if offsets is not None:
        together += offsets.astype(np.float64)[..., None]
    wanted = dequantize(rows, kind)
    assert np.array_equal(together.astype(np.float32).reshape(ROWS, INPUTS), wanted)
