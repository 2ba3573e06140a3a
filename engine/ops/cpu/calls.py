"""The operations of a decoded token other than products, over tensors that ``takes`` took.

Each gives what the torch form beside its caller gives (tests/unit/test_cpu_ops.py).

Shapes: T tokens, H heads, D head width, as in kernels.h.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from engine.ops.cpu.library import KINDS, call, check_struct, empty

_POINTER, _INTEGER, _FLOAT, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


def _struct(kind: str, **fields: type) -> tuple[int, type[ctypes.Structure]]:
    """The index of a kind, and the mirror of its struct."""
    made = type(kind, (ctypes.Structure,), {"_fields_": tuple(fields.items())})
    return KINDS.index(kind), check_struct(kind, made)


def _fields(kinds: type, names: str) -> dict[str, type]:
    return dict.fromkeys(names.split(), kinds)


_RMS_NORM, _RmsNorm = _struct(
    "rms_norm",
    **_fields(_POINTER, "x weight gate out"),
    **_fields(_INTEGER, "outer inner width outer_stride inner_stride"),
    **_fields(_FLOAT, "eps shift"),
)
_ROPE_TABLE, _RopeTable = _struct(
    "rope_table",
    **_fields(_POINTER, "positions inv_freq cos sin"),
    **_fields(_INTEGER, "tokens frequencies"),
    **_fields(_FLOAT, "factor reserved"),
)
_ROPE, _Rope = _struct(
    "rope",
    **_fields(_POINTER, "x cos sin out"),
    **_fields(_INTEGER, "tokens heads width rotary token_stride head_stride"),
)
_ATTENTION, _Attention = _struct(
    "attention",
    **_fields(_POINTER, "q k v keys values slots tables kv_lens out"),
    **_fields(_INTEGER, "tokens heads kv_heads width block_size table_stride window"),
    **_fields(_FLOAT, "scale reserved"),
)
_GATED_ACTIVATION, _GatedActivation = _struct(
    "gated_activation",
    **_fields(_POINTER, "gate up out"),
    **_fields(_INTEGER, "outer inner width gate_outer gate_inner up_outer up_inner"),
    **_fields(_INT32, "activation reserved"),
)
_ADD, _Add = _struct("add", **_fields(_POINTER, "a b out"), **_fields(_INTEGER, "rows width b_stride"))
_CONV_STEP, _ConvStep = _struct(
    "conv_step", **_fields(_POINTER, "x weight windows slots out"), **_fields(_INTEGER, "tokens channels taps")
)
_DELTA_STEP, _DeltaStep = _struct(
    "delta_step",
    **_fields(_POINTER, "q k v a b a_log dt_bias states slots out"),
    **_fields(_INTEGER, "tokens key_heads value_heads key_width value_width q_stride k_stride v_stride"),
    **_fields(_FLOAT, "eps reserved"),
)
_CONV, _Conv = _struct(
    "conv",
    **_fields(_POINTER, "x weight window out"),
    **_fields(_INTEGER, "tokens channels taps x_stride silu"),
)
_DELTA_CHUNK, _DeltaChunk = _struct(
    "delta_chunk",
    **_fields(_POINTER, "q k v a b a_log dt_bias state out"),
    **_fields(_INTEGER, "tokens key_heads value_heads key_width value_width q_stride k_stride v_stride"),
    **_fields(_FLOAT, "eps reserved"),
)
_RMS_NORM_GRADIENT, _RmsNormGradient = _struct(
    "rms_norm_gradient",
    **_fields(_POINTER, "x weight gate gradient out d_gate"),
    **_fields(_INTEGER, "rows width"),
    **_fields(_FLOAT, "eps reserved"),
)
_GATED_ACTIVATION_GRADIENT, _GatedActivationGradient = _struct(
    "gated_activation_gradient",
    **_fields(_POINTER, "gate up gradient d_gate d_up"),
    **_fields(_INTEGER, "rows width"),
    **_fields(_INT32, "activation reserved"),
)

MAX_TAPS = 8
"""Of ``conv``."""

CHUNK_WIDTHS = 16
"""K and V of ``delta_chunk`` are multiples of it."""

_TILED_ATTENTION, _TiledAttention = _struct(
    "tiled_attention",
    **_fields(_POINTER, "q new_keys new_values slots keys values tables seq_starts kv_lens out log_sums"),
    **_fields(_INTEGER, "sequences heads kv_heads width q_stride new_key_stride new_value_stride"),
    **_fields(_INTEGER, "key_stride value_stride"),
    **_fields(_INTEGER, "block_size table_stride window"),
    **_fields(_FLOAT, "scale"),
    **_fields(_INT32, "causal"),
)

_ATTENTION_GRADIENT, _AttentionGradient = _struct(
    "attention_gradient",
    **_fields(_POINTER, "q k v out gradient log_sums seq_starts d_q d_k d_v"),
    **_fields(_INTEGER, "sequences heads kv_heads width"),
    **_fields(_FLOAT, "scale reserved"),
)

GRADIENT_WIDTHS = 32
"""D of ``attention_gradient`` is a multiple of it."""

MAX_WIDTH = 512
"""The widest head that ``tiled_attention`` takes."""

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3, "sigmoid": 4}
"""``Activation`` of kernels.h by Hugging Face ``hidden_act``."""

ACTIVATIONS_WITH_GRADIENT = ("silu", "swish", "gelu_new", "gelu_pytorch_tanh", "sigmoid")
"""Those of which ``gated_activation_gradient`` knows the derivative."""


def _levels(x: Tensor) -> tuple[Tensor, tuple[int, int, int], tuple[int, int]]:
    """x [..., width] as [outer, inner, width] with the strides of the first two; copied where it has none such."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x, (x.shape[0], x.shape[1], x.shape[2]), (x.stride(0), x.stride(1))
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x, (x.shape[0], 1, x.shape[1]), (x.stride(0), 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, shifted: bool, gate: Tensor | None = None) -> Tensor:
    """See engine.ops.norm: rms_norm, and gated_rms_norm with ``gate`` in the shape of x."""
    out = empty(x.shape)
    x, sizes, strides = _levels(x)
    weight = weight.contiguous()
    gate = None if gate is None else gate.contiguous()
    pointer = None if gate is None else gate.data_ptr()
    args = _RmsNorm(
        x.data_ptr(), weight.data_ptr(), pointer, out.data_ptr(), *sizes, *strides, eps, 1.0 if shifted else 0.0
    )
    call(_RMS_NORM, args, (x, weight, gate, out))
    return out


