"""Gradients of whole layers of each kind in float64, through adapters whose B is not zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config import LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig
from engine.context import packed_context
from engine.layers.linear import Linear
from engine.layers.moe import Experts
from engine.lora.adapter import Adapter, LoRABatch
from engine.models.qwen3_5_text import Qwen3_5DecoderLayer, RotaryEmbedding
from engine.quantization.base import SchemeMap

torch.set_num_threads(1)
LENGTHS = [6, 3]


def config(kind: str, moe: bool) -> ModelConfig:
    return ModelConfig(
        model_type="qwen3_5_text",
        vocab_size=11,
        hidden_size=6,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        norm_eps=1e-6,
        layer_types=(kind,),  # type: ignore[arg-type]
        rope={"full_attention": RopeConfig(partial_rotary_factor=0.5)},
        qk_norm=True,
        query_scale=0.5,
        attention_output_gate=True,
        linear_attention=LinearAttentionConfig(
            num_key_heads=1, num_value_heads=2, key_head_dim=4, value_head_dim=3, conv_width=4
        ),
        moe=MoEConfig(num_experts=3, num_experts_per_token=2, intermediate_size=4, shared_intermediate_size=3)
        if moe
        else None,
    )


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_gradients_of_a_whole_layer(kind: str, moe: bool) -> None:
    """float64 gradcheck with respect to the input and to A and B of every linear, and of every routed expert, over two
    packed sequences."""
    shape = config(kind, moe)
    layer = Qwen3_5DecoderLayer(shape, "model.layers.0", shape.layer_types[0], 0, SchemeMap(), torch.float64).double()
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    for parameter in layer.parameters():
        parameter.copy_(0.5 * random(*parameter.shape))
    names, factors = [], []
    for module in layer.modules():
        if isinstance(module, Linear):
            names.append(module.name)
            factors += [0.5 * random(1, module.in_features), 0.5 * random(module.out_features, 1)]
        elif isinstance(module, Experts):
            for name, t in module.lora_targets().items():
                names.append(name)
                factors += [
                    0.5 * random(t.num_experts, 1, t.in_features),
                    0.5 * random(t.num_experts, t.out_features, 1),
                ]
    assert any("experts.down_proj" in name for name in names) == moe
    tokens = sum(LENGTHS)
    rotary = RotaryEmbedding(shape.rope["full_attention"], shape.head_dim, 32)

    def forward(x: Tensor, *pairs: Tensor) -> Tensor:
        modules = {name: (pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(names)}
        adapter = Adapter(name="a", version=1, rank=1, alpha=2.0, modules=modules)
        ctx = packed_context(LENGTHS, lora=LoRABatch([(adapter, 0, tokens)], tokens))
        return layer(x, ctx, *rotary.cos_sin(ctx))  # type: ignore[no-any-return]

    inputs = tuple(t.requires_grad_() for t in (random(tokens, 6), *factors))
    assert torch.autograd.gradcheck(forward, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)
    outputs = forward(*inputs)
    labels = ["x", *(f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B"))]
    for name, gradient in zip(labels, torch.autograd.grad(outputs.square().sum(), inputs), strict=True):
        assert gradient.norm() > 1e-6, f"{name} has no effect, so its check proves nothing"
