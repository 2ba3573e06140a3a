"""Plain layers, one sequence and one token at a time, that can be made wrong in one place.

Without a fault each computes what the engine's layer of that kind computes, from the same parameters. With one, it
computes something subtly else: its derivative is a backward as somebody might get it wrong.

Shapes: n tokens of a sequence, D hidden size, H heads, K and V widths of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.linear import Linear
from engine.lora.adapter import Adapter
from engine.ops.elementwise import ACTIVATIONS
from engine.verification.layers import LayerProblem

COMMON = ("lora scale missing", "adapter of another sequence", "adapter of the base sequence", "residual dropped")
PRE_NORM = ("normed value in the residual", "norm's statistics constant")
SHIFTED = ("norm's 1 + forgotten",)
MLP = ("gate and up swapped", "activation missing")
ATTENTION = (
    "q scale missing", "future positions", "heads share the wrong keys", "sequence boundary leaks",
    "rotation missing on k", "rotation's sign", "rotation pairs neighbours", "softmax normaliser constant",
    "values constant",
)  # fmt: skip
QK_NORM = ("norm of q missing", "norm of k constant")
GATED = ("output gate dropped", "output gate constant", "gate split over all heads", "gate without sigmoid")
SLIDING = ("window one wider", "window one narrower", "window missing")
POST_NORMS = ("norm after attention missing",)
DELTA = (
    "sign of the correction", "correction missing", "prediction not decayed", "decay missing", "decay one late",
    "decay constant", "decay within the chunk alone", "state not carried over chunks", "beta dropped", "beta constant",
    "q scale missing", "l2 norm constant", "l2 norm missing", "value heads read the wrong keys",
    "output before the update", "tap shifted", "last tap dropped", "window of the conv leaks", "state leaks",
    "activation of the conv missing", "z gate dropped", "z gate before the norm", "z gate without silu",
    "norm of the output shifted", "dt_bias missing",
)  # fmt: skip
MOE = (
    "router's weights constant", "weights not renormalised", "renormaliser constant", "weights of another expert",
    "shared expert's gate dropped", "shared expert's gate constant", "shared expert dropped", "one expert dropped",
    "expert's gate and up swapped", "experts' adapters dropped", "adapter of another expert",
)  # fmt: skip
ENCODER = ("future positions hidden", "norm's mean constant", "norm's variance constant", "activation missing")

CHUNK = 32
"""Of the engine's delta rule on a CPU, for faults at the seams."""


@dataclass
class Sequence:
    """One sequence of a batch: its rows, its rotation, its adapter, and what lies before it in the batch."""

    start: int
    end: int
    adapter: Adapter | None
    before: dict[str, Tensor] = field(default_factory=dict)


