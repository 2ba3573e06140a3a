"""Numbers from the host to a device, without the host waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor [n] of them there. A copy to a CUDA device goes from pinned memory, in the order of its stream: from
    pageable memory the host would wait until all that was asked of the device before is done."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
