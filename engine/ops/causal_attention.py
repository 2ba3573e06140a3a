"""Causal attention of whole sequences with a backward of its own, as training needs it.

The forward is that of serving (engine.ops.attention), and keeps the logarithm of each softmax's sum; the backward makes
the probabilities again from it (Dao et al., arXiv:2205.14135). On the CPU both are kernels, in float32. In float64, in
which gradients are checked, both are plain torch.

Shapes: T tokens, S sequences, H_q query heads, H_kv key heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether ``causal_attention`` computes with these: a gradient is wanted, on the CPU."""
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad) and q.is_cpu):
        return False
    if not q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if q.dtype == torch.float64:
        return True
    fits = q.shape[2] <= cpu.MAX_WIDTH and q.shape[2] % cpu.GRADIENT_WIDTHS == 0
    return cpu.available() and q.dtype == torch.float32 and fits


def causal_attention(q: Tensor, k: Tensor, v: Tensor, seq_starts: Tensor, scale: float) -> Tensor:
    """Each token attends to those of its sequence up to itself.

    Args:
        q: [T, H_q, D]. k, v: [T, H_kv, D]. ``takes`` took them.
        seq_starts: [S + 1] int64 on the CPU.
    Returns: [T, H_q, D].
    """
    return _CausalAttention.apply(q, k, v, seq_starts, scale)  # type: ignore[no-any-return, no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    """With P the probabilities and dO the gradient that comes in: dV = P^T dO, dS = P (dO V^T - sum(dO O)),
    dQ = dS K scale, dK = dS^T Q scale."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seq_starts: Tensor, scale: float) -> Tensor:
        log_sums = q.new_empty(q.shape[:2])
        if cpu.takes(q, k, v):
            options: dict[str, Any] = {"scale": scale, "causal": True, "window": None, "log_sums": log_sums}
            out = cpu.tiled_attention(q, k, v, seq_starts, seq_starts.diff(), **options)
        else:
            out = torch.empty_like(q)
            for begin, end in _sequences(seq_starts):
                scores = _scores(q[begin:end], k[begin:end], scale)
                log_sums[begin:end] = scores.logsumexp(dim=-1).T
                weighted = scores.softmax(dim=-1) @ _per_query_head(v[begin:end], q.shape[1])
                out[begin:end] = weighted.transpose(0, 1)
        ctx.save_for_backward(q, k, v, out, log_sums, seq_starts)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, seq_starts = ctx.saved_tensors
        if cpu.takes(q, k, v, grad):
            return (*cpu.attention_gradient(q, k, v, out, grad, log_sums, seq_starts, ctx.scale), None, None)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        heads, kv_heads = q.shape[1], k.shape[1]
        for begin, end in _sequences(seq_starts):
            part = slice(begin, end)
            p = (_scores(q[part], k[part], ctx.scale) - log_sums[part].T[..., None]).exp()
            incoming = grad[part].transpose(0, 1)
            along = (grad[part] * out[part]).sum(dim=-1).T[..., None]
            d_s = p * (incoming @ _per_query_head(v[part], heads).mT - along) * ctx.scale
            d_q[part] = (d_s @ _per_query_head(k[part], heads)).transpose(0, 1)
            for into, of_heads in ((d_k, d_s.mT @ q[part].transpose(0, 1)), (d_v, p.mT @ incoming)):
                into[part] = of_heads.unflatten(0, (kv_heads, -1)).sum(dim=1).transpose(0, 1)
        return d_q, d_k, d_v, None, None


def _sequences(seq_starts: Tensor) -> Sequence[tuple[int, int]]:
    starts = seq_starts.tolist()
    return list(itertools.pairwise(starts))


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """x [n, H_kv, D] as [H_q, n, D]."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[H_q, n, n] of one sequence; -inf where a key is behind the query."""
    scores = q.transpose(0, 1) @ _per_query_head(k, q.shape[1]).mT * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf"))
