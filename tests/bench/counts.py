"""Bytes and products of a model's work, from its configuration and its stored weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import gguf

from engine.config import ModelConfig
from engine.loading import open_checkpoint
from engine.ops import cpu
from tests.bench.machine import Work

_HALVES = ("F16", "BF16")
_FLOATS = ("F64", "F32", *_HALVES)
"""Element types in which a file may store floats. They are held in float32 on the CPU, but for matrices of halves,
which stay as they are where there are kernels for it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What one model's work consists of. F: float32 bytes of a cache entry.

    Attributes:
        layer_weights: elements of all linear layers but the head.
        head_weights: elements of the head; 0 for an encoder.
        weight_bytes: that a decoded token reads, head included, as they are held.
        attention_width: query heads x head_dim, summed over the layers with attention.
        cache_bytes: of keys and values of one token, over all layers.
        state_flops: of the delta rule per token, over all layers, in its recurrent form.
        state_bytes: of recurrent state that a decoded token reads, over all layers.
    """

    layer_weights: int
    head_weights: int
    weight_bytes: int
    attention_width: int
    cache_bytes: int
    state_flops: int
    state_bytes: int

    def forward(self, tokens: int, *, context: float, heads: int) -> Work:
        """A forward over a sequence, or several of them in one batch.

        Args:
            context: tokens that one attends to, on average.
            heads: positions whose logits are computed.
        """
        attention = 4 * self.attention_width * context
        flops = tokens * (2 * self.layer_weights + attention + self.state_flops) + 2 * heads * self.head_weights
        return Work(read_bytes=self.weight_bytes, flops=flops)

    def decode(self, streams: int, context: float) -> Work:
        """One step, a token for each stream."""
        products = self.forward(streams, context=context, heads=streams)
        read = self.weight_bytes + streams * (context * self.cache_bytes + self.state_bytes)
        return Work(read_bytes=read, flops=products.flops)

    def lora_step(self, tokens: int, *, context: float) -> Work:
        """Forward and backward over frozen weights: a product for the gradient of each input, none for that of a
        weight. Attention's backward is twice its forward; the adapters' own products are left out."""
        attention = 3 * 4 * self.attention_width * context
        weights = 4 * (self.layer_weights + self.head_weights)
        return Work(flops=tokens * (weights + attention + 3 * self.state_flops))


def count(path: Path, *, wide: bool = False) -> Counts:
    """Counts of the model at a path.

    Args:
        wide: its weights are held in float32, whatever the file has.
    """
    config = open_checkpoint(path).config
    kinds = config.layer_types or ("full_attention",) * config.num_hidden_layers
    num_attention = sum(kind != "linear_attention" for kind in kinds)
    num_linear = len(kinds) - num_attention
    attention = num_attention * _attention_weights(config)
    shape = config.linear_attention
    linear = state = 0
    if shape is not None:
        gates = 2 * shape.num_value_heads
        inputs = shape.conv_dim + shape.value_dim + gates
        linear = num_linear * config.hidden_size * (inputs + shape.value_dim)
        state = num_linear * shape.num_value_heads * shape.key_head_dim * shape.value_head_dim
    matrices = 2 if config.model_type == "bert" else 3
    mlps = len(kinds) * matrices * config.hidden_size * config.intermediate_size
    layers = attention + linear + mlps
    head = config.vocab_size * config.hidden_size if config.task == "generate" else 0
    return Counts(
        layer_weights=layers,
        head_weights=head,
        weight_bytes=(layers + head) * 4 if wide else stored_bytes(path, config),
        attention_width=num_attention * config.num_attention_heads * config.head_dim,
        cache_bytes=num_attention * 2 * config.num_key_value_heads * config.head_dim * 4,
        state_flops=6 * state,
        state_bytes=4 * state,
    )


def _attention_weights(config: ModelConfig) -> int:
    queries = config.num_attention_heads * config.head_dim
    gate = queries if config.attention_output_gate else 0
    keys_values = 2 * config.num_key_value_heads * config.head_dim
    return config.hidden_size * (queries + gate + keys_values) + queries * config.hidden_size


def stored_bytes(path: Path, config: ModelConfig) -> int:
    """Bytes of weights that a decoded token reads: all but embeddings that are not the head as well, and heads for
    multi-token prediction."""
    total = 0
    if path.suffix == ".gguf":
        tensors = gguf.GGUFReader(path).tensors
        names = {tensor.name for tensor in tensors}
        for tensor in tensors:
            if tensor.name != "token_embd.weight" or "output.weight" not in names:
                total += int(tensor.n_bytes)
        return total
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            is_embedding = "embed_tokens" in name and not config.tie_word_embeddings
            if name == "__metadata__" or name.startswith("mtp.") or is_embedding:
                continue
            begin, end = entry["data_offsets"]
            stays = entry["dtype"] in _HALVES and len(entry["shape"]) == 2 and cpu.available()
            is_wide = entry["dtype"] in _FLOATS and not stays
            total += math.prod(entry["shape"]) * 4 if is_wide else end - begin
    return total
