"""GGUF's quantized blocks taken apart: the integers, and what each group of them is scaled and shifted by.

w = q * scale + offset, without any rounding but that of the result, so a model that keeps the integers computes with
the very weights that dequantizing the file gives. Types whose integers are no affine code (IQ, ternary, MXFP4) or that
have fewer than 4 bits are not here; they are dequantized.

Shapes: R rows, I inputs, S group size, G = I / S.

Source: ``ggml-common.h`` of https://github.com/ggml-org/ggml. Reference: ``gguf.quants.dequantize``
(tests/parity/test_gguf_blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Parts = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]
"""Integers, scales [blocks, groups of a block], offsets of that shape or None."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's block types.

    Attributes:
        name: in lower case, as llama.cpp prints it.
        bits: 4: integers of [0, 16), which are kept in halves of bytes; 8: those of more bits, kept as signed bytes.
        block_size: values of a block; block_bytes: as stored.
        group_size: S.
        half_scales: scales and offsets are exact in float16; else they are products, exact in float32.
        has_offsets: or all offsets are 0.
        zero_point: subtracted from the kept integers.
        decode: blocks [n, block_bytes] to its Parts, integers [n, block_size] int8, or [n, block_size / 2] uint8 of two
            a byte.
    """

    name: str
    bits: int
    block_size: int
    block_bytes: int
    group_size: int
    half_scales: bool
    has_offsets: bool
    zero_point: int
    decode: Callable[[Bytes], Parts]


def _half(blocks: Bytes, start: int) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks.view("<f2")[:, start // 2 : start // 2 + 1])


def _nibbles(data: Bytes, width: int) -> Bytes:
    """Of runs of ``width`` bytes, first all lower halves, then all upper ones: [n, B] to [n, 2 B]."""
    runs = data.reshape(len(data), -1, 1, width)
    return np.concatenate((runs & 15, runs >> 4), axis=2).reshape(len(data), -1)


def _pairs(data: Bytes, width: int) -> Bytes:
    """The same integers, two consecutive ones a byte, the earlier one in the lower half: [n, B] to [n, B]."""
    words = np.ascontiguousarray(data).view("<u8").reshape(-1)
    out = np.empty((len(words) * 8 // width, 2, width // 16), "<u8")
    for half in range(2):
        if half:
            words = words >> np.uint64(4)
        # Of the 16 bits of two bytes, the 4 of the first and, moved next to them, the 4 of the second.
        both = words & np.uint64(0x000F000F000F000F) | words >> np.uint64(4) & np.uint64(0x00F000F000F000F0)
        out[:, half] = both.view("<u2").astype(np.uint8).view("<u8").reshape(len(out), -1)
    return out.view(np.uint8).reshape(len(data), -1)


def _fifth_bits(data: Bytes) -> Bytes:
    """[n, 4] bytes: bit i of 32 as the 16 of value i."""
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


def _scales_and_mins(data: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and eight minima of 6 bits in the 12 bytes of a K block: [n, 12] to twice [n, 8]."""
    low, middle, high = data[:, 0:4], data[:, 4:8], data[:, 8:12]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    return scales, np.concatenate((middle & 63, (high >> 4) | (middle >> 6 << 4)), axis=1)


def _q4_0(blocks: Bytes) -> Parts:
    return _pairs(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Parts:
    return _pairs(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Parts:
    values = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return values.view(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Parts:
    values = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return values.view(np.int8), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Parts:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _k_groups(blocks: Bytes) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Scales and offsets of the eight groups of a Q4_K or Q5_K block, float32."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    step, low = _half(blocks, 0).astype(np.float32), _half(blocks, 2).astype(np.float32)
    return step * scales, -(low * mins)


def _q4_k(blocks: Bytes) -> Parts:
    return _pairs(blocks[:, 16:], 32), *_k_groups(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    high, low = blocks[:, 16:48], _nibbles(blocks[:, 48:], 32)
    # Byte i holds the fifth bits of value i of each of the eight groups, the first group's lowest.
    fifth = (high[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(blocks), -1)
    return (low | fifth << np.uint8(4)).view(np.int8), *_k_groups(blocks)


def _q6_k(blocks: Bytes) -> Parts:
    low, high = _nibbles(blocks[:, :128], 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    pairs = (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(blocks), -1)
    values = (low | pairs << np.uint8(4)).view(np.int8) - np.int8(32)
    return values, _half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8), None


_TYPES: dict[int, BlockType] = {
    2: BlockType("q4_0", 4, 32, 18, 32, True, False, 8, _q4_0),
    3: BlockType("q4_1", 4, 32, 20, 32, True, True, 0, _q4_1),
    6: BlockType("q5_0", 8, 32, 22, 32, True, False, 0, _q5_0),
    7: BlockType("q5_1", 8, 32, 24, 32, True, True, 0, _q5_1),
    8: BlockType("q8_0", 8, 32, 34, 32, True, False, 0, _q8_0),
    12: BlockType("q4_k", 4, 256, 144, 32, False, True, 0, _q4_k),
    13: BlockType("q5_k", 8, 256, 176, 32, False, True, 0, _q5_k),
    14: BlockType("q6_k", 8, 256, 210, 16, False, False, 0, _q6_k),
}
"""ggml's type number to the block."""

BLOCK_TYPES: dict[str, BlockType] = {block.name: block for block in _TYPES.values()}


def block_type(type_id: int) -> BlockType | None:
    """The block of a ggml type; None if its integers cannot be kept."""
    return _TYPES.get(type_id)


def take_apart(block: BlockType, rows: Bytes, num_inputs: int) -> Parts:
    """Rows of a matrix as integers, scales and offsets.

    Args:
        rows: [R, bytes of a row].
        num_inputs: I, whole blocks.
    Returns: integers [R, I] int8, or [R, I / 2] uint8 of two a byte, the lower half first; scales and offsets [R, G].
    """
    values, scales, offsets = block.decode(rows.reshape(-1, block.block_bytes))
    values = values.reshape(len(rows), num_inputs * block.bits // 8)
    shape = (len(rows), num_inputs // block.group_size)
    return np.ascontiguousarray(values), scales.reshape(shape), None if offsets is None else offsets.reshape(shape)
