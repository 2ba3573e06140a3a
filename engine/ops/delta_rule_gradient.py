"""The gated delta rule over whole sequences with a backward of its own, as training needs it on the CPU.

The forward is that of serving, from a state of zeros. The backward keeps what the forward was given and nothing else:
it makes the states before all chunks again and then takes the chunks from the last to the first. On the CPU both are
kernels, in float32. In float64, in which gradients are checked, both are plain torch.

Of one chunk of one head, in the names of ``chunk_gated_delta_rule`` (engine.ops.delta_rule) with e = exp(G),
l = exp(G_C - G), D_ij = exp(G_i - G_j):

    A = tril(beta_i D_ij k_i . k_j, -1)     P = tril(D_ij q_i . k_j)     (I + A) U = beta (V - e K S)
    O = e Q S + P U                         S' = e_C S + K^T (l U)

and, from dO and dS' of the chunk behind it,

    dU = P^T dO + l K dS'       (I + A)^T X = dU        R = -beta e X       Y = e dO
    M = -tril(X U^T, -1) beta D                         Z = tril(dO U^T) D
    dV = beta X                 dK = (M + M^T) K + Z^T Q + R S^T + l U dS'^T
    dQ = Z K + Y S^T            dS = e_C dS' + K^T R + Q^T Y
    dbeta_i = sum_j M_ij k_i . k_j / beta_i + X_i . (V - e K S)_i

The gradient of G_i is what row i gives of A dA + P dP less what column i gives of it, plus R_i . (K S)_i and
Y_i . (Q S)_i, less l_i (K dS')_i . U_i; that of the last also e_C S . dS' and all of these l_i (K dS')_i . U_i.

Shapes: as in engine.ops.delta_rule. Proof: tests/unit/test_function_gradients.py, test_delta_rule.py and
test_cpu_gradients.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.ops import cpu
from engine.ops.delta_rule import (
    CHUNK_SIZE_CPU,
    L2_EPS,
    chunk_gated_delta_rule,
    gated_delta_sequence,
    gates,
    l2_normalize,
    plan_chunks,
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def kernels_take(key_width: int, value_width: int) -> bool:
    """Whether there are kernels for heads of these widths, in float32."""
    return cpu.available() and key_width % cpu.CHUNK_WIDTHS == 0 and value_width % cpu.CHUNK_WIDTHS == 0


def takes(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> bool:
    """Whether ``gated_delta_sequences`` computes with these: by kernels, or in float64 where a gradient is wanted."""
    with_gradients = torch.is_grad_enabled()
    if with_gradients and (a_log.requires_grad or dt_bias.requires_grad):
        return False
    if not q.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    given = (q, k, v, a, b)
    if all(tensor.dtype == torch.float64 for tensor in given):
        return with_gradients and any(tensor.requires_grad for tensor in given)
    with torch.no_grad():
        return kernels_take(k.shape[2], v.shape[2]) and cpu.takes(*given, a_log, dt_bias)


def gated_delta_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    seq_starts: Sequence[int],
) -> Tensor:
    """The gated delta rule of packed sequences from their first tokens.

    Args:
        q, k: [T, H_k, K], neither scaled nor normalised. v: [T, H_v, V].
        a, b, a_log, dt_bias: of ``gates``. ``takes`` took them all.
        seq_starts: S + 1 offsets, from 0 to T.
    Returns: [T, H_v, V].
    """
    return _GatedDeltaRule.apply(q, k, v, a, b, a_log, dt_bias, seq_starts)  # type: ignore[no-any-return, no-untyped-call]


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        seq_starts: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, a, b, a_log, dt_bias)
        ctx.seq_starts = list(seq_starts)
        if not cpu.takes(q, k, v, a, b, a_log, dt_bias):
            plan = plan_chunks([end - start for start, end in pairwise(seq_starts)])
            inputs = (*_normalized(q, k), v, *gates(a, b, a_log, dt_bias))
            return chunk_gated_delta_rule(*inputs, plan)[0]
        out = torch.empty(v.shape)
        for start, end in pairwise(seq_starts):
            q_, k_, v_, a_, b_, out_ = (tensor[start:end] for tensor in (q, k, v, a, b, out))
            state = torch.zeros(v.shape[1], k.shape[2], v.shape[2])
            gated_delta_sequence(q_, k_, v_, a_, b_, a_log, dt_bias, state, out_)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, a, b, a_log, dt_bias = ctx.saved_tensors
        if cpu.takes(q, k, v, a, b, grad):
            starts = torch.tensor(ctx.seq_starts)
            found = cpu.delta_chunk_gradient(q, k, v, a, b, a_log, dt_bias, grad, starts, L2_EPS)
            return *found, None, None, None
        with torch.enable_grad():
            leaves = q, k, v, a, b = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v, a, b))
            prepared = (*_normalized(q, k), v, *gates(a, b, a_log, dt_bias))
        normed_q, normed_k, _, g, beta = (tensor.detach() for tensor in prepared)
        found = gated_delta_rule_gradient(normed_q, normed_k, v.detach(), g, beta, grad, ctx.seq_starts)
        return *torch.autograd.grad(prepared, leaves, found), None, None, None


def _normalized(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return l2_normalize(q, scale=q.shape[-1] ** -0.5), l2_normalize(k)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of one sequence, of every value head.

    Attributes:
        q, k: [H_v, C, K]. v: [H_v, C, V]. beta: [H_v, C, 1].
        sums: [H_v, C], G.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor
    beta: Tensor

    def decays(self) -> Tensor:
        """D, 0 above the diagonal."""
        later = torch.ones(self.sums.shape[1], self.sums.shape[1], dtype=torch.bool).triu(1)
        return (self.sums[:, :, None] - self.sums[:, None]).masked_fill(later, float("-inf")).exp()

    def left(self) -> Tensor:
        """l, [H_v, C, 1]."""
        return (self.sums[:, -1:] - self.sums).exp()[..., None]

    def system(self) -> Tensor:
        """A."""
        return (self.k @ self.k.mT * self.decays() * self.beta).tril(-1)

    def targets(self, state: Tensor) -> Tensor:
        """V - e K S."""
        return self.v - self.sums.exp()[..., None] * (self.k @ state)

    def corrections(self, state: Tensor) -> Tensor:
        """U."""
        wanted = self.beta * self.targets(state)
        solved: Tensor = torch.linalg.solve_triangular(self.system(), wanted, upper=False, unitriangular=True)
        return solved

    def after(self, state: Tensor) -> Tensor:
        """S'."""
        through = self.sums[:, -1, None, None].exp()
        return through * state + self.k.mT @ (self.left() * self.corrections(state))

    def gradient(self, state: Tensor, grad: Tensor, d_after: Tensor) -> tuple[Gradients, Tensor]:
        """Of q, k, v, G [H_v, C] and beta [H_v, C], from dO [H_v, C, V] and dS'; and dS."""
        grown, left, decays, system = self.sums.exp()[..., None], self.left(), self.decays(), self.system()
        weights, corrections = self.q @ self.k.mT * decays, self.corrections(state)
        kept = left * (self.k @ d_after)
        x = torch.linalg.solve_triangular(system.mT, weights.mT @ grad + kept, upper=True, unitriangular=True)
        d_system, d_weights = -(x @ corrections.mT).tril(-1), (grad @ corrections.mT).tril()
        m, z = d_system * self.beta * decays, d_weights * decays
        of_keys, of_queries = -self.beta * grown * x, grown * grad  # R and Y
        d_q = z @ self.k + of_queries @ state.mT
        d_k = (m + m.mT) @ self.k + z.mT @ self.q + of_keys @ state.mT + left * corrections @ d_after.mT
        d_beta = (d_system * decays * (self.k @ self.k.mT)).sum(-1) + (x * self.targets(state)).sum(-1)
        pairs = d_system * system + d_weights * weights
        d_sums = pairs.sum(-1) - pairs.sum(-2)
        d_sums += (of_keys * (self.k @ state)).sum(-1) + (of_queries * (self.q @ state)).sum(-1)
        of_left = (kept * corrections).sum(-1)
        d_sums -= of_left
        through = self.sums[:, -1, None, None].exp()
        d_sums[:, -1] += of_left.sum(-1) + (through * state * d_after).sum((-2, -1))
        d_state = through * d_after + self.k.mT @ of_keys + self.q.mT @ of_queries
        return (d_q, d_k, self.beta * x, d_sums, d_beta), d_state


