"""Cross-entropy over a large vocabulary without the logits of a whole sequence.

Shapes: N positions whose prediction counts, D hidden size, V vocabulary.

The head is frozen, so all that backward needs is the gradient of the hidden states, which is no larger than they are.
It is computed chunk by chunk together with the loss, while the chunk's logits exist; nothing is recomputed later. The
idea is that of the fused linear cross-entropy in Liger-Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops.cross_entropy import nll_and_gradient

LOGITS_CHUNK_BYTES = 128 << 20
"""At most so many bytes of float32 logits exist at a time, but one row at least. At
Qwen3.5's vocabulary that is 135 rows: on a Zen 3, products of 64 rows ran at 0.8 to 0.9 of the rate of 128."""

MAX_CHUNK_ROWS = 256
"""Rows of logits beyond which a product gains nothing."""

Head = Callable[[Tensor], Tensor]


def chunk_rows(vocab_size: int, chunk_bytes: int = LOGITS_CHUNK_BYTES, num_rows: int | None = None) -> int:
    """Rows of logits that exist at a time; of ``num_rows``, as many as make chunks of like size."""
    rows = max(1, min(MAX_CHUNK_ROWS, chunk_bytes // (4 * vocab_size)))
    return rows if not num_rows else -(-num_rows // -(-num_rows // rows))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of NLLs; the gradient of ``hidden`` is formed in forward and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        total = hidden.new_zeros((), dtype=_sum_dtype(hidden))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            chunk, wanted = hidden[start : start + rows].detach(), targets[start : start + rows]
            if gradient is None:
                total += _nll_sum(head(chunk), wanted)
                continue
            with torch.enable_grad():
                chunk.requires_grad_()
                logits = head(chunk)
            wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            # In their own place: a head keeps its inputs for the backward, none its logits (autograd would refuse).
            nll, probs = nll_and_gradient(wide, wanted, wide)
            del wide
            (gradient[start : start + rows],) = torch.autograd.grad(logits, chunk, probs.to(logits.dtype))
            total += nll
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else (gradient * grad_output).to(gradient.dtype)), None, None, None


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, vocab_size: int, chunk_bytes: int = LOGITS_CHUNK_BYTES
) -> Tensor:
    """Sum of the negative log-likelihoods of the targets, in nats; differentiable with respect to ``hidden`` alone.

    Args:
        hidden: [N, D], the states from which the targets are predicted.
        targets: [N] int64.
        head: hidden [n, D] to logits [n, V]; its parameters get no gradient.
        vocab_size: V.
    Returns: scalar, float32 (float64 where hidden is); 0 where N is 0.
    """
    rows = chunk_rows(vocab_size, chunk_bytes, len(hidden))
    if not torch.is_grad_enabled():
        hidden = hidden.detach()  # a Function asks its inputs alone whether to form gradients
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, head, rows)  # type: ignore[no-untyped-call]
    return total