class Reference:
    """A layer of ``problem``, plain, with at most one fault."""

    def __init__(self, problem: LayerProblem, config: Any, fault: str | None = None) -> None:
        self.problem = problem
        self.config = config
        self.fault = fault

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        problem = self.problem
        adapters = problem.adapters(inputs)
        starts = [sum(problem.lengths[:s]) for s in range(len(problem.lengths) + 1)]
        out, before = [], dict[str, Tensor]()
        for s, (start, end) in enumerate(pairwise(starts)):
            which = problem.adapter_of(s)
            adapter = None if which is None else adapters[which]
            if adapter is not None and self.is_("adapter of another sequence"):
                adapter = adapters[1 - adapters.index(adapter)]
            if adapter is None and self.is_("adapter of the base sequence"):
                adapter = adapters[0]
            sequence = Sequence(start, end, adapter, before)
            rest = [t[start:end] for t in problem.rest]
            out.append(self.layer(inputs["x"][start:end], sequence, *rest))
            before = sequence.before
        return torch.cat(out)

    def is_(self, fault: str) -> bool:
        """Whether this is the fault to make."""
        return self.fault == fault

    # ------------------------------------------------------------------------------------------------ whole layers

    def layer(self, x: Tensor, sequence: Sequence, *rotation: Tensor) -> Tensor:
        """x [n, D]: [n, D]."""
        layer: Any = self.problem.layer
        if not hasattr(layer, "input_layernorm"):
            return self.encoder_layer(layer, x, sequence)
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        shifted = layer.input_layernorm.shifted
        normed = self.norm(layer.input_layernorm, x)
        if hasattr(layer, "linear_attn"):
            mixed = self.delta_net(layer.linear_attn, normed, sequence)
        else:
            mixed = self.attention(layer.self_attn, normed, sequence, *rotation, shifted=shifted)
        if gemma and not self.is_("norm after attention missing"):
            mixed = self.norm(layer.post_attention_layernorm, mixed)
        if self.is_("residual dropped"):
            x = torch.zeros_like(x)
        x = (normed if self.is_("normed value in the residual") else x) + mixed
        normed = self.norm(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm, x)
        mlp = self.moe if hasattr(layer.mlp, "experts") else self.mlp
        wide = mlp(layer.mlp, normed, sequence)
        return x + (self.norm(layer.post_feedforward_layernorm, wide) if gemma else wide)

    def encoder_layer(self, layer: Any, x: Tensor, sequence: Sequence) -> Tensor:
        """BERT's, with norms after the residuals."""
        attention = layer.attention
        projections = attention.self
        heads = self.config.num_attention_heads
        q, k, v = (
            self.linear(m, x, sequence).view(len(x), heads, -1)
            for m in (projections.query, projections.key, projections.value)
        )
        scores = torch.einsum("nhd,mhd->hnm", q, k)
        if not self.is_("q scale missing"):
            scores = scores * self.config.head_dim**-0.5
        if self.is_("future positions hidden"):
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        mixed = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)
        residual = torch.zeros_like(x) if self.is_("residual dropped") else x
        x = self.layer_norm(attention.output.LayerNorm, self.linear(attention.output.dense, mixed, sequence) + residual)
        wide = self.linear(layer.intermediate.dense, x, sequence)
        wide = wide if self.is_("activation missing") else F.gelu(wide)
        return self.layer_norm(layer.output.LayerNorm, self.linear(layer.output.dense, wide, sequence) + x)

    # ---------------------------------------------------------------------------------------------------- the parts

    def linear(self, module: Linear, x: Tensor, sequence: Sequence) -> Tensor:
        """With the sequence's adapter."""
        y = x @ module.get_parameter("weight").T
        if module.bias is not None:
            y = y + module.bias
        adapter = sequence.adapter
        if adapter is None:
            return y
        a, b = adapter.modules[module.name]
        scale = 1.0 if self.is_("lora scale missing") else adapter.alpha / adapter.rank
        return y + scale * (x @ a.T) @ b.T

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """Root mean square."""
        size = (x.square().mean(-1, keepdim=True) + module.eps).rsqrt()
        if self.is_("norm's statistics constant"):
            size = size.detach()
        shift = module.shifted and not self.is_("norm's 1 + forgotten")
        return x * size * (module.weight + 1.0 if shift else module.weight)

    def layer_norm(self, module: Any, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        centred = x - (mean.detach() if self.is_("norm's mean constant") else mean)
        size = (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt()
        if self.is_("norm's variance constant"):
            size = size.detach()
        return centred * size * module.weight + module.bias

    def mlp(self, module: Any, x: Tensor, sequence: Sequence) -> Tensor:
        gate, up = self.linear(module.gate_proj, x, sequence), self.linear(module.up_proj, x, sequence)
        if self.is_("gate and up swapped"):
            gate, up = up, gate
        wide = gate if self.is_("activation missing") else ACTIVATIONS[module.activation](gate)
        return self.linear(module.down_proj, wide * up, sequence)

    def moe(self, module: Any, x: Tensor, sequence: Sequence) -> Tensor:
        """Each token by each of its experts."""
        shape, width = self.config.moe, self.config.moe.intermediate_size
        probs = (x @ module.gate.weight.T).softmax(-1)
        weights, chosen = probs.topk(shape.num_experts_per_token, dim=-1)
        if shape.normalize_top_k and not self.is_("weights not renormalised"):
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total.detach() if self.is_("renormaliser constant") else total)
        if self.is_("router's weights constant"):
            weights = weights.detach()
        if self.is_("weights of another expert"):
            weights = weights.flip(-1)
        if self.is_("one expert dropped"):
            weights = weights * torch.tensor([1.0] * (weights.shape[1] - 1) + [0.0], dtype=x.dtype)
        rows = []
        for t in range(len(x)):
            row = torch.zeros_like(x[t])
            for weight, expert in zip(weights[t], chosen[t].tolist(), strict=True):
                gate, up = self.expert(module.experts, "gate_up_proj", expert, x[t], sequence).split(width)
                if self.is_("expert's gate and up swapped"):
                    gate, up = up, gate
                wide = module.experts.act(gate) * up
                row = row + weight * self.expert(module.experts, "down_proj", expert, wide, sequence)
            rows.append(row)
        gate = self.linear(module.shared_expert_gate, x, sequence).sigmoid()
        if self.is_("shared expert's gate dropped"):
            gate = torch.ones_like(gate)
        if self.is_("shared expert's gate constant"):
            gate = gate.detach()
        shared = gate * self.mlp(module.shared_expert, x, sequence)
        return torch.stack(rows) + (torch.zeros_like(shared) if self.is_("shared expert dropped") else shared)

    def expert(self, module: Any, name: str, expert: int, x: Tensor, sequence: Sequence) -> Tensor:
        """One token through one expert, with the sequence's adapter."""
        y: Tensor = getattr(module, name)[expert] @ x
        adapter = sequence.adapter
        if adapter is None or self.is_("experts' adapters dropped"):
            return y
        a, b = adapter.modules[f"{module.name}.{name}"]
        if self.is_("adapter of another expert"):
            expert = (expert + 1) % len(a)
        scale = 1.0 if self.is_("lora scale missing") else adapter.alpha / adapter.rank
        return y + scale * (b[expert] @ (a[expert] @ x))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of each head the first dimensions, in pairs half of them apart."""
        width = cos.shape[-1]
        turned, kept = x[..., :width], x[..., width:]
        cos, sin = cos[:, None], sin[:, None]
        if self.is_("rotation's sign"):
            sin = -sin
        if self.is_("rotation pairs neighbours"):
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            other = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
        return torch.cat((turned * cos + other * sin, kept), -1)

    def attention(
        self, module: Any, x: Tensor, sequence: Sequence, cos: Tensor, sin: Tensor, *, shifted: bool
    ) -> Tensor:
        width, gate = module.head_dim, None
        q = self.linear(module.q_proj, x, sequence)
        if module.output_gate:
            if self.is_("gate split over all heads"):
                q, gate = (half.view(len(x), -1, width) for half in q.chunk(2, -1))
            else:
                q, gate = q.view(len(x), -1, 2 * width).split(width, -1)
        q = q.reshape(len(x), -1, width)
        k = self.linear(module.k_proj, x, sequence).view(len(x), -1, width)
        v = self.linear(module.v_proj, x, sequence).view(len(x), -1, width)
        if module.q_norm is not None:
            if not self.is_("norm of q missing"):
                q = self.norm(module.q_norm, q)
            k = self.norm(module.k_norm, k)
            if self.is_("norm of k constant"):
                k = k.detach()
        q = self.rotate(q, cos, sin)
        k = k if self.is_("rotation missing on k") else self.rotate(k, cos, sin)
        keys, values, past = k, v, 0
        if self.is_("sequence boundary leaks") and sequence.before:
            keys, values = torch.cat((sequence.before["k"], k)), torch.cat((sequence.before["v"], v))
            past = len(keys) - len(k)
        sequence.before = {"k": k, "v": v}
        if self.is_("values constant"):
            values = values.detach()
        heads, kv_heads = q.shape[1], k.shape[1]
        read = [h % kv_heads if self.is_("heads share the wrong keys") else h * kv_heads // heads for h in range(heads)]
        scores = torch.einsum("nhd,mhd->hnm", q, keys[:, read])
        if not self.is_("q scale missing"):
            scores = scores * module.scale
        distance = torch.arange(len(x))[:, None] + past - torch.arange(len(keys))
        seen = distance >= (-1 if self.is_("future positions") else 0)
        if module.window is not None and not self.is_("window missing"):
            wider = self.is_("window one wider") - self.is_("window one narrower")
            seen = seen & (distance < module.window + wider)
        scores = scores.masked_fill(~seen, float("-inf"))
        grown = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        total = grown.sum(-1, keepdim=True)
        probs = grown / (total.detach() if self.is_("softmax normaliser constant") else total)
        out = torch.einsum("hnm,mhd->nhd", probs, values[:, read])
        if gate is not None and not self.is_("output gate dropped"):
            gate = gate.detach() if self.is_("output gate constant") else gate
            out = out * (gate if self.is_("gate without sigmoid") else gate.sigmoid())
        return self.linear(module.o_proj, out.flatten(1), sequence)

    def convolve(self, module: Any, x: Tensor, sequence: Sequence) -> Tensor:
        """Causal, per channel, then SiLU."""
        taps = module.weight[:, 0]
        past = taps.shape[1] - 1
        leaks = self.is_("window of the conv leaks") and "conv" in sequence.before
        before = sequence.before["conv"] if leaks else x.new_zeros(past, x.shape[1])
        padded = torch.cat((x.new_zeros(past, x.shape[1]), before, x))[-len(x) - past :]
        sequence.before["conv"] = x
        if self.is_("tap shifted"):
            taps = taps.roll(1, -1)
        if self.is_("last tap dropped"):
            taps = torch.cat((torch.zeros_like(taps[:, :1]), taps[:, 1:]), -1)
        y = torch.stack([(padded[t : t + past + 1] * taps.T).sum(0) for t in range(len(x))])
        return y if self.is_("activation of the conv missing") else F.silu(y)

    def delta_net(self, module: Any, x: Tensor, sequence: Sequence) -> Tensor:
        shape = module.shape
        z = self.linear(module.in_proj_z, x, sequence).view(len(x), shape.num_value_heads, -1)
        beta = self.linear(module.in_proj_b, x, sequence).sigmoid()
        a = self.linear(module.in_proj_a, x, sequence)
        g = -module.A_log.exp() * F.softplus(a if self.is_("dt_bias missing") else a + module.dt_bias)
        mixed = self.convolve(module.conv1d, self.linear(module.in_proj_qkv, x, sequence), sequence)
        q, k, v = mixed.split([shape.key_dim, shape.key_dim, shape.value_dim], -1)
        q, k = (self.unit(y.view(len(x), shape.num_key_heads, -1)) for y in (q, k))
        if not self.is_("q scale missing"):
            q = q * shape.key_head_dim**-0.5
        heads = range(shape.num_value_heads)
        if self.is_("value heads read the wrong keys"):
            read = [h % shape.num_key_heads for h in heads]
        else:
            read = [h * shape.num_key_heads // shape.num_value_heads for h in heads]
        out = self.delta_rule(q[:, read], k[:, read], v.view(len(x), len(read), -1), g, beta, sequence)
        weight = module.norm.weight + 1.0 if self.is_("norm of the output shifted") else module.norm.weight
        gate = z if self.is_("z gate without silu") else F.silu(z)
        if self.is_("z gate dropped"):
            gate = torch.ones_like(gate)
        if self.is_("z gate before the norm"):
            out, gate = out * gate, torch.ones_like(gate)
        out = out * (out.square().mean(-1, keepdim=True) + module.norm.eps).rsqrt() * weight * gate
        return self.linear(module.out_proj, out.flatten(1), sequence)

    def unit(self, x: Tensor) -> Tensor:
        size = (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        if self.is_("l2 norm missing"):
            return x
        return x * (size.detach() if self.is_("l2 norm constant") else size)

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, sequence: Sequence) -> Tensor:
        """q, k [n, H, K], v [n, H, V], g, beta [n, H]: [n, H, V]."""
        if self.is_("decay missing"):
            g = torch.zeros_like(g)
        if self.is_("decay constant"):
            g = g.detach()
        if self.is_("decay one late"):
            g = torch.cat((torch.zeros_like(g[:1]), g[:-1]))
        if self.is_("beta dropped"):
            beta = torch.ones_like(beta)
        if self.is_("beta constant"):
            beta = beta.detach()
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        if self.is_("state leaks") and "state" in sequence.before:
            state = sequence.before["state"]
        outputs = []
        for t in range(len(q)):
            if t and t % CHUNK == 0 and self.is_("state not carried over chunks"):
                state = torch.zeros_like(state)
            if t and t % CHUNK == 0 and self.is_("decay within the chunk alone"):
                state = state.detach()
            decayed = state * g[t].exp()[:, None, None]
            predicted = torch.einsum("hkv,hk->hv", state if self.is_("prediction not decayed") else decayed, k[t])
            if self.is_("correction missing"):
                predicted = torch.zeros_like(predicted)
            if self.is_("sign of the correction"):
                predicted = -predicted
            before, state = decayed, decayed + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - predicted))
            read = before if self.is_("output before the update") else state
            outputs.append(torch.einsum("hkv,hk->hv", read, q[t]))
        sequence.before["state"] = state
        return torch.stack(outputs)


class WrongBackward(torch.autograd.Function):
    """The right forward with the backward of another function."""

    @staticmethod
    def forward(
        ctx: Any, right: Callable[..., Tensor], wrong: Callable[..., Tensor], names: Any, *xs: Tensor
    ) -> Tensor:
        ctx.wrong, ctx.names = wrong, names
        ctx.save_for_backward(*xs)
        return right(dict(zip(names, xs, strict=True)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            xs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = ctx.wrong(dict(zip(ctx.names, xs, strict=True)))
            found = torch.autograd.grad(out, xs, grads[0], allow_unused=True)
        return (None, None, None, *found)


def with_backward_of(
    right: Callable[[Mapping[str, Tensor]], Tensor], wrong: Callable[[Mapping[str, Tensor]], Tensor]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The values of one function and the derivatives of another."""

    def function(inputs: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = WrongBackward.apply(right, wrong, tuple(inputs), *inputs.values())  # type: ignore[no-untyped-call]
        return result

    return function


def randomize(layer: nn.Module, generator: torch.Generator) -> None:
    """Values of every parameter, such that no term of the layer is small beside the others."""
    for name, parameter in layer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.4 * noise + 0.2 if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
        if name.endswith("A_log"):
            parameter.data = torch.linspace(-3.0, 0.5, len(parameter), dtype=torch.float64)