def gated_delta_rule_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    grad: Tensor,
    seq_starts: Sequence[int],
    chunk_size: int = CHUNK_SIZE_CPU,
) -> Gradients:
    """The gradients for the inputs of ``recurrent_gated_delta_rule`` without a state before; the kernel's reference.

    Args:
        grad: [T, H_v, V], of the outputs.
    """
    repeats = v.shape[1] // k.shape[1]
    wide = (q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1), v, g, beta[..., None], grad)
    by_head = [tensor.transpose(0, 1) for tensor in wide]
    found = [torch.empty_like(tensor) for tensor in (*by_head[:4], by_head[4][..., 0])]
    for start, end in pairwise(seq_starts):
        state = d_state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        passed = []
        for first in range(start, end, chunk_size):
            tokens = slice(first, min(first + chunk_size, end))
            q_, k_, v_, g_, beta_, grad_ = (tensor[:, tokens] for tensor in by_head)
            chunk = _Chunk(q_, k_, v_, g_.cumsum(1), beta_)
            passed.append((tokens, chunk, state, grad_))
            state = chunk.after(state)
        for tokens, chunk, before, grad_ in reversed(passed):
            gradients, d_state = chunk.gradient(before, grad_, d_state)
            d_q, d_k, d_v, d_sums, d_beta = gradients
            d_g = d_sums.flip(1).cumsum(1).flip(1)
            for into, value in zip(found, (d_q, d_k, d_v, d_g, d_beta), strict=True):
                into[:, tokens] = value
    d_q, d_k, d_v, d_g, d_beta = (tensor.transpose(0, 1) for tensor in found)
    d_q, d_k = (tensor.reshape(*k.shape[:2], repeats, -1).sum(2) for tensor in (d_q, d_k))
    return d_q, d_k, d_v, d_g, d_beta
