"""The gated delta rule (arXiv:2412.06464): a matrix per head that forgets, and is corrected towards each new pair.

    S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = S_t^T q_t

Shapes: T packed tokens, S sequences, H_k key heads, H_v value heads, R = H_v / H_k (value head h reads key head
h // R), K and V widths of a key and a value, C chunk size, N chunks. q is scaled, q and k are normalised by the caller.
States are [S, H_v, K, V], in float32; float64 inputs are computed in float64.

Three forms of the same: ``recurrent_gated_delta_rule`` token by token is the reference; ``gated_delta_step`` advances
many sequences by one token each; ``chunk_gated_delta_rule`` works on chunks by matrix products, for prefill and
training, and autograd gives its backward. Proof: tests/unit/test_delta_rule.py.

Three entries take q and k as they are: ``plan_delta_rule`` with ``gated_delta_rule``, and ``gated_delta_step_slots``,
which choose the form, and ``gated_delta_sequence``, a kernel for CPUs. Proof of the forms for CUDA:
tests/unit/test_triton_kernels.py, tests/gpu; of the kernels for CPUs: tests/unit/test_cpu_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import cpu
from engine.ops.backends import uses_fla, uses_triton, uses_triton_forward
from engine.ops.flash_linear_attention import FlaPlan, plan_fla
from engine.ops.root_norm import root_norm

CHUNK_SIZE_CPU = 32
CHUNK_SIZE_DEVICE = 64
"""Tokens of a chunk. Work within chunks grows with it, the number of dependent steps falls. On a CPU, where a step
costs no launch, 32 took 0.7 of the time of 64 (2,048 tokens, heads of 128 x 128, one core), and 16 little less."""


def state_dtype(x: Tensor) -> torch.dtype:
    """The type that states are held and advanced in for inputs like x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


L2_EPS = 1e-6


def l2_normalize(x: Tensor, eps: float = L2_EPS, scale: float = 1.0) -> Tensor:
    """x [..., K] * scale / sqrt(sum(x^2) + eps), in ``state_dtype``. Reference: ``l2norm`` of transformers' qwen3_5."""
    return root_norm(x.to(state_dtype(x)), None, count=1, eps=eps, scale=scale)


def gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g = -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b), in ``state_dtype``; all [..., H_v] or [H_v]."""
    dtype = state_dtype(a)
    return -a_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype)), b.to(dtype).sigmoid()


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    seq_starts: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other.

    Args:
        q, k: [T, H_k, K].
        v: [T, H_v, V].
        g: [T, H_v], log of the decay, <= 0.
        beta: [T, H_v], how far a correction goes, 0..1.
        seq_starts: S + 1 offsets, from 0 to T.
        initial_state: [S, H_v, K, V]; None: zeros.
    Returns: outputs [T, H_v, V] in the type of v, and the states after each sequence's last token.
    """
    dtype = state_dtype(q)
    repeats = v.shape[1] // k.shape[1]
    out_dtype = v.dtype
    q, k = (x.to(dtype).repeat_interleave(repeats, dim=1) for x in (q, k))
    v, g, beta = v.to(dtype), g.to(dtype), beta.to(dtype)
    outputs, states = [], []
    for s, (start, end) in enumerate(pairwise(seq_starts)):
        if initial_state is None:
            state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        else:
            state = initial_state[s].to(dtype)
        for t in range(start, end):
            state = state * g[t].exp()[:, None, None]
            predicted = torch.einsum("hkv,hk->hv", state, k[t])
            correction = beta[t][:, None] * (v[t] - predicted)
            state = state + torch.einsum("hk,hv->hkv", k[t], correction)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
        states.append(state)
    return torch.stack(outputs).to(out_dtype), torch.stack(states)


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """One token of each of S sequences.

    The old state is read once for both products and written once:
    o = exp(g) S^T q + (q . k) correction, with correction = beta (v - exp(g) S^T k).

    Args:
        q, k: [S, H_k, K]. v: [S, H_v, V]. g, beta: [S, H_v].
        state: [S, H_v, K, V].
        inplace: overwrite ``state``; only without gradients.
    Returns: outputs [S, H_v, V] in the type of v, and the new states.
    """
    dtype = state.dtype
    num, value_heads, width, value_width = state.shape
    key_heads = k.shape[1]
    out_dtype = v.dtype
    q, k, v, beta = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
    decay = g.to(dtype).exp()[..., None]
    pair = torch.stack((k, q), dim=2)  # [S, H_k, 2, K]
    if key_heads != value_heads:
        repeats = value_heads // key_heads
        pair = pair.repeat_interleave(repeats, dim=1)
        k, q = pair.unbind(dim=2)
    read = torch.bmm(pair.view(-1, 2, width), state.view(-1, width, value_width)).view(num, value_heads, 2, -1)
    correction = beta[..., None] * (v - decay * read[:, :, 0])
    out = decay * read[:, :, 1] + (q * k).sum(dim=-1, keepdim=True) * correction
    update = (k.reshape(-1, width, 1), correction.view(-1, 1, value_width))
    if inplace:
        state.mul_(decay[..., None]).view(-1, width, value_width).baddbmm_(*update)
        return out.to(out_dtype), state
    new = torch.baddbmm((state * decay[..., None]).view(-1, width, value_width), *update)
    return out.to(out_dtype), new.view_as(state)


