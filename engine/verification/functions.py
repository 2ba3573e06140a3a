"""Every autograd.Function of the engine as cases for the gradient checker, at the shapes of a given model.

A Function without an entry here fails tests/unit/test_function_gradients.py, so none goes unproven.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelConfig
from engine.layers.rope import apply_rope
from engine.ops import fused_gradients, quantized
from engine.ops.causal_attention import causal_attention
from engine.ops.causal_conv import causal_conv, causal_conv_sequences
from engine.ops.delta_rule_gradient import gated_delta_sequences
from engine.ops.dense import MAX_ROWS, linear
from engine.ops.low_rank import low_rank_linear
from engine.ops.root_norm import root_norm
from engine.training.loss import chunked_cross_entropy
from engine.verification.gradients import Function

MAX_VOCAB = 512
"""Rows of the vocabulary that a case takes: enough for several chunks, few enough for float64 at any model's size."""

MAX_CHANNELS = 64
"""Of a convolution; each stands for itself."""


@dataclass(frozen=True, slots=True)
class FunctionCase:
    """One way to call a Function.

    Attributes:
        name: of the case within the Function's.
        function: through the public operation, so that what is checked is what runs.
    """

    name: str
    function: Function
    inputs: dict[str, Tensor] = field(repr=False)


Cases = Callable[[ModelConfig], list[FunctionCase]]


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantized_linear_cases(config: ModelConfig) -> list[FunctionCase]:
    """Over int8 with a scale per row, and int4 in groups with zeros; whole, and in several chunks of which the last is
    not full."""
    width = config.hidden_size
    chunk = max(1, quantized.CPU_CHUNK_ELEMENTS // width)
    cases = []
    for scheme in ("int8", "int4"):
        for name, out_features in (("whole", min(96, chunk)), ("chunked", 2 * chunk + chunk // 3 + 1)):
            rows = _stored_rows(scheme, out_features, width)

            def function(
                inputs: Mapping[str, Tensor], rows: quantized.WeightRows = rows, out_features: int = out_features
            ) -> Tensor:
                return quantized.quantized_linear(inputs["x"], rows, out_features)

            cases.append(FunctionCase(f"{scheme}, {name}", function, {"x": _random(3, width)}))
    return cases


def _stored_rows(scheme: str, out_features: int, width: int) -> quantized.WeightRows:
    """Random weights, stored narrow."""
    generator = torch.Generator().manual_seed(1)
    low, high = (-128, 128) if scheme == "int8" else (-8, 8)
    group = width if scheme == "int8" else next(size for size in (32, 16, 8, 4, 2, 1) if width % size == 0)
    values = torch.randint(low, high, (out_features, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(out_features, width // group, 1, generator=generator) + 0.5
    zero = torch.randint(low, high, scale.shape, generator=generator) if scheme == "int4" else torch.zeros(())

    def rows(start: int, end: int, dtype: torch.dtype) -> Tensor:
        grouped = values[start:end].to(dtype).view(end - start, -1, group)
        offset = zero[start:end] if zero.dim() else zero
        return ((grouped - offset) * scale[start:end].to(dtype)).view(end - start, width)

    return rows


def cross_entropy_cases(config: ModelConfig) -> list[FunctionCase]:
    """A head with and without a soft cap; in chunks of which the last is not full, and whole."""
    vocab = min(config.vocab_size, MAX_VOCAB)
    weight = _random(vocab, config.hidden_size, seed=2) / config.hidden_size**0.5
    num = 11
    targets = torch.randint(vocab, (num,), generator=torch.Generator().manual_seed(3))
    cases = []
    for name, rows, cap in (("chunked", 4, None), ("whole", num, None), ("soft cap", 4, 2.0)):

        def head(x: Tensor, cap: float | None = cap) -> Tensor:
            logits = F.linear(x, weight)
            return logits if cap is None else cap * torch.tanh(logits / cap)

        def function(inputs: Mapping[str, Tensor], head: Callable[[Tensor], Tensor] = head, rows: int = rows) -> Tensor:
            hidden: Tensor = inputs["hidden"]
            return chunked_cross_entropy(hidden, targets, head, vocab, chunk_bytes=4 * vocab * rows)

        cases.append(FunctionCase(name, function, {"hidden": _random(num, config.hidden_size, seed=4)}))
    return cases


def root_norm_cases(config: ModelConfig) -> list[FunctionCase]:
    """RMSNorm over the hidden size, and the length of a scaled query."""
    weight = _random(config.hidden_size, seed=5)
    width = config.linear_attention.key_head_dim if config.linear_attention else config.head_dim

    def root_mean_square(inputs: Mapping[str, Tensor]) -> Tensor:
        return root_norm(inputs["x"], weight, count=config.hidden_size, eps=config.norm_eps)

    def length(inputs: Mapping[str, Tensor]) -> Tensor:
        return root_norm(inputs["x"], None, count=1, eps=1e-6, scale=width**-0.5)

    return [
        FunctionCase("root mean square", root_mean_square, {"x": _random(3, config.hidden_size, seed=6)}),
        FunctionCase("length", length, {"x": _random(3, 2, width, seed=7)}),
    ]


def fused_norm_cases(config: ModelConfig) -> list[FunctionCase]:
    """Shifted, and with a gate."""
    width, eps = config.hidden_size, config.norm_eps
    weight = _random(width, seed=15)

    def shifted(inputs: Mapping[str, Tensor]) -> Tensor:
        return fused_gradients.rms_norm(inputs["x"], weight, eps, shifted=True)

    def gated(inputs: Mapping[str, Tensor]) -> Tensor:
        return fused_gradients.rms_norm(inputs["x"], weight, eps, gate=inputs["gate"])

    x, gate = _random(3, width, seed=16), _random(3, width, seed=17)
    return [FunctionCase("shifted", shifted, {"x": x}), FunctionCase("gated", gated, {"x": x, "gate": gate})]


def gated_activation_cases(config: ModelConfig) -> list[FunctionCase]:
    """Each derivative."""
    gate, up = 2.0 * _random(3, 7, seed=18), _random(3, 7, seed=19)
    cases = []
    for name in ("silu", "sigmoid", "gelu_new"):

        def function(inputs: Mapping[str, Tensor], name: str = name) -> Tensor:
            return fused_gradients.gated_activation(inputs["gate"], inputs["up"], name)

        cases.append(FunctionCase(name, function, {"gate": gate, "up": up}))
    return cases


def causal_conv_cases(config: ModelConfig) -> list[FunctionCase]:
    """Three packed sequences, with and without windows before them."""
    shape = config.linear_attention
    if shape is None:
        return []
    channels = min(shape.conv_dim, MAX_CHANNELS)
    weight, starts = _random(channels, shape.conv_width, seed=8), [0, 5, 6, 9]
    x = _random(starts[-1], channels, seed=9)

    def function(inputs: Mapping[str, Tensor]) -> Tensor:
        return causal_conv(inputs["x"], weight, starts, inputs.get("windows"))[0]

    windows = _random(3, shape.conv_width - 1, channels, seed=10)
    return [
        FunctionCase("from the start", function, {"x": x}),
        FunctionCase("from windows", function, {"x": x, "windows": windows}),
    ]


def causal_conv_sequences_cases(config: ModelConfig) -> list[FunctionCase]:
    """Three packed sequences, with SiLU and without."""
    shape = config.linear_attention
    if shape is None:
        return []
    channels = min(shape.conv_dim, MAX_CHANNELS)
    weight, starts = _random(channels, shape.conv_width, seed=25), [0, 5, 6, 9]
    cases = []
    for name, silu in (("plain", False), ("SiLU", True)):

        def function(inputs: Mapping[str, Tensor], silu: bool = silu) -> Tensor:
            return causal_conv_sequences(inputs["x"], weight, starts, silu=silu)

        cases.append(FunctionCase(name, function, {"x": _random(starts[-1], channels, seed=26)}))
    return cases


def gated_delta_rule_cases(config: ModelConfig) -> list[FunctionCase]:
    """Packed sequences of less than a chunk and of several; few heads, which stand for all."""
    shape = config.linear_attention
    if shape is None:
        return []
    key_heads = min(2, shape.num_key_heads)
    heads = key_heads * (shape.num_value_heads // shape.num_key_heads)
    k, v = min(shape.key_head_dim, 16), min(shape.value_head_dim, 16)
    a_log, dt_bias = 0.3 * _random(heads, seed=27) - 2.0, _random(heads, seed=28)
    cases = []
    for name, starts in (("short", [0, 3, 4, 9]), ("chunks", [0, 2, 71])):

        def function(inputs: Mapping[str, Tensor], starts: list[int] = starts) -> Tensor:
            q, k, v, a, b = (inputs[name] for name in ("q", "k", "v", "a", "b"))
            return gated_delta_sequences(q, k, v, a, b, a_log, dt_bias, starts)

        shapes = {"q": (key_heads, k), "k": (key_heads, k), "v": (heads, v), "a": (heads,), "b": (heads,)}
        inputs = {key: _random(starts[-1], *size, seed=29 + i) for i, (key, size) in enumerate(shapes.items())}
        cases.append(FunctionCase(name, function, inputs))
    return cases


def linear_cases(config: ModelConfig) -> list[FunctionCase]:
    """By a frozen weight, of more rows than are divided."""
    weight = _random(7, config.hidden_size, seed=23) / config.hidden_size**0.5

    def function(inputs: Mapping[str, Tensor]) -> Tensor:
        return linear(inputs["x"], weight)

    return [FunctionCase("many rows", function, {"x": _random(MAX_ROWS + 1, config.hidden_size, seed=24)})]


@dataclass(frozen=True, slots=True)
class _Frozen:
    weight: Tensor

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


def low_rank_cases(config: ModelConfig) -> list[FunctionCase]:
    """Everything differentiated, as in most layers, with dropout as well; and A and B alone, as in the first."""
    width, num_rows, rank, out_features = config.hidden_size, 5, 3, 7
    x = _random(num_rows, width, seed=11)
    a, b = _random(rank, width, seed=12) / width**0.5, _random(out_features, rank, seed=13)
    weight = _random(out_features, width, seed=14) / width**0.5

    def function(inputs: Mapping[str, Tensor]) -> Tensor:
        given = inputs.get("x", x)
        return low_rank_linear(_Frozen(weight), given, inputs["a"], inputs["b"], 1.5, inputs.get("dropped"))

    return [
        FunctionCase("input, A and B", function, {"x": x, "a": a, "b": b}),
        FunctionCase("dropout", function, {"x": x, "dropped": _random(num_rows, width, seed=15), "a": a, "b": b}),
        FunctionCase("A and B", function, {"a": a, "b": b}),
    ]


def rotation_cases(config: ModelConfig) -> list[FunctionCase]:
    """All of a head rotated, and its first half."""
    width, tokens = max(8, 2 * -(-config.head_dim // 2)), 3
    cases = []
    for name, rotated in (("whole", width), ("first half", 2 * -(-width // 4))):
        angles = _random(tokens, rotated // 2, seed=17).repeat(1, 2)

        def function(inputs: Mapping[str, Tensor], angles: Tensor = angles) -> Tensor:
            return apply_rope(inputs["x"], angles.cos(), angles.sin())

        cases.append(FunctionCase(name, function, {"x": _random(tokens, 2, width, seed=18)}))
    return cases


def causal_attention_cases(config: ModelConfig) -> list[FunctionCase]:
    """Packed sequences, one of them a single token; query heads that share key heads, and not."""
    starts, width = torch.tensor([0, 3, 4, 8]), config.head_dim
    cases = []
    for name, heads, kv_heads in (("grouped", 4, 2), ("each its own", 2, 2)):

        def function(inputs: Mapping[str, Tensor]) -> Tensor:
            return causal_attention(inputs["q"], inputs["k"], inputs["v"], starts, width**-0.5)

        q, k, v = (_random(8, count, width, seed=19 + i) for i, count in enumerate((heads, kv_heads, kv_heads)))
        cases.append(FunctionCase(name, function, {"q": q, "k": k, "v": v}))
    return cases


FUNCTIONS: dict[str, Cases] = {
    "engine.layers.rope._Rotation": rotation_cases,
    "engine.ops.causal_attention._CausalAttention": causal_attention_cases,
    "engine.ops.causal_conv._Taps": causal_conv_cases,
    "engine.ops.causal_conv._WholeSequences": causal_conv_sequences_cases,
    "engine.ops.delta_rule_gradient._GatedDeltaRule": gated_delta_rule_cases,
    "engine.ops.dense._Linear": linear_cases,
    "engine.ops.fused_gradients._GatedActivation": gated_activation_cases,
    "engine.ops.fused_gradients._RMSNorm": fused_norm_cases,
    "engine.ops.low_rank._LowRankLinear": low_rank_cases,
    "engine.ops.quantized._QuantizedLinear": quantized_linear_cases,
    "engine.ops.root_norm._RootNorm": root_norm_cases,
    "engine.training.loss._ChunkedCrossEntropy": cross_entropy_cases,
}
"""Full name of each Function to its cases; no cases where a model has no use for it."""


def function_name(function: type[torch.autograd.Function]) -> str:
    """The key of FUNCTIONS."""
    return f"{function.__module__}.{function.__qualname__}"
