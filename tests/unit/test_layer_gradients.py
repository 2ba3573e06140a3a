"""Gradients of whole layers of each kind in float64, and what the checker says of backwards wrong in one place.

Every layer runs a mixed batch of sequences of unlike lengths, one beyond a chunk of the delta rule: two adapters of
different ranks, with A and B that are not zero, and the base between them. Checked are the gradients of the input and
of every A and B. The wrong backwards are the derivatives of tests/reference_layers.py with one fault each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from engine.config import LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig
from engine.context import packed_context
from engine.errors import FailedPreconditionError
from engine.layers.rope import RotaryEmbedding
from engine.models.bert import BertLayer
from engine.models.gemma3_text import Gemma3DecoderLayer
from engine.models.llama import DecoderLayer
from engine.models.qwen3_5_text import Qwen3_5DecoderLayer
from engine.quantization.base import SchemeMap
from engine.verification.gradients import TOLERANCE, CentralDifferences, check_gradients
from engine.verification.layers import LayerProblem, layer_problem
from tests import reference_layers as plain
from tests.reference_layers import Reference, with_backward_of

LENGTHS = [34, 1, 6, 3, 2]
RIGHT, WRONG = TOLERANCE / 10, TOLERANCE * 1e4
"""A right backward is a decade within the tolerance, and a wrong one four beyond it."""

ROPE = {"full_attention": RopeConfig(theta=100.0), "sliding_attention": RopeConfig(theta=50.0)}
BASE = ModelConfig(
    model_type="llama",
    vocab_size=11,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    norm_eps=1e-5,
    layer_types=("full_attention",),
    rope=ROPE,
    query_scale=0.5,
)
GEMMA = replace(
    BASE, layer_types=("sliding_attention",), sliding_window=5, qk_norm=True, hidden_act="gelu_pytorch_tanh"
)
QWEN = replace(
    BASE,
    rope={"full_attention": RopeConfig(theta=100.0, partial_rotary_factor=0.5)},
    head_dim=8,
    qk_norm=True,
    attention_output_gate=True,
    linear_attention=LinearAttentionConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=5, value_head_dim=3, conv_width=4
    ),
)
EXPERTS = MoEConfig(num_experts=5, num_experts_per_token=2, intermediate_size=6, shared_intermediate_size=7)
HYBRID = replace(QWEN, layer_types=("linear_attention",))
DECODER = (*plain.COMMON, *plain.PRE_NORM)

FAULTS = {
    "llama": (BASE, (*DECODER, *plain.MLP, *plain.ATTENTION)),
    "gemma3 sliding": (
        GEMMA,
        (*DECODER, *plain.SHIFTED, *plain.MLP, *plain.ATTENTION, *plain.QK_NORM, *plain.SLIDING, *plain.POST_NORMS),
    ),
    "qwen3.5 attention": (
        QWEN, (*DECODER, *plain.SHIFTED, *plain.MLP, *plain.ATTENTION, *plain.QK_NORM, *plain.GATED),
    ),
    "qwen3.5 delta-net": (HYBRID, (*DECODER, *plain.SHIFTED, *plain.MLP, *plain.DELTA)),
    "qwen3.5 delta-net, experts": (
        replace(HYBRID, moe=EXPERTS), (*DECODER, *plain.MLP, *plain.MOE),
    ),
    "qwen3.5 attention, experts": (replace(QWEN, moe=EXPERTS), (*plain.COMMON, *plain.MOE)),
    "bert": (
        replace(BASE, model_type="bert", num_key_value_heads=4, head_dim=3, query_scale=3**-0.5, hidden_act="gelu"),
        (*plain.COMMON, *plain.ENCODER, "q scale missing"),
    ),
}  # fmt: skip
"""Kind of layer to its configuration and the catalogue of faults."""


def make_layer(config: ModelConfig) -> torch.nn.Module:
    schemes, dtype = SchemeMap(), torch.float64
    if config.model_type == "bert":
        return BertLayer(config, 0, schemes, dtype)
    if config.attention_output_gate:
        return Qwen3_5DecoderLayer(config, "model.layers.0", config.layer_types[0], 0, schemes, dtype)
    kind = Gemma3DecoderLayer if config.sliding_window else DecoderLayer
    return kind(config, 0, schemes, dtype)


@dataclass
class Case:
    problem: LayerProblem
    differences: CentralDifferences
    config: ModelConfig


@cache
def case(kind: str) -> Case:
    """The layer of a kind, and the differences that all checks of it share."""
    torch.set_num_threads(1)
    config = FAULTS[kind][0]
    layer = make_layer(config)
    generator = torch.Generator().manual_seed(0)
    plain.randomize(layer, generator)
    causal = config.model_type != "bert"
    rest: tuple[torch.Tensor, ...] = ()
    if causal:
        rope = config.rope.get(config.layer_types[0], config.rope["full_attention"])
        rotary = RotaryEmbedding(rope, config.head_dim, config.max_position_embeddings)
        rest = rotary.cos_sin(packed_context(LENGTHS))
    x = torch.randn(sum(LENGTHS), config.hidden_size, generator=generator, dtype=torch.float64)
    problem = layer_problem(kind, layer, x, rest, LENGTHS, causal=causal)
    return Case(problem, CentralDifferences(problem, problem.inputs), config)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_layer_is_the_plain_one(kind: str) -> None:
    """Without a fault the reference gives the layer's values, so a fault is all that sets a wrong backward apart."""
    made = case(kind)
    inputs = made.problem.inputs
    torch.testing.assert_close(made.problem(inputs), Reference(made.problem, made.config)(inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "fault"), [(kind, fault) for kind, (_, faults) in FAULTS.items() for fault in ("none", *faults)]
)
def test_the_right_backward_passes_and_wrong_ones_do_not(kind: str, fault: str) -> None:
    """The layer's own backward and the plain one are accepted; the plain one with a fault is rejected."""
    made = case(kind)
    wrong = Reference(made.problem, made.config, None if fault == "none" else fault)
    reference = with_backward_of(made.problem, wrong)
    # Places that do not depend on the backward: their differences are computed once for all faults.
    found = check_gradients(reference, made.problem.inputs, top=0, strided=1, differences=made.differences)
    if fault != "none":
        assert not found.passed, found.worst_entry
        assert found.error > WRONG, found.worst_entry
        return
    # The places that tell every wrong backward, and the largest entry of each tensor.
    own = check_gradients(made.problem, made.problem.inputs, top=1, strided=1, differences=made.differences)
    for check in (own, found):
        assert check.passed, check.worst_entry
        assert check.error < RIGHT, check.worst_entry
        linears = len({name.rsplit(".", 1)[0] for name in check.worst} - {"x"})
        assert len(check.worst) == 1 + 2 * linears
        assert linears >= 12  # two adapters on every linear


@pytest.mark.parametrize("kind", FAULTS)
def test_adapters_whose_b_is_zero_are_refused(kind: str) -> None:
    """With B = 0 every gradient of A is zero, whatever the backward."""
    problem = case(kind).problem
    inputs = {name: torch.zeros_like(t) if name.endswith("lora_B") else t for name, t in problem.inputs.items()}
    with pytest.raises(FailedPreconditionError, match="lora_A is zero everywhere") as caught:
        check_gradients(problem, inputs, top=1, strided=1)
    assert caught.value.reason == "ZERO_GRADIENT"
