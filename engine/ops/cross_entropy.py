"""The negative log-likelihood of targets, and its gradient in the place of the logits.

Shapes: N positions, V vocabulary. Proof: tests/unit/test_training_loss_slices.py, tests/unit/test_triton_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops.backends import uses_triton


def nll_and_gradient(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of NLLs and its gradient, softmax(logits) - one_hot(targets), in ``out``, which may be ``logits``.

    Args:
        logits: [N, V], float32 or float64.
        targets: [N] int64.
        out: [N, V] in the type of the logits.
    """
    if uses_triton(logits.device) and logits.dtype == torch.float32 and logits.stride(1) == out.stride(1) == 1:
        from engine.ops.triton import softmax_gradient

        return softmax_gradient.nll_and_gradient(logits, targets, out).sum(), out
    return nll_and_gradient_reference(logits, targets, out)


def nll_and_gradient_reference(logits: Tensor, targets: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """See ``nll_and_gradient``. One pass of exponentials, where the functions of torch take two and two more tensors of
    this size."""
    at = targets[:, None]
    largest, of_targets = logits.amax(dim=-1), logits.gather(1, at)[:, 0]
    probs = torch.softmax(logits, dim=-1, out=out)
    # The largest probability is 1 / sum(exp(logits - largest logit)), which gives the logarithm of the sum.
    log_sum = largest - probs.amax(dim=-1).log()
    return (log_sum - of_targets).sum(), probs.scatter_add_(1, at, torch.full_like(at, -1, dtype=probs.dtype))
