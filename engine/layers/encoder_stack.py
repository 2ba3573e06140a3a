"""All layers of an encoder as one call of the CPU kernels (engine/ops/cpu/encoder.cpp).

Modules run their layers one operation at a time, which is the reference (tests/unit/test_encoder_layers.py). In one
call, each thread takes some whole sequences through all layers: no operation waits for another thread or for Python,
and activations stay in the caches.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.context import ForwardContext
from engine.layers.linear import Linear
from engine.ops import cpu


class EncoderLayerParts(NamedTuple):
    """What a layer is made of: attention, added to the layer's input and normalised; then the feed-forward block."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: nn.LayerNorm
    up: Linear
    down: Linear
    output_norm: nn.LayerNorm

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of the kernels."""
        return (self.query, self.key, self.value, self.output, self.up, self.down)

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        """The same."""
        return (self.attention_norm, self.output_norm)


class EncoderStack:
    """The layers of an encoder. No module itself, so that parameters keep their names.

    Args:
        layers: whose forwards this may stand for.
        parts: of each.
        heads: of attention.
        scale: of scores.
        activation: Hugging Face name of the feed-forward blocks' activation.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        parts: Sequence[EncoderLayerParts],
        *,
        heads: int,
        scale: float,
        activation: str,
    ) -> None:
        self._layers = list(layers)
        self._linears = [part.linears for part in parts]
        self._norms = [part.norms for part in parts]
        self._heads, self._scale, self._activation = heads, scale, activation
        self._addresses: list[object] = []
        self._stack: cpu.EncoderStack | None = None

    def __call__(self, x: Tensor, ctx: ForwardContext) -> Tensor | None:
        """x [T, D] after all layers: [T, D]; None where these are to run by themselves: with gradients or adapters, on
        another device, in another type, or while someone looks at what a layer gives."""
        if torch.is_grad_enabled() or ctx.lora is not None or ctx.causal or ctx.cache is not None:
            return None
        if not cpu.takes(x) or self._activation not in cpu.ACTIVATIONS or self._scale <= 0.0 or not self._layers:
            return None
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._layers):
            return None
        stack = self._packed()
        if stack is None:
            return None
        return cpu.encoder_layers(
            x.clone(memory_format=torch.contiguous_format),
            stack,
            torch.tensor(ctx.seq_starts),
            heads=self._heads,
            eps=self._norms[0][0].eps,
            scale=self._scale,
            activation=self._activation,
            rounds=cpu.allows_int8_activations(),
        )

    def _packed(self) -> cpu.EncoderStack | None:
        """The layers as the kernels read them, made at first use and again where a tensor has been replaced; None where
        they cannot."""
        layers: list[cpu.EncoderWeights] = []
        addresses: list[object] = []
        for linears, norms in zip(self._linears, self._norms, strict=True):
            weights = []
            for linear in linears:
                if (packed := linear.scheme.packed(linear)) is None:
                    return None
                weights.append(packed)
            biases = [linear.bias for linear in linears]
            of_norms = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
            addresses += weights
            addresses += [None if tensor is None else tensor.data_ptr() for tensor in (*biases, *of_norms)]
            layers.append(cpu.EncoderWeights(tuple(weights), tuple(biases), tuple(of_norms)))
        if addresses != self._addresses:
            supported = all(layer.is_supported() for layer in layers)
            self._stack, self._addresses = cpu.EncoderStack(layers) if supported else None, addresses
        return self._stack
