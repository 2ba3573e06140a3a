"""Rotary position embedding (arXiv:2104.09864), stride-half pairing, with the scaling variants of Hugging Face configs.

A model has one set of frequencies: keys that are cached keep those that they were made with, so frequencies that follow
the length of the text would let the output depend on chunking and on the prefix cache. "longrope" takes the factors of
the length that the model is configured for, as vLLM does; "dynamic" changes nothing up to that length.

Shapes: T tokens, S sequences, H heads, R rotated dimensions (head_dim * partial_rotary_factor).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.config import RopeConfig
from engine.context import ForwardContext
from engine.errors import FormatError
from engine.ops import cpu
from engine.ops.backends import uses_triton_forward


class RotaryEmbedding:
    """cos and sin of every token's position; made once per forward, applied in every layer.

    Args:
        max_position_embeddings: of the model, for the variants that depend on it.
    Raises:
        FormatError: an unknown rope_type, one whose parameters are missing, or an odd number of rotated dimensions.
    """

    def __init__(self, config: RopeConfig, head_dim: int, max_position_embeddings: int) -> None:
        self.rotary_dim = int(head_dim * config.partial_rotary_factor)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise FormatError(
                f"partial_rotary_factor {config.partial_rotary_factor} of head_dim {head_dim} rotates "
                f"{self.rotary_dim} dimensions; accepted: an even number of at least 2",
                field="partial_rotary_factor",
            )
        self._config = config
        self._original_length = int(
            config.parameters.get("original_max_position_embeddings") or max_position_embeddings
        )
        self._max_length = max_position_embeddings
        self._inv_freq, self.attention_factor = self._frequencies()

    def cos_sin(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, R] float32, for ctx.positions."""
        if self._inv_freq.device != ctx.positions.device:
            self._inv_freq = self._inv_freq.to(ctx.positions.device)
        if cpu.takes(self._inv_freq):
            return cpu.rope_table(ctx.positions, self._inv_freq, self.attention_factor)
        angles = ctx.positions[:, None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _parameter(self, name: str) -> float:
        value = self._config.parameters.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FormatError(
                f"rope_type {self._config.rope_type!r} needs a numeric {name!r}; the configuration has {value!r}",
                field=f"rope_parameters.{name}",
            )
        return float(value)

    def _plain(self, theta: float) -> Tensor:
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        return 1.0 / theta**exponent

    def _frequencies(self) -> tuple[Tensor, float]:
        """Inverse frequencies [R / 2] and the factor on cos and sin."""
        config = self._config
        plain = self._plain(config.theta)
        if config.rope_type in ("default", "dynamic"):
            return plain, 1.0
        if config.rope_type == "linear":
            return plain / self._parameter("factor"), 1.0
        if config.rope_type == "llama3":
            return self._llama3(plain), 1.0
        if config.rope_type == "yarn":
            return self._yarn(plain)
        if config.rope_type == "longrope":
            name = "long_factor" if self._max_length > self._original_length else "short_factor"
            return plain / self._factor_list(name), self._longrope_factor()
        raise FormatError(
            f"rope_type is {config.rope_type!r}; accepted: default, linear, dynamic, llama3, yarn, longrope",
            field="rope_parameters.rope_type",
        )

    def _llama3(self, plain: Tensor) -> Tensor:
        """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
        factor = self._parameter("factor")
        low, high = self._parameter("low_freq_factor"), self._parameter("high_freq_factor")
        wavelength = 2 * math.pi / plain
        smooth = (self._original_length / wavelength - low) / (high - low)
        between = (1 - smooth) * plain / factor + smooth * plain
        scaled = torch.where(wavelength > self._original_length / low, plain / factor, plain)
        is_between = (wavelength >= self._original_length / high) & (wavelength <= self._original_length / low)
        return torch.where(is_between, between, scaled)

    def _yarn(self, plain: Tensor) -> tuple[Tensor, float]:
        """YaRN (arXiv:2309.00071)."""
        parameters = self._config.parameters
        factor = self._parameter("factor")
        beta_fast = float(parameters.get("beta_fast") or 32)
        beta_slow = float(parameters.get("beta_slow") or 1)

        def mscale(scale: float, weight: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

        attention_factor = parameters.get("attention_factor")
        if attention_factor is None:
            weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
            if weight and weight_all:
                attention_factor = mscale(factor, weight) / mscale(factor, weight_all)
            else:
                attention_factor = mscale(factor)

        def dimension(rotations: float) -> float:
            ratio = self._original_length / (rotations * 2 * math.pi)
            return self.rotary_dim * math.log(ratio) / (2 * math.log(self._config.theta))

        low, high = dimension(beta_fast), dimension(beta_slow)
        if parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001
        ramp = (torch.arange(self.rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
        keep = 1 - ramp.clamp(0, 1)
        return plain / factor * (1 - keep) + plain * keep, float(attention_factor)

    def _factor_list(self, name: str) -> Tensor:
        values = self._config.parameters.get(name)
        if not isinstance(values, list | tuple) or len(values) != self.rotary_dim // 2:
            raise FormatError(
                f"rope_type 'longrope' needs {self.rotary_dim // 2} numbers in {name!r}",
                field=f"rope_parameters.{name}",
            )
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    def _longrope_factor(self) -> float:
        """LongRoPE (arXiv:2402.13753): cos and sin grow with the extension of the context."""
        given = self._config.parameters.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self._config.parameters.get("factor")
        extension = float(factor) if factor else self._max_length / self._original_length
        return 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(self._original_length))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R dimensions of x [T, H, head_dim] by cos and sin [T, R]; dimension i pairs with i + R / 2."""
    if uses_triton_forward(x, cos, sin):
        from engine.ops.triton import rope as kernels

        return kernels.apply_rope(x, cos, sin)
    if cpu.takes(x, cos, sin):
        return cpu.rope(x, cos, sin)
    if x.is_cpu and x.requires_grad and torch.is_grad_enabled():
        return _Rotation.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
    return apply_rope_reference(x, cos, sin)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``apply_rope``."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated = x[..., :rotary_dim]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the opposite angle; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cpu.rope(x, cos, sin) if cpu.takes(x, cos, sin) else apply_rope_reference(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        sin = -sin
        return cpu.rope(grad, cos, sin) if cpu.takes(grad, cos) else apply_rope_reference(grad, cos, sin), None, None
