"""Linear layers and embeddings: a scheme for W, and the adapters of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.context import ForwardContext
from engine.ops import cpu
from engine.ops.elementwise import add
from engine.quantization.base import UNQUANTIZED, LinearScheme


class Linear(nn.Module):
    """y = x W^T + b, plus the low-rank updates of the batch's adapters.

    Args:
        name: full module name; the key of adapters, equal to its path in the model.
        lora: whether adapters may target it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        bias: bool = False,
        scheme: LinearScheme = UNQUANTIZED,
        dtype: torch.dtype = torch.float32,
        lora: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self.scheme = scheme
        self.lora = lora
        scheme.create_parameters(self, in_features, out_features, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, in_features]: [T, out_features]."""
        if ctx.lora is not None and self.lora:
            return ctx.lora.linear(self.name, x, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """``forward`` without updates."""
        if self.bias is None:
            return self.scheme.apply(self, x)
        return self.scheme.apply_with_bias(self, x, self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Of ``product`` for x: grad [T, out_features] times W, [T, in_features], in memory of its own."""
        return self.scheme.input_gradient(self, grad)

    def finish(self, x: Tensor, product: Tensor, ctx: ForwardContext) -> Tensor:
        """What ``forward`` gives, from x W^T [T, out_features], which is used up."""
        return self.add_lora(x, product if self.bias is None else add(product, self.bias), ctx)

    def without_bias(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor | None]:
        """What ``forward`` gives, but for the second tensor, which the caller is to add in a pass that it makes anyhow;
        None where ``forward`` adds it at no cost."""
        if self.bias is None or not cpu.takes(x, self.bias):
            return self(x, ctx), None
        return self.add_lora(x, self.scheme.apply(self, x), ctx), self.bias

    def add_lora(self, x: Tensor, y: Tensor, ctx: ForwardContext) -> Tensor:
        """y [T, out_features] plus the updates of the batch's adapters; y is used up."""
        if ctx.lora is not None and self.lora:
            y = ctx.lora.add(self.name, x, y)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, scheme={self.scheme.name}"


class Embedding(nn.Module):
    """Token embeddings, which may also serve as a tied head.

    Args:
        name: full module name.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        name: str,
        scheme: LinearScheme = UNQUANTIZED,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features = embedding_dim
        self.out_features = num_embeddings
        self.name = name
        self.scheme = scheme
        scheme.create_parameters(self, embedding_dim, num_embeddings, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T]: [T, embedding_dim]."""
        return self.scheme.embed(self, ids)

    def project(self, x: Tensor) -> Tensor:
        """x [N, embedding_dim] times the table transposed: [N, num_embeddings]."""
        return self.scheme.apply(self, x)
