"""Triton kernels. Only engine.ops.<operation> imports them, once engine.ops.backends has said that they can run.

They run under TRITON_INTERPRET=1 on a CPU too, which is how the ordinary tests prove them against their references.
"""

from torch import Tensor


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x [..., D] as rows, for kernels that find a row at (row // inner) * outer_stride + row % inner * inner_stride.

    Returns: x, copied only if its rows lie in no such order; inner, outer_stride and inner_stride.
    """
    if x.dim() == 3 and x.stride(2) == 1:
        return x, x.shape[1], x.stride(0), x.stride(1)
    if x.dim() == 2 and x.stride(1) == 1:
        return x, 1, x.stride(0), 0
    return x.contiguous(), 1, x.shape[-1], 0
