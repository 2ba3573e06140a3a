"""Our kernels for CPUs: a shared library that is built when the package is installed (setup.py).

What it offers is in kernels.h. ``library`` opens it, runs operations and captures programs of them; ``weights`` has the
products, ``gemm`` says where they may round activations, ``calls``, ``encoder``, ``likelihood``,
``low_rank`` and ``recurrent_gradients`` have the rest; ``results`` has the memory of results while a training run
lasts.
Nothing here decides but whether it can: callers keep the torch form, which is the reference
(tests/unit/test_cpu_kernels.py, test_cpu_gemm.py, test_cpu_ops.py, test_cpu_choose.py).
"""

from engine.ops.cpu.calls import (
    ACTIVATIONS,
    ACTIVATIONS_WITH_GRADIENT,
    CHUNK_WIDTHS,
    GRADIENT_WIDTHS,
    MAX_TAPS,
    MAX_WIDTH,
    add,
    attention_gradient,
    conv,
    conv_step,
    decode_attention,
    delta_chunk,
    delta_step,
    gated_activation,
    gated_activation_gradient,
    rms_norm,
    rms_norm_gradient,
    rope,
    rope_table,
    tiled_attention,
)
from engine.ops.cpu.encoder import EncoderStack, EncoderWeights, bias_activation, encoder_layers, layer_norm
from engine.ops.cpu.gemm import allows_int8_activations, int8_activations, takes_rounded, with_int8_activations
from engine.ops.cpu.library import LEVELS, Arena, Program, available, capture, level, set_num_threads, takes
from engine.ops.cpu.likelihood import choose, token_nll
from engine.ops.cpu.low_rank import lora_rows, low_rank, low_rank_gradient
from engine.ops.cpu.recurrent_gradients import conv_gradient, delta_chunk_gradient
from engine.ops.cpu.results import results_apart
from engine.ops.cpu.weights import (
    MAX_ROWS,
    MAX_ROWS_OF_INTEGERS,
    PackedWeight,
    StoredWeight,
    packed,
    rounded_products,
    scratch_rows,
    takes_ids,
    takes_rows,
)

__all__ = [
    "ACTIVATIONS",
    "ACTIVATIONS_WITH_GRADIENT",
    "CHUNK_WIDTHS",
    "GRADIENT_WIDTHS",
    "LEVELS",
    "MAX_ROWS",
    "MAX_ROWS_OF_INTEGERS",
    "MAX_TAPS",
    "MAX_WIDTH",
    "Arena",
    "EncoderStack",
    "EncoderWeights",
    "PackedWeight",
    "Program",
    "StoredWeight",
    "add",
    "allows_int8_activations",
    "attention_gradient",
    "available",
    "bias_activation",
    "capture",
    "choose",
    "conv",
    "conv_gradient",
    "conv_step",
    "decode_attention",
    "delta_chunk",
    "delta_chunk_gradient",
    "delta_step",
    "encoder_layers",
    "gated_activation",
    "gated_activation_gradient",
    "int8_activations",
    "layer_norm",
    "level",
    "lora_rows",
    "low_rank",
    "low_rank_gradient",
    "packed",
    "results_apart",
    "rms_norm",
    "rms_norm_gradient",
    "rope",
    "rope_table",
    "rounded_products",
    "scratch_rows",
    "set_num_threads",
    "takes",
    "takes_ids",
    "takes_rounded",
    "takes_rows",
    "tiled_attention",
    "token_nll",
    "with_int8_activations",
]
