"""Softmax minus the one-hot target, in place: each logit is read twice and written once.

Shapes: N rows, V columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _softmax_gradient(logits_ptr, targets_ptr, nll_ptr, out_ptr, width, stride, out_stride, BLOCK: tl.constexpr):
    """A program takes a row: first its largest logit and the sum beside it, then what each logit becomes."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    of_target = tl.load(logits_ptr + row * stride + target)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * stride + columns, mask=columns < width, other=float("-inf"))
        raised = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - raised) + tl.sum(tl.exp(x - raised), axis=0)
        largest = raised
    tl.store(nll_ptr + row, largest + tl.log(total) - of_target)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(logits_ptr + row * stride + columns, mask=inside, other=float("-inf"))
        y = tl.exp(x - largest) / total - tl.where(columns == target, 1.0, 0.0)
        tl.store(out_ptr + row * out_stride + columns, y, mask=inside)


def nll_and_gradient(logits: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    """The NLL of each row [N] float32; see engine.ops.cross_entropy.nll_and_gradient. Rows may lie apart."""
    num_rows, width = logits.shape
    nll = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        block = min(BLOCK, triton.next_power_of_2(width))
        _softmax_gradient[(num_rows,)](
            logits, targets, nll, out, width, logits.stride(0), out.stride(0), BLOCK=block, num_warps=8
        )
    return nll