def rms_norm_gradient(
    x: Tensor, weight: Tensor, gradient: Tensor, eps: float, gate: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients for x and gate [..., D] of ``rms_norm`` (not shifted), from that of its result."""
    x, weight, gradient = x.contiguous(), weight.contiguous(), gradient.contiguous()
    gate = None if gate is None else gate.contiguous()
    out, d_gate = empty(x.shape), None if gate is None else empty(x.shape)
    tensors = (x, weight, gate, gradient, out, d_gate)
    width = x.shape[-1]
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    args = _RmsNormGradient(*pointers, x.numel() // width, width, eps, 0.0)
    call(_RMS_NORM_GRADIENT, args, tensors)
    return out, d_gate


def rope_table(positions: Tensor, inv_freq: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 2 F] of positions [T] int64 and inv_freq [F]; see engine.layers.rope."""
    cos, sin = empty((2, len(positions), 2 * len(inv_freq))).unbind()
    args = _RopeTable(
        positions.data_ptr(),
        inv_freq.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        len(positions),
        len(inv_freq),
        factor,
        0.0,
    )
    call(_ROPE_TABLE, args, (positions, inv_freq, cos, sin))
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] rotated by cos and sin [T, R]; see engine.layers.rope.apply_rope."""
    out = empty(x.shape)
    x, (tokens, heads, width), strides = _levels(x)
    cos, sin = cos.contiguous(), sin.contiguous()
    args = _Rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, width, cos.shape[1], *strides
    )
    call(_ROPE, args, (x, cos, sin, out))
    return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    tables: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One token of each of T sequences: its key and value enter the cache, its queries attend to all of the sequence.

    Args:
        q: [T, H_q, D]. k, v: [T, H_kv, D].
        keys, values: [blocks, P, H_kv, D], contiguous.
        slots: [T] int64. tables: [T, max blocks] int32. kv_lens: [T] int64, the new token included.
    Returns: [T, H_q, D].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = empty(q.shape)
    args = _Attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        tables.data_ptr(),
        kv_lens.data_ptr(),
        out.data_ptr(),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        keys.shape[1],
        tables.stride(0),
        0 if window is None else window,
        scale,
        0.0,
    )
    call(_ATTENTION, args, (q, k, v, keys, values, slots, tables, kv_lens, out))
    return out


def _end_to_end(x: Tensor) -> Tensor:
    """x [T, H, D] with the heads of a token end to end; copied where they are not."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _delta_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """What the structs of the delta rule have after their pointers: sizes, then strides from token to token."""
    return (v.shape[0], k.shape[1], v.shape[1], k.shape[2], v.shape[2], q.stride(0), k.stride(0), v.stride(0))


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_starts: Tensor,
    kv_lens: Tensor,
    *,
    cache: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    scale: float,
    causal: bool,
    window: int | None,
    log_sums: Tensor | None = None,
) -> Tensor:
    """Any number of new tokens of each of S sequences attend to what their sequence has.

    Args:
        q: [T, H_q, D], D up to MAX_WIDTH.
        k, v: [T, H_kv, D], the new tokens' alone.
        seq_starts: [S + 1] int64, rows of q. kv_lens: [S] int64, the new tokens included.
        cache: keys and values [blocks, P, H_kv, D], contiguous; tables [S, max blocks] int32; and slots [T] int64,
            where the new tokens' go. None: sequences have nothing but the new tokens.
        window: tokens that a query sees on each side, itself included.
        log_sums: [T, H_q], where to write the logarithm of each softmax's sum of exp(score).
    Returns: [T, H_q, D].
    """
    assert q.shape[2] <= MAX_WIDTH
    q, k, v = _end_to_end(q), _end_to_end(k), _end_to_end(v)
    out = empty(q.shape)
    keys, values, tables, slots = (k, v, None, None) if cache is None else cache
    args = _TiledAttention(
        q.data_ptr(),
        None if cache is None else k.data_ptr(),
        v.data_ptr(),
        None if slots is None else slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        None if tables is None else tables.data_ptr(),
        seq_starts.data_ptr(),
        kv_lens.data_ptr(),
        out.data_ptr(),
        None if log_sums is None else log_sums.data_ptr(),
        len(kv_lens),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        q.stride(0),
        k.stride(0),
        v.stride(0),
        keys.stride(-3),
        values.stride(-3),
        1 if tables is None else keys.shape[1],
        0 if tables is None else tables.stride(0),
        0 if window is None else window,
        scale,
        causal,
    )
    call(_TILED_ATTENTION, args, (q, k, v, cache, seq_starts, kv_lens, out, log_sums))
    return out


def attention_gradient(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor, log_sums: Tensor, seq_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for q, k and v of ``tiled_attention``, causal, without window and cache.

    Args:
        q, k, v, out, log_sums, seq_starts: of that; D is a multiple of GRADIENT_WIDTHS.
        gradient: [T, H_q, D], of out.
    """
    q, k, v, gradient = q.contiguous(), k.contiguous(), v.contiguous(), gradient.contiguous()
    d_q, d_k, d_v = empty(q.shape), empty(k.shape), empty(v.shape)
    args = _AttentionGradient(
        *(t.data_ptr() for t in (q, k, v, out, gradient, log_sums, seq_starts, d_q, d_k, d_v)),
        len(seq_starts) - 1,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        scale,
        0.0,
    )
    call(_ATTENTION_GRADIENT, args, (q, k, v, out, gradient, log_sums, seq_starts, d_q, d_k, d_v))
    return d_q, d_k, d_v


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, both of one shape [..., D]; ``activation`` is one of ACTIVATIONS."""
    out = empty(up.shape)
    gate, sizes, gate_strides = _levels(gate)
    up, _, up_strides = _levels(up)
    args = _GatedActivation(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        *sizes,
        *gate_strides,
        *up_strides,
        ACTIVATIONS[activation],
        0,
    )
    call(_GATED_ACTIVATION, args, (gate, up, out))
    return out


def gated_activation_gradient(gate: Tensor, up: Tensor, gradient: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients for gate and up [..., D] of ``gated_activation``, from that of its result.

    Args:
        activation: one of ACTIVATIONS_WITH_GRADIENT.
    """
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    d_gate, d_up = empty(gate.shape), empty(up.shape)
    width = up.shape[-1]
    args = _GatedActivationGradient(
        *(t.data_ptr() for t in (gate, up, gradient, d_gate, d_up)),
        up.numel() // width,
        width,
        ACTIVATIONS[activation],
        0,
    )
    call(_GATED_ACTIVATION_GRADIENT, args, (gate, up, gradient, d_gate, d_up))
    return d_gate, d_up


