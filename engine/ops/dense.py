"""Multiplication by a weight that is stored as it is, for few rows of input as for many.

Shapes: M rows of the input, I in_features, O out_features, P parts.

A product of few rows is bound by reading W. On a CPU, torch's ``F.linear`` then reads it with one thread: MKL does not
divide a product of a matrix and a vector, and divides those of few vectors badly. Cut along its outputs, W becomes a
batch of P smaller products that threads share: nothing is copied or repacked, so the weight stays the one that the
checkpoint's memory map holds, and training and every other reader use it as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 16
"""Rows up to which the divided product is used."""

MIN_ELEMENTS = 1 << 19
"""Elements of W from which waking a thread pays for itself."""

PARTS = 4


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed: [..., O]; differentiable like ``linear_reference``.

    On two threads of a busy Zen 3, ``F.linear`` took 0.8 to 1.9 times as long with one row (the gain grows with W), and
    1.3 to 4.2 times with 2 to 16 (shapes of SmolLM2-135M and Qwen3.5-0.8B).
    """
    if is_divided(x, weight):
        return linear_divided(x, weight, left=_weight_is_left(x, weight))
    return linear_reference(x, weight)


def is_divided(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` divides that product."""
    return (
        0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and weight.numel() >= MIN_ELEMENTS
        and weight.dtype == x.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.shape[0] % PARTS == 0
        and not torch.is_autocast_enabled("cpu")
        and (torch.get_num_threads() > 1 or _weight_is_left(x, weight))
    )


def _weight_is_left(x: Tensor, weight: Tensor) -> bool:
    """With W as the left factor, MKL passes over it once for all rows; that is the faster for these."""
    num_rows = x.numel() // x.shape[-1]
    return num_rows == 4 or (num_rows in (2, 3) and weight.shape[0] >= weight.shape[1])


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """torch's product."""
    return F.linear(x, weight)


def linear_divided(x: Tensor, weight: Tensor, *, left: bool) -> Tensor:
    """The same in PARTS products, which must divide O; ``left`` says on which side W stands."""
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    num_rows = flat.shape[0]
    parts = weight.view(PARTS, out_features // PARTS, in_features)
    if left:
        y = torch.bmm(parts, flat.t().expand(PARTS, in_features, num_rows)).permute(2, 0, 1)
    else:
        y = torch.bmm(flat.expand(PARTS, num_rows, in_features), parts.mT).transpose(0, 1)
    return y.reshape(*x.shape[:-1], out_features)
