"""One token of the causal convolution for many sequences, each window in its slot; SiLU included.

Shapes: S sequences, C channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _conv_step(
    x_ptr,
    weight_ptr,
    windows_ptr,
    slots_ptr,
    out_ptr,
    x_stride,
    slot_stride,
    channels,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program serves BLOCK channels of one sequence."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    cs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cs < channels
    x = tl.load(x_ptr + n * x_stride + cs, mask=inside, other=0.0).to(tl.float32)
    weights = weight_ptr + cs * TAPS
    y = x * tl.load(weights + (TAPS - 1), mask=inside, other=0.0).to(tl.float32)
    window = windows_ptr + slot * slot_stride + cs
    for j in tl.static_range(TAPS - 1):
        earlier = tl.load(window + j * channels, mask=inside, other=0.0)
        y += earlier * tl.load(weights + j, mask=inside, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(window + (j - 1) * channels, earlier, mask=inside)
    if TAPS > 1:
        tl.store(window + (TAPS - 2) * channels, x, mask=inside)
    y = y * tl.sigmoid(y)
    tl.store(out_ptr + n * channels + cs, y.to(out_ptr.dtype.element_ty), mask=inside)


def causal_conv_step_slots(x: Tensor, weight: Tensor, windows: Tensor, slots: Tensor) -> Tensor:
    """As engine.ops.causal_conv.causal_conv_step_slots."""
    num, channels = x.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert windows.dtype == torch.float32
    assert windows[0].is_contiguous()
    out = torch.empty(num, channels, dtype=x.dtype, device=x.device)
    block = min(256, triton.next_power_of_2(channels))
    _conv_step[(num, triton.cdiv(channels, block))](
        x,
        weight,
        windows,
        slots,
        out,
        x.stride(0),
        windows.stride(0),
        channels,
        TAPS=weight.shape[1],
        BLOCK=block,
        num_warps=4,
    )
    return out