def add(a: Tensor, b: Tensor) -> Tensor:
    """a [..., D] + b, of the same shape or one row [D]."""
    out = empty(a.shape)
    a, b = a.contiguous(), b.contiguous()
    width = a.shape[-1]
    stride = width if b.dim() == a.dim() else 0
    args = _Add(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel() // width, width, stride)
    call(_ADD, args, (a, b, out))
    return out


def conv_step(x: Tensor, weight: Tensor, windows: Tensor, slots: Tensor) -> Tensor:
    """See engine.ops.causal_conv.causal_conv_step_slots; slots are int64."""
    x, weight = x.contiguous(), weight.contiguous()
    out = empty(x.shape)
    args = _ConvStep(
        x.data_ptr(),
        weight.data_ptr(),
        windows.data_ptr(),
        slots.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        weight.shape[1],
    )
    call(_CONV_STEP, args, (x, weight, windows, slots, out))
    return out


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    matrices: Tensor,
    slots: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """See engine.ops.delta_rule.gated_delta_step_slots, for rows 0 .. T - 1; out [T, H_v, V] is contiguous."""
    q, k, v = _end_to_end(q), _end_to_end(k), _end_to_end(v)
    a, b = a.contiguous(), b.contiguous()
    args = _DeltaStep(
        *(t.data_ptr() for t in (q, k, v, a, b, a_log, dt_bias, matrices, slots, out)),
        *_delta_sizes(q, k, v),
        eps,
        0.0,
    )
    call(_DELTA_STEP, args, (q, k, v, a, b, a_log, dt_bias, matrices, slots, out))


def conv(x: Tensor, weight: Tensor, window: Tensor | None, out: Tensor, *, silu: bool) -> None:
    """A causal convolution of one sequence; see engine.ops.causal_conv.

    Args:
        x: [T, C], of any stride from token to token.
        weight: [W, C], contiguous, at most MAX_TAPS taps.
        window: [W - 1, C], contiguous, the inputs before x; None: zeros.
        out: [T, C], contiguous.
        silu: of the result.
    """
    taps, channels = weight.shape
    args = _Conv(
        x.data_ptr(),
        weight.data_ptr(),
        None if window is None else window.data_ptr(),
        out.data_ptr(),
        len(x),
        channels,
        taps,
        x.stride(0),
        silu,
    )
    call(_CONV, args, (x, weight, window, out))


def delta_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """The tokens of one sequence; see engine.ops.delta_rule.gated_delta_sequence. out [T, H_v, V] is contiguous."""
    q, k, v = _end_to_end(q), _end_to_end(k), _end_to_end(v)
    a, b = a.contiguous(), b.contiguous()
    args = _DeltaChunk(
        *(t.data_ptr() for t in (q, k, v, a, b, a_log, dt_bias, state, out)),
        *_delta_sizes(q, k, v),
        eps,
        0.0,
    )
    call(_DELTA_CHUNK, args, (q, k, v, a, b, a_log, dt_bias, state, out))
