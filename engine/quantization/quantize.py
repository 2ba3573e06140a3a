"""Rounds weights to integers: the arithmetic of Q8 and Q4.

Shapes: O rows of a weight, I inputs, G groups along the input (1 for Q8), S = I / G.

Symmetric: q = round(w / scale). Asymmetric: q = round(w / scale + zero). The step is (range / (2^bits - 1)), so that
the ends of the range fall half a step beyond the outermost integers: every value within the range is at most half a
step from its own.

Q8 keeps the whole range. Q4 tries narrower ranges for each group and keeps the one with the least squared error, since
a coarse grid loses more on the many values inside than on the few that it clips (Banner, Nahshan and Soudry,
arXiv:1810.05723; the search over shrunken ranges is that of the MSE observer in llm-compressor).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantization.packing import Bits

SEARCHED_FRACTIONS = tuple(1.0 - 0.05 * step for step in range(9))
"""Of a group's range, 1.0 to 0.6. On SmolLM2-135M in groups of 32 the search takes the mean relative error from 0.099
to 0.087 and the logit KL from 0.42 to 0.35 nats; half the distance between fractions gives an error of 0.0865."""


@dataclass(slots=True)
class QuantizedRows:
    """Some rows of a quantized weight.

    Attributes:
        values: [O, I] int8.
        scale: [O, G] in the type in which it is stored.
        zero: [O, G] int8, or None for symmetric.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None

    def dequantize(self) -> Tensor:
        """[O, I] float32."""
        rows, groups = self.scale.shape
        wide = self.values.float().view(rows, groups, -1)
        if self.zero is not None:
            wide = wide - self.zero.float().unsqueeze(-1)
        return (wide * self.scale.float().unsqueeze(-1)).view(rows, -1)


def quantize_rows(
    weight: Tensor,
    *,
    bits: Bits,
    group_size: int | None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    search: bool = True,
) -> QuantizedRows:
    """Quantizes rows of a weight.

    Args:
        weight: [O, I] float32, finite.
        group_size: S; None: one group is the whole row.
        scale_dtype: scales are rounded to this before values are rounded by them.
        search: look for the range of least squared error in place of taking the whole range.
    """
    rows, columns = weight.shape
    grouped = weight.view(rows, -1, group_size or columns)
    assert grouped.dtype == torch.float32
    low = grouped.amin(dim=-1).clamp(max=0.0)
    high = grouped.amax(dim=-1).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale, zero = _grid(low, high, bits, symmetric, scale_dtype)
    values = _round(grouped, scale, zero, bits)
    if search:
        least = _squared_error(grouped, values, scale, zero)
        for fraction in SEARCHED_FRACTIONS[1:]:
            new_scale, new_zero = _grid(low * fraction, high * fraction, bits, symmetric, scale_dtype)
            error = _squared_error(grouped, _round(grouped, new_scale, new_zero, bits), new_scale, new_zero)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
        values = _round(grouped, scale, zero, bits)
    return QuantizedRows(
        values=values.to(torch.int8).view(rows, columns),
        scale=scale.to(scale_dtype),
        zero=None if symmetric else zero.to(torch.int8),
    )


def _grid(low: Tensor, high: Tensor, bits: Bits, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O, G] for values in [low, high], both float32 and as they will be stored."""
    scale = ((high - low) / ((1 << bits) - 1)).to(scale_dtype).float()
    smallest = torch.finfo(scale_dtype).tiny  # a range too narrow for the type, or none: any scale will do
    scale = torch.where(scale > 0.0, scale, torch.full_like(scale, smallest))
    if symmetric:
        return scale, torch.zeros_like(scale)
    least = -(1 << (bits - 1))
    return scale, (least - low / scale).round().clamp(least, -least - 1)


def _round(grouped: Tensor, scale: Tensor, zero: Tensor, bits: Bits) -> Tensor:
    """Integers of [O, G, S] as float32."""
    half = 1 << (bits - 1)
    return (grouped / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(-half, half - 1)


def _squared_error(grouped: Tensor, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[O, G], of what the integers stand for; uses up ``values``."""
    return values.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(grouped).square_().sum(dim=-1)
