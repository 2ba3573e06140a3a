"""Integers packed into int32 words, as compressed-tensors' "pack-quantized" stores them.

A value of b bits is stored with an offset of 2^(b-1), so it is never negative; the value at index i of a row has its
lowest bit at bit ``i * b`` of the row, words being little-endian. The last word of a row is padded with zero bits.
Four-bit values that share a zero point's tensor are packed along the outputs in place of the inputs.

Source: compressed-tensors 0.20, ``compressors/pack_quantized/helpers.py``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.quantized import unpack_int4, unpack_int8

Bits = Literal[4, 8]


def packed_width(num_values: int, bits: Bits) -> int:
    """Words that hold so many values."""
    return math.ceil(num_values * bits / 32)


def pack(values: Tensor, bits: Bits) -> Tensor:
    """Packs rows.

    Args:
        values: [O, I] int8 in [-2^(bits-1), 2^(bits-1) - 1].

    Returns: [O, ceil(I * bits / 32)] int32.
    """
    offset = 1 << (bits - 1)
    assert values.dtype == torch.int8
    unsigned = (values.to(torch.int16) + offset).to(torch.uint8)
    per_word = 32 // bits
    unsigned = F.pad(unsigned, (0, -values.shape[1] % per_word))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    # Flat, since a dimension of size 1 may have any stride, which view would mind.
    return unsigned.reshape(-1).view(torch.int32).view(values.shape[0], -1)


def unpack(packed: Tensor, num_values: int, bits: Bits) -> Tensor:
    """Reverses pack: [O, num_values] int8."""
    return unpack_int4(packed, num_values) if bits == 4 else unpack_int8(packed, num_values)


def pack_outputs(values: Tensor, bits: Bits) -> Tensor:
    """Packs along the outputs, as zero points are: [O, G] int8 to [ceil(O * bits / 32), G] int32."""
    return pack(values.T.contiguous(), bits).T.contiguous()


def unpack_outputs(packed: Tensor, num_outputs: int, bits: Bits) -> Tensor:
    """Reverses pack_outputs: [num_outputs, G] int8."""
    return unpack(packed.T.contiguous(), num_outputs, bits).T.contiguous()
