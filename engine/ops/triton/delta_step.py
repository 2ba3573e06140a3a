"""One token of the gated delta rule for many sequences, each from its slot and back into it.

Shapes: n sequences, H_k key heads, H_v value heads, R = H_v / H_k, K and V widths of a key and a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _delta_step(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    state_ptr,
    rows_ptr,
    slots_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    a_stride,
    b_stride,
    out_stride,
    slot_stride,
    scale,
    eps,
    HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program holds the state of one head of one sequence, all K rows of BLOCK_V columns."""
    n = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    row = tl.load(rows_ptr + n).to(tl.int64)
    slot = tl.load(slots_ptr + n).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    vs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = ks < K, vs < V
    of_key = head // REPEATS * K + ks
    q = tl.load(q_ptr + row * q_stride + of_key, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * k_stride + of_key, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_stride + head * V + vs, mask=in_v, other=0.0).to(tl.float32)
    q *= scale / tl.sqrt(tl.sum(q * q, axis=0) + eps)
    k *= 1.0 / tl.sqrt(tl.sum(k * k, axis=0) + eps)
    a = tl.load(a_ptr + row * a_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    # softplus; exp would overflow where it is the identity to the last bit
    a = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    decay = tl.exp(-tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * a)
    beta = tl.sigmoid(tl.load(b_ptr + row * b_stride + head).to(tl.float32))

    at = state_ptr + slot * slot_stride + head * (K * V) + ks[:, None] * V + vs[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(at, mask=inside, other=0.0) * decay
    correction = beta * (v - tl.sum(state * k[:, None], axis=0))
    state += k[:, None] * correction[None, :]
    out = tl.sum(state * q[:, None], axis=0)
    tl.store(at, state, mask=inside)
    tl.store(out_ptr + row * out_stride + head * V + vs, out.to(out_ptr.dtype.element_ty), mask=in_v)


def gated_delta_step_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    matrices: Tensor,
    rows: Tensor,
    slots: Tensor,
    out: Tensor,
    eps: float,
) -> None:
    """As engine.ops.delta_rule.gated_delta_step_slots; the last axes of all tensors are contiguous."""
    value_heads, width, value_width = matrices.shape[1:]
    block_k = triton.next_power_of_2(width)
    # Narrow blocks where few heads would leave most of a GPU idle; else some 4,096 numbers a program.
    few = rows.shape[0] * value_heads < 128
    block_v = min(triton.next_power_of_2(value_width), 8 if few else max(8, 4096 // block_k))
    assert matrices.dtype == torch.float32
    assert matrices[0].is_contiguous()
    for x in (q, k, v, out):
        assert x.stride(2) == 1
        assert x.stride(1) == x.shape[2]
    assert a.stride(1) == b.stride(1) == 1
    _delta_step[(rows.shape[0] * value_heads, triton.cdiv(value_width, block_v))](
        q,
        k,
        v,
        a,
        b,
        a_log,
        dt_bias,
        matrices,
        rows,
        slots,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        a.stride(0),
        b.stride(0),
        out.stride(0),
        matrices.stride(0),
        width**-0.5,
        eps,
        HEADS=value_heads,
        REPEATS=value_heads // k.shape[1],
        K=width,
        V=value_width,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=4,
    )