def steps_by_index(x: Tensor) -> bool:
    """Whether ``gated_delta_step_slots`` suits inputs like x; on a CPU torch advances runs of slots as views."""
    return not x.is_cpu or uses_triton(x.device) or cpu.takes(x)


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
) -> None:
    """One token of each of n sequences among T tokens, from slots and back into them; nothing waits for the device.

    Args:
        q, k: [T, H_k, K], neither scaled nor normalised. v: [T, H_v, V].
        a, b, a_log, dt_bias: of ``gates``.
        matrices: [slots, H_v, K, V] float32, advanced in place.
        rows: [n] integers, the sequences' tokens in order. slots: [n] int64, each its own.
        out: [T, H_v, V]; the rows are written.
    """
    if uses_triton_forward(v, a_log, dt_bias):
        from engine.ops.triton import delta_step

        delta_step.gated_delta_step_slots(q, k, v, a, b, a_log, dt_bias, matrices, rows, slots, out, L2_EPS)
        return
    if len(rows) < len(v):
        q, k, v, a, b = (x.index_select(0, rows) for x in (q, k, v, a, b))
    if cpu.takes(q, k, v, a, b, a_log, dt_bias, matrices, out):
        part = out if len(rows) == len(out) else torch.empty_like(v)
        cpu.delta_step(q, k, v, a, b, a_log, dt_bias, matrices, slots, L2_EPS, part)
        if part is not out:
            out.index_copy_(0, rows, part)
        return
    inputs = (l2_normalize(q, scale=q.shape[-1] ** -0.5), l2_normalize(k), v, *gates(a, b, a_log, dt_bias))
    stepped, after = gated_delta_step(*inputs, matrices.index_select(0, slots), inplace=True)
    matrices.index_copy_(0, slots, after)
    out.index_copy_(0, rows, stepped)


def takes_sequences(x: Tensor, key_width: int, value_width: int) -> bool:
    """Whether ``gated_delta_sequence`` computes with inputs like x and heads of these widths."""
    return cpu.takes(x) and key_width % cpu.CHUNK_WIDTHS == 0 and value_width % cpu.CHUNK_WIDTHS == 0


def gated_delta_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    out: Tensor,
) -> None:
    """The tokens of one sequence, from a state and back into it: ``chunk_gated_delta_rule`` as one kernel, which a head
    of a sequence passes chunk by chunk in the nearest caches. Where ``takes_sequences``; no gradient.

    Args:
        q, k: [T, H_k, K], neither scaled nor normalised. v: [T, H_v, V].
        a, b, a_log, dt_bias: of ``gates``.
        state: [H_v, K, V] float32, contiguous, advanced in place.
        out: [T, H_v, V], contiguous, written.
    """
    assert cpu.takes(q, k, v, a, b, a_log, dt_bias, state, out), "takes_sequences tells"
    cpu.delta_chunk(q, k, v, a, b, a_log, dt_bias, state, L2_EPS, out)


@dataclass(slots=True)
class ChunkPlan:
    """How packed tokens are laid out in chunks; the same for all layers of a forward.

    Chunks lie step by step: first the first chunk of every sequence, the longest sequence first, then the second ones
    of those that have one, and so on; so each step of the scan is a slice. A chunk that is not full is padded with
    tokens that change nothing (k, beta and g are 0).

    Attributes:
        size: C.
        gather: [N * C] int64, the token at each place, T for padding; None: the tokens as they are, padded at the end.
        scatter: [T] int64, the place of each token; None likewise.
        widths: sequences that take part in each step, descending.
        order: [S] int64, sequence of each rank (the longest is rank 0), or None for the identity.
        captures: (step, rank) of each captured state, the state after that chunk.
        padding: tokens to add where gather is None.
    """

    size: int
    gather: Tensor | None
    scatter: Tensor | None
    widths: list[int]
    order: Tensor | None
    captures: list[tuple[int, int]]
    padding: int = 0


