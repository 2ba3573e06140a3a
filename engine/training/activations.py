"""What autograd keeps of a decoder layer from its forward to its backward, counted from the layer's shapes.

Shapes: T tokens of a micro-batch, S sequences in it, D hidden size, r rank. Each count is of what the present
operations keep or, where that hangs on a choice that torch makes, of the most that they may. The base weights are
frozen, so a product with W keeps nothing of its input; the low-rank product beside it keeps the input and the r
numbers between A and B. Proof: tests/engine/test_training_memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from engine.layers.attention import Attention
from engine.layers.gated_delta_net import GatedDeltaNet
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.moe import SparseMoE
from engine.layers.norm import RMSNorm
from engine.ops import delta_rule_gradient

WIDE = 4
"""Bytes of float32, in which norms, softmax and the delta rule compute."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Tokens of one forward.

    Attributes:
        num_tokens: T.
        num_sequences: S.
        longest: tokens of the longest sequence.
        chunk_size: tokens of a chunk of the delta rule.
        chunked_tokens: T with every sequence filled up to whole chunks.
        itemsize: bytes of a number in the compute type.
        on_cpu: else on a GPU.
    """

    num_tokens: int
    num_sequences: int
    longest: int
    chunk_size: int
    chunked_tokens: int
    itemsize: int
    on_cpu: bool


def layer_bytes(layer: nn.Module, packing: Packing, ranks: Mapping[str, int], dropout: float) -> int:
    """Kept of one decoder layer.

    Args:
        ranks: of the adapted modules by full name; of experts that are stacked in one parameter, by its name.
    """
    total = 0
    for module in layer.modules():
        if isinstance(module, RMSNorm) and module.weight.numel() == _hidden_size(layer):
            # The residual stream in float32, and what the layer's linears multiply by A.
            total += packing.num_tokens * module.weight.numel() * (WIDE + packing.itemsize)
        elif isinstance(module, Attention):
            total += _attention(module, packing)
        elif isinstance(module, GatedDeltaNet):
            total += _delta_net(module, packing)
        elif isinstance(module, GatedMLP):
            # The gate, its activation, the other branch, and the product of the two.
            total += 4 * packing.num_tokens * module.gate_proj.out_features * packing.itemsize
        elif isinstance(module, SparseMoE):
            total += _experts(module, packing, ranks)
        elif isinstance(module, Linear) and module.name in ranks:
            total += _low_rank(module, packing, ranks[module.name], dropout)
    return total


def _hidden_size(layer: nn.Module) -> int:
    norm = layer.get_submodule("input_layernorm")
    assert isinstance(norm, RMSNorm)
    return norm.weight.numel()


def _low_rank(linear: Linear, packing: Packing, rank: int, dropout: float) -> int:
    """The r numbers, and with dropout the mask and the input behind it."""
    masked = 2 * linear.in_features if dropout > 0.0 else 0
    return packing.num_tokens * (rank + masked) * packing.itemsize


def _attention(layer: Attention, packing: Packing) -> int:
    """Queries, keys, values; the output, once more as o_proj takes it; the sums of softmax; the gate."""
    size, heads = packing.itemsize, layer.o_proj.in_features // layer.head_dim
    q, kv = layer.o_proj.in_features, layer.k_proj.out_features
    # Several sequences of like length are padded, to at most 1.5 times their tokens, and copied for it.
    padded = packing.num_tokens * (1.5 if packing.num_sequences > 1 else 1.0)
    total = padded * ((2 * q + 2 * kv) * size + heads * WIDE) + packing.num_tokens * q * size
    if layer.q_norm is not None:  # its input in float32
        total += packing.num_tokens * (q + kv) * WIDE
    if layer.output_gate:  # the gate behind its sigmoid, and the output before it
        total += 2 * packing.num_tokens * q * size
    if size < WIDE:  # the rotation in the compute type
        total += 4 * packing.num_tokens * layer.head_dim * size
    pairs = packing.longest * min(packing.num_tokens, packing.longest)
    windowed = layer.window is not None and packing.longest > layer.window
    if windowed:
        total += pairs * (1 + size)  # the mask
    if layer.softcap is not None:
        total += 4 * heads * pairs * WIDE  # all scores: capped, masked and as probabilities
    elif not packing.on_cpu and (windowed or size == WIDE):
        # Torch's fused kernels for GPUs take neither masks with grouped queries nor float32.
        total += 2 * heads * pairs * WIDE + padded * 2 * q * size
    return int(total)


def _delta_net(layer: GatedDeltaNet, packing: Packing) -> int:
    """See engine.layers.gated_delta_net and engine.ops.delta_rule for the names."""
    shape, size = layer.shape, packing.itemsize
    keys, values, heads = shape.key_dim, shape.value_dim, shape.num_value_heads
    tokens = packing.num_tokens
    widths = (shape.key_head_dim, shape.value_head_dim)
    if packing.on_cpu and size == WIDE and delta_rule_gradient.kernels_take(*widths):
        # The convolution's input and output, whose parts q, k and v are; a and b; the norm's input, z, their product.
        return tokens * (2 * shape.conv_dim + 2 * heads + 3 * values) * WIDE
    # The convolution's output, before and behind SiLU; q and k before and behind their normalisation.
    total = tokens * (2 * shape.conv_dim * size + 4 * keys * WIDE)
    # The norm's input, its output, z and SiLU(z) in float32; their product. g and beta.
    total += tokens * (4 * values * WIDE + values * size + 10 * heads * WIDE)
    per_token = 2 * keys + 9 * values + 6 * heads  # k and q; v, what was read, corrections, outputs; decays
    # Within a chunk: decays, system, inverse and weights of each head; products of keys.
    per_token += packing.chunk_size * (5 * heads + 2 * shape.num_key_heads)
    num_chunks = -(-packing.chunked_tokens // packing.chunk_size)
    states = num_chunks * heads * shape.key_head_dim * shape.value_head_dim  # before each chunk
    return total + (packing.chunked_tokens * per_token + states) * WIDE


def _experts(layer: SparseMoE, packing: Packing, ranks: Mapping[str, int]) -> int:
    """Of each pair of token and expert: gate and other branch, the gate's activation, the output; of each token the
    router's probabilities and the shared expert's output. The shared expert itself is a GatedMLP."""
    top_k, size = layer.gate.top_k, packing.itemsize
    hidden, width = layer.gate.weight.shape[1], layer.experts.down_proj.shape[2]
    per_pair = (4 * width + 2 * hidden) * size + 3 * 8
    per_token = 2 * layer.gate.weight.shape[0] * WIDE + (hidden + 1) * size
    adapted = [rank for name, rank in ranks.items() if name.startswith(f"{_name(layer)}.experts.")]
    if adapted:
        per_pair += (hidden + sum(adapted)) * size
    return packing.num_tokens * (top_k * per_pair + per_token)


def _name(layer: SparseMoE) -> str:
    return layer.shared_expert_gate.name.removesuffix(".shared_expert_gate")