def plan_chunks(
    lengths: Sequence[int],
    captures: Sequence[tuple[int, int]] = (),
    *,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
) -> ChunkPlan:
    """Lays out sequences in chunks.

    Args:
        lengths: tokens of each sequence, each at least 1.
        captures: (sequence, number of its leading tokens) whose state is wanted; a chunk ends there.
        chunk_size: C at most, as sequences may be shorter; None: what suits the device.
    """
    size = chunk_size or (CHUNK_SIZE_CPU if torch.device(device).type == "cpu" else CHUNK_SIZE_DEVICE)
    while size // 2 >= max(lengths) and size > 8:
        size //= 2
    if len(lengths) == 1 and not captures:
        padding = -lengths[0] % size
        return ChunkPlan(size, None, None, [1] * ((lengths[0] + padding) // size), None, [], padding)
    chunks: list[list[tuple[int, int]]] = []  # per sequence: first token and length of each chunk
    for s, length in enumerate(lengths):
        ends = sorted({length, *(n for seq, n in captures if seq == s)})
        start, parts = 0, []
        for end in ends:
            assert 0 < end <= length, f"a state is wanted after {end} of {length} tokens"
            while start < end:
                parts.append((start, min(size, end - start)))
                start += parts[-1][1]
        chunks.append(parts)
    order = sorted(range(len(lengths)), key=lambda s: -len(chunks[s]))
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    total = offsets[-1]
    widths = [sum(len(c) > step for c in chunks) for step in range(len(chunks[order[0]]))]
    gather = torch.full((sum(widths), size), total, dtype=torch.int64)
    scatter = torch.empty(total, dtype=torch.int64)
    wanted: dict[tuple[int, int], tuple[int, int]] = {}
    row = 0
    for step, width in enumerate(widths):
        for rank, s in enumerate(order[:width]):
            start, length = chunks[s][step]
            first = offsets[s] + start
            gather[row, :length] = torch.arange(first, first + length)
            scatter[first : first + length] = torch.arange(row * size, row * size + length)
            wanted[s, start + length] = (step, rank)
            row += 1
    identity = order == list(range(len(order)))
    return ChunkPlan(
        size=size,
        gather=gather.flatten().to(device),
        scatter=scatter.to(device),
        widths=widths,
        order=None if identity else torch.tensor(order, device=device),
        captures=[wanted[seq, n] for seq, n in captures],
    )


DeltaPlan = ChunkPlan | FlaPlan
"""Of the forms of the chunked rule."""


def plan_delta_rule(
    lengths: Sequence[int], captures: Sequence[tuple[int, int]], v: Tensor, key_width: int
) -> DeltaPlan:
    """Lays out sequences for the form of the chunked rule that suits the values' type and device.

    Args:
        lengths, captures: of ``plan_chunks``.
        v: values of the kind that will come.
        key_width: K.
    """
    if v.dtype in (torch.bfloat16, torch.float16) and key_width <= 256 and uses_fla(v.device):
        return plan_fla(lengths, captures, v.device)
    return plan_chunks(lengths, captures, device=v.device)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    plan: DeltaPlan,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``chunk_gated_delta_rule`` of q and k that are neither scaled nor normalised, in the form of the plan."""
    if isinstance(plan, FlaPlan):
        return plan.run(q, k, v, g, beta, initial_state)
    q = l2_normalize(q, scale=q.shape[-1] ** -0.5)
    return chunk_gated_delta_rule(q, l2_normalize(k), v, g, beta, plan, initial_state)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    plan: ChunkPlan,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The chunked form. Within a chunk whose state before is S, with G_t the sum of g up to t, the corrections U solve

        (I + tril(beta_i exp(G_i - G_j) k_i . k_j, -1)) U = beta (V - exp(G) K S)

    and then O = exp(G) Q S + tril(exp(G_i - G_j) q_i . k_j) U and S' = exp(G_C) S + K^T (exp(G_C - G) U): the WY form
    of arXiv:2406.06484, section 3, with decay. The inverses of all chunks are computed together; products of keys alone
    are computed once for the R value heads that share them.

    Args:
        q, k, v, g, beta, initial_state: as of ``recurrent_gated_delta_rule``.
        plan: of ``plan_chunks`` for these sequences.
    Returns: outputs [T, H_v, V] in the type of v; final states [S, H_v, K, V]; the captured states, each [H_v, K, V].
    """
    with torch.autocast(q.device.type, enabled=False):
        return _chunked(q, k, v, g, beta, plan, initial_state)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, plan: ChunkPlan, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype, size = state_dtype(q), plan.size
    num_tokens, key_heads, width = k.shape
    value_heads, value_width = v.shape[1:]
    repeats = value_heads // key_heads
    num_chunks = sum(plan.widths)

    def chunked(x: Tensor) -> Tensor:
        """[T, H, ...]: [N, H, C, ...]."""
        x = x.to(dtype)
        pad = plan.padding if plan.gather is None else 1
        if pad:
            x = torch.cat((x, x.new_zeros(pad, *x.shape[1:])))
        if plan.gather is not None:
            x = x.index_select(0, plan.gather)
        return x.view(num_chunks, size, *x.shape[1:]).transpose(1, 2)

    both = torch.cat((chunked(k), chunked(q)), dim=2)  # [N, H_k, 2C, K]
    kc = both[:, :, :size]
    # The R value heads of a key head beside each other, so that one product serves them.
    vc = chunked(v).reshape(num_chunks, key_heads, repeats, size, value_width)
    gc = chunked(g).reshape(num_chunks, key_heads, repeats, size).cumsum(dim=-1)
    bc = chunked(beta).reshape(num_chunks, key_heads, repeats, size, 1)
    grams = (both @ kc.mT).view(num_chunks, key_heads, 1, 2, size, size)
    # exp(G_i - G_j) for i >= j. The upper triangle would overflow, so it is masked before exp.
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
    decays = (gc[..., :, None] - gc[..., None, :]).masked_fill(future, float("-inf")).exp()
    system = (grams[:, :, :, 0] * decays) * bc
    eye = torch.eye(size, dtype=dtype, device=q.device).expand_as(system)
    # unitriangular: the diagonal of ``system`` is taken as 1, and its upper triangle is never read.
    inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    weights = grams[:, :, :, 1] * decays  # [N, H_k, R, C, C]
    grown = gc.exp()[..., None]  # decay from the chunk's start to each token, [N, H_k, R, C, 1]
    left = (gc[..., -1:] - gc).exp()[..., None]  # decay from each token to the chunk's end
    through = gc[..., -1].exp()[..., None, :]  # decay over the whole chunk, [N, H_k, 1, R]
    if repeats > 1:
        through = through.repeat_interleave(value_width, dim=-1)
    targets = bc * vc

    num_sequences = plan.widths[0]
    if initial_state is None:
        state = targets.new_zeros(num_sequences, key_heads, width, repeats * value_width)
    else:
        state = initial_state.to(dtype)
        if plan.order is not None:
            state = state.index_select(0, plan.order)
        state = _group(state, key_heads)
    inplace = not torch.is_grad_enabled()
    if inplace and initial_state is not None:
        state = state.clone()
    scale = bc * grown
    outputs: list[Tensor] = []
    finished: list[Tensor] = []
    wanted: dict[tuple[int, int], Tensor] = {}
    capture_at = set(plan.captures)
    # Split rather than sliced: the gradients of all slices of a tensor come together in one piece.
    tensors = (both, inverse, weights, targets, scale, grown, left, through)
    per_step = zip(*(x.split(plan.widths) for x in tensors), strict=True)
    for step, (both_, inverse_, weights_, targets_, scale_, grown_, left_, through_) in enumerate(per_step):
        active = plan.widths[step]
        if active < state.shape[0]:
            finished.append(state[active:])
            state = state[:active]
        read = both_ @ state  # [n, H_k, 2C, R * V]: what keys and queries find in the old state
        found = read.view(active, key_heads, 2, size, repeats, value_width).transpose(3, 4)
        corrections = inverse_ @ (targets_ - scale_ * found[:, :, 0])
        outputs.append(torch.addcmul(weights_ @ corrections, grown_, found[:, :, 1]))
        kept = (left_ * corrections).transpose(2, 3).reshape(active, key_heads, size, repeats * value_width)
        keys = both_[:, :, :size].mT
        if inplace:
            state.mul_(through_).flatten(0, 1).baddbmm_(keys.flatten(0, 1), kept.flatten(0, 1))
        else:
            state = state * through_ + keys @ kept
        for at, rank in capture_at:
            if at == step:
                wanted[at, rank] = _ungroup(state[rank : rank + 1], repeats)[0].clone()
    finished.append(state)
    final = _ungroup(torch.cat(finished[::-1]) if len(finished) > 1 else state, repeats)
    if plan.order is not None:
        final = torch.empty_like(final).index_copy(0, plan.order, final)
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    out = out.view(num_chunks, value_heads, size, value_width).transpose(1, 2).reshape(-1, value_heads, value_width)
    out = out[:num_tokens] if plan.scatter is None else out.index_select(0, plan.scatter)
    return out.to(v.dtype), final, [wanted[key] for key in plan.captures]


def _group(state: Tensor, key_heads: int) -> Tensor:
    """[S, H_v, K, V]: [S, H_k, K, R * V], so that a key head's product covers its value heads."""
    num, value_heads, width, value_width = state.shape
    if value_heads == key_heads:
        return state
    return state.view(num, key_heads, -1, width, value_width).transpose(2, 3).reshape(num, key_heads, width, -1)


def _ungroup(state: Tensor, repeats: int) -> Tensor:
    """The inverse of ``_group``."""
    if repeats == 1:
        return state
    num, key_heads, width, _ = state.shape
    return state.view(num, key_heads, width, repeats, -1).transpose(2, 3).reshape(num, key_heads * repeats, width, -1)
