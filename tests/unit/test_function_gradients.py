"""Every autograd.Function of the engine: its backward is right, and the wrong ones listed for it are caught."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
from engine.config import LinearAttentionConfig, ModelConfig
from engine.layers.rope import _Rotation
from engine.ops import quantized
from engine.ops.causal_attention import _CausalAttention
from engine.ops.causal_conv import _Taps, _WholeSequences
from engine.ops.delta_rule_gradient import _GatedDeltaRule
from engine.ops.dense import _Linear
from engine.ops.fused_gradients import _GatedActivation, _RMSNorm
from engine.ops.low_rank import _LowRankLinear
from engine.ops.root_norm import _RootNorm
from engine.training import loss
from engine.verification.functions import FUNCTIONS, function_name
from engine.verification.gradients import TOLERANCE, check_gradients

CONFIG = ModelConfig(
    model_type="qwen3_5_text",
    vocab_size=23,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=64,
    norm_eps=1e-6,
    linear_attention=LinearAttentionConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=5, value_head_dim=3, conv_width=4
    ),
)

Wrong = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks of small matrices."""
    monkeypatch.setattr(quantized, "CPU_CHUNK_ELEMENTS", 20 * CONFIG.hidden_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_function_of_the_engine_is_in_the_catalogues() -> None:
    """A new autograd.Function fails here until it has cases and a list of wrong backwards."""
    for module in pkgutil.walk_packages(engine.__path__, "engine."):
        if module.name == "engine.ops.cpu._kernels":
            continue  # a shared library, no module
        importlib.import_module(module.name)
    found = {
        function_name(cls) for cls in subclasses(torch.autograd.Function) if cls.__module__.split(".")[0] == "engine"
    }
    assert found == set(FUNCTIONS)
    assert found == set(WRONG)


def nodes(output: Tensor) -> set[str]:
    """Names of all nodes of the graph behind a tensor."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [next_node for next_node, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_backward_is_right(name: str) -> None:
    """In float64, in every case; and the Function is what ran."""
    for case in FUNCTIONS[name](CONFIG):
        out = case.function({key: t.clone().requires_grad_() for key, t in case.inputs.items()})
        assert isinstance(out, Tensor)
        assert f"{name.rsplit('.', 1)[1]}Backward" in nodes(out)
        found = check_gradients(case.function, case.inputs)
        assert found.error < TOLERANCE / 10, f"{case.name}: {found.worst_entry}"


def _of_rows(change: Callable[[quantized.WeightRows], quantized.WeightRows]) -> Wrong:
    """A quantized backward that reads other rows."""
    return lambda right, args: right(args[0], change(args[1]))


def _half(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad[..., grad.shape[-1] // 2 :] = 0
    return grad


def _after_norm(ctx: Any) -> Any:
    """The context of a norm that kept what it gave in place of what it was given."""
    x, inverse, weight = ctx.saved_tensors
    return SimpleNamespace(saved_tensors=(x * inverse, inverse, weight), count=ctx.count, scale=ctx.scale)


def _without_its_change(ctx: Any) -> Any:
    """One whose norm does not depend on x."""
    return SimpleNamespace(saved_tensors=ctx.saved_tensors, count=1e12, scale=ctx.scale)


def _of_low_rank(place: int, change: Callable[[Tensor], Tensor]) -> Wrong:
    """A backward of the low-rank update in which one of the gradients (0: x, 1: x behind
    dropout, 2: A, 3: B) is changed."""

    def wrong(right: Any, args: Any) -> Any:
        found = list(right(*args))
        if found[place] is not None:
            found[place] = change(found[place])
        return tuple(found)

    return wrong


def _low_rank_saved(**changes: Callable[[Tensor], Tensor]) -> Wrong:
    """One that kept something else of x, A x, A or B."""

    def wrong(right: Any, args: Any) -> Any:
        names = ("x", "low", "a", "b")
        saved = [changes.get(name, lambda t: t)(t) for name, t in zip(names, args[0].saved_tensors, strict=True)]
        kept = {name: getattr(args[0], name) for name in ("scaling", "layer", "is_dropped", "needs_input_grad")}
        return right(SimpleNamespace(saved_tensors=saved, **kept), args[1])

    return wrong


def _saved_as(change: Callable[..., tuple[Tensor | None, ...]]) -> Wrong:
    """A backward that kept something else."""

    def wrong(right: Any, args: Any) -> Any:
        ctx = SimpleNamespace(**vars(args[0]), saved_tensors=change(*args[0].saved_tensors))
        return right(ctx, args[1])

    return wrong


def _changed(change: Callable[[Tensor], Tensor]) -> Wrong:
    """One whose first gradient is changed."""
    return lambda right, args: (change((found := right(*args))[0]), *found[1:])


def _turned(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Wrong:
    """A backward of the rotation by another angle."""
    return lambda right, args: right(SimpleNamespace(saved_tensors=change(*args[0].saved_tensors)), args[1])


def _of_gradients(place: int, change: Callable[[Tensor], Tensor]) -> Wrong:
    """A backward in which one of the gradients is changed."""

    def wrong(right: Any, args: Any) -> Any:
        found = list(right(*args))
        found[place] = change(found[place])
        return tuple(found)

    return wrong


def _attention_saved(**changes: Callable[[Tensor], Tensor]) -> Wrong:
    """A backward of attention that kept something else."""

    def wrong(right: Any, args: Any) -> Any:
        names = ("q", "k", "v", "out", "log_sums", "starts")
        saved = [changes.get(name, lambda t: t)(t) for name, t in zip(names, args[0].saved_tensors, strict=True)]
        return right(SimpleNamespace(saved_tensors=saved, scale=args[0].scale), args[1])

    return wrong


def _delta_saved(**changes: Callable[[Tensor], Tensor]) -> Wrong:
    """A backward of the delta rule that kept something else."""

    def wrong(right: Any, args: Any) -> Any:
        names = ("q", "k", "v", "a", "b", "a_log", "dt_bias")
        saved = [changes.get(name, lambda t: t)(t) for name, t in zip(names, args[0].saved_tensors, strict=True)]
        return right(SimpleNamespace(saved_tensors=saved, seq_starts=args[0].seq_starts), args[1])

    return wrong


def _conv_with(**changes: Callable[[Any], Any]) -> Wrong:
    """A backward of the convolution by other sequences, or other taps."""

    def wrong(right: Any, args: Any) -> Any:
        x, weight = args[0].saved_tensors
        ctx = SimpleNamespace(seq_starts=args[0].seq_starts, silu=args[0].silu)
        ctx.saved_tensors = (changes.get("x", lambda t: t)(x), changes.get("weight", lambda t: t)(weight))
        ctx.seq_starts = changes.get("starts", lambda starts: starts)(ctx.seq_starts)
        return right(ctx, args[1])

    return wrong


def _with_taps(change: Callable[[Tensor], Tensor]) -> Wrong:
    def wrong(right: Any, args: Any) -> Any:
        (weight,) = args[0].saved_tensors
        return right(SimpleNamespace(saved_tensors=(change(weight),)), args[1])

    return wrong


WRONG: dict[str, dict[str, Wrong]] = {
    "engine.ops.fused_gradients._RMSNorm": {
        "sign": _changed(lambda d: -d),
        "one in a thousand": _changed(lambda d: 1.001 * d),
        "rows shifted": _changed(lambda d: d.roll(1, 0)),
        "weight forgotten": _saved_as(lambda x, gate, weight: (x, gate, torch.ones_like(weight))),
        "x of other rows": _saved_as(lambda x, gate, weight: (x.roll(1, 0), gate, weight)),
        "the norm taken as constant": lambda right, args: right(
            SimpleNamespace(**vars(args[0]) | {"eps": 1e12}, saved_tensors=args[0].saved_tensors), args[1]
        ),
    },
    "engine.ops.fused_gradients._GatedActivation": {
        "sign": _changed(lambda d: -d),
        "one in a thousand": _changed(lambda d: 1.001 * d),
        "one for the other": lambda right, args: (*right(*args)[1::-1], None),
        "gate and up exchanged": _saved_as(lambda gate, up: (up, gate)),
        "columns shifted": _changed(lambda d: d.roll(1, 1)),
        "incoming gradient forgotten": lambda right, args: right(args[0], torch.ones_like(args[1])),
    },
    "engine.ops.causal_attention._CausalAttention": {
        "sign of q": _of_gradients(0, lambda d: -d),
        "sign of k": _of_gradients(1, lambda d: -d),
        "sign of v": _of_gradients(2, lambda d: -d),
        "one in a thousand of q": _of_gradients(0, lambda d: 1.001 * d),
        "one in a thousand of k": _of_gradients(1, lambda d: 1.001 * d),
        "one in a thousand of v": _of_gradients(2, lambda d: 1.001 * d),
        "sums forgotten": _attention_saved(log_sums=torch.zeros_like),
        "the softmax taken as constant": _attention_saved(out=torch.zeros_like),
        "one sequence": _attention_saved(starts=lambda starts: starts[[0, -1]]),
        "key heads exchanged": _attention_saved(k=lambda k: k.flip(1)),
        "tokens shifted": lambda right, args: right(args[0], args[1].roll(1, 0)),
    },
    "engine.layers.rope._Rotation": {
        "sign": lambda right, args: (-right(*args)[0], None, None),
        "one in a thousand": lambda right, args: (1.001 * right(*args)[0], None, None),
        "turned as the forward": _turned(lambda cos, sin: (cos, -sin)),
        "not turned": _turned(lambda cos, sin: (torch.ones_like(cos), torch.zeros_like(sin))),
        "of the next token": _turned(lambda cos, sin: (cos.roll(1, 0), sin.roll(1, 0))),
        "frequencies shifted": _turned(lambda cos, sin: (cos.roll(1, 1), sin.roll(1, 1))),
        "heads shifted": lambda right, args: (right(*args)[0].roll(1, 1), None, None),
    },
    "engine.ops.causal_conv._Taps": {
        "sign": lambda right, args: (-right(*args)[0], None),
        "one in a thousand": lambda right, args: (1.001 * right(*args)[0], None),
        "taps in the order of forward": _with_taps(lambda weight: weight.flip(1)),
        "one token late": lambda right, args: (right(*args)[0].roll(1, 0), None),
        "one token early": lambda right, args: (right(*args)[0].roll(-1, 0), None),
        "without the last tap": _with_taps(lambda weight: torch.cat((weight[:, :-1], 0 * weight[:, -1:]), 1)),
        "without the first tap": _with_taps(lambda weight: torch.cat((0 * weight[:, :1], weight[:, 1:]), 1)),
        "channels shifted": lambda right, args: (right(*args)[0].roll(1, 1), None),
    },
    "engine.ops.causal_conv._WholeSequences": {
        "sign": _changed(lambda d: -d),
        "one in a thousand": _changed(lambda d: 1.001 * d),
        "taps in the order of forward": _conv_with(weight=lambda weight: weight.flip(1)),
        "one token late": _changed(lambda d: d.roll(1, 0)),
        "one sequence": _conv_with(starts=lambda starts: [starts[0], starts[-1]]),
        "channels shifted": _changed(lambda d: d.roll(1, 1)),
    },
    "engine.ops.delta_rule_gradient._GatedDeltaRule": {
        **{f"sign of {name}": _of_gradients(i, lambda d: -d) for i, name in enumerate("qkvab")},
        **{f"one in a thousand of {name}": _of_gradients(i, lambda d: 1.001 * d) for i, name in enumerate("qkvab")},
        "one sequence": lambda right, args: right(
            SimpleNamespace(saved_tensors=args[0].saved_tensors, seq_starts=[0, args[0].seq_starts[-1]]), args[1]
        ),
        "tokens shifted": lambda right, args: right(args[0], args[1].roll(1, 0)),
        "queries for keys": lambda right, args: (right(*args)[1], right(*args)[0], *right(*args)[2:]),
        "key heads exchanged": _delta_saved(k=lambda k: k.flip(1)),
        "no decay": _delta_saved(a_log=lambda a_log: a_log - 50.0),
        "dt_bias forgotten": _delta_saved(dt_bias=torch.zeros_like),
        "corrections in full": _delta_saved(b=lambda b: b + 50.0),
        "queries of another length": _delta_saved(q=lambda q: 2.0 * q),
    },
    "engine.ops.dense._Linear": {
        "sign": _changed(lambda d: -d),
        "one in a thousand": _changed(lambda d: 1.001 * d),
        "rows shifted": _changed(lambda d: d.roll(1, 0)),
        "inputs shifted": _changed(lambda d: d.roll(1, 1)),
        "outputs shifted": lambda right, args: right(args[0], args[1].roll(1, 1)),
        "of another weight": _saved_as(lambda weight: (weight.flip(0),)),
        "an output forgotten": _saved_as(lambda weight: (torch.cat((0 * weight[:1], weight[1:])),)),
    },
    "engine.ops.low_rank._LowRankLinear": {
        "sign of x": _of_low_rank(0, lambda d: -d),
        "one in a thousand of x behind dropout": _of_low_rank(1, lambda d: 1.001 * d),
        "sign of A": _of_low_rank(2, lambda d: -d),
        "sign of B": _of_low_rank(3, lambda d: -d),
        "one in a thousand of A": _of_low_rank(2, lambda d: 1.001 * d),
        "one in a thousand of B": _of_low_rank(3, lambda d: 1.001 * d),
        "scaling forgotten in A": _of_low_rank(2, lambda d: d / 1.5),
        "scaling forgotten in B": _of_low_rank(3, lambda d: d / 1.5),
        "ranks of A shifted": _of_low_rank(2, lambda d: d.roll(1, 0)),
        "ranks of B shifted": _of_low_rank(3, lambda d: d.roll(1, 1)),
        "tokens shifted": lambda right, args: right(args[0], args[1].roll(1, 0)),
        "the first token left out": _low_rank_saved(x=lambda x: torch.cat((0 * x[:1], x[1:]))),
    },
    "engine.ops.root_norm._RootNorm": {
        "sign": lambda right, args: (-right(*args)[0], *[None] * 4),
        "one in a thousand": lambda right, args: (1.001 * right(*args)[0], *[None] * 4),
        "the value after the norm for the one before": lambda right, args: right(_after_norm(args[0]), args[1]),
        "the norm taken as constant": lambda right, args: right(_without_its_change(args[0]), args[1]),
        "rows shifted": lambda right, args: (right(*args)[0].roll(1, 0), *[None] * 4),
        "constant": lambda right, args: (torch.ones_like(right(*args)[0]), *[None] * 4),
    },
    "engine.ops.quantized._QuantizedLinear": {
        "sign": lambda right, args: -right(*args),
        "one in a thousand": lambda right, args: 1.001 * right(*args),
        "scales forgotten": _of_rows(lambda rows: lambda a, b, dtype: rows(a, b, dtype).sign()),
        "outputs shifted": lambda right, args: right(args[0].roll(1, -1), args[1]),
        "inputs shifted": lambda right, args: right(*args).roll(1, -1),
        "rows of a chunk moved": _of_rows(lambda rows: lambda a, b, dtype: rows(a, b, dtype).roll(1, 0)),
        "zeros forgotten": _of_rows(lambda rows: lambda a, b, dtype: rows(a, b, dtype) + 1),
        "later chunks dropped": lambda right, args: right(_half(args[0]), args[1]),
        "constant": lambda right, args: torch.ones_like(right(*args)),
    },
    "engine.training.loss._ChunkedCrossEntropy": {
        "sign": lambda right, args: (-right(*args)[0], None, None, None),
        "one in a thousand": lambda right, args: (1.001 * right(*args)[0], None, None, None),
        "incoming gradient forgotten": lambda right, args: right(args[0], torch.ones_like(args[1])),
        "mean for sum": lambda right, args: (right(*args)[0] / len(right(*args)[0]), None, None, None),
        "rows shifted": lambda right, args: (right(*args)[0].roll(1, 0), None, None, None),
        "sign of one row": lambda right, args: (
            right(*args)[0] * torch.tensor([1.0] * 4 + [-1.0] + [1.0] * 6)[:, None], None, None, None,
        ),
        "last chunk dropped": lambda right, args: (
            right(*args)[0] * torch.tensor([1.0] * 8 + [0.0] * 3)[:, None], None, None, None,
        ),
        "targets forgotten": lambda right, args: (right(*args)[0] + 0.2, None, None, None),
    },
}  # fmt: skip
"""For each Function, backwards that are wrong: each gets the right one and what that is called with."""

PLACES: dict[str, tuple[object, str]] = {
    "engine.ops.fused_gradients._GatedActivation": (_GatedActivation, "backward"),
    "engine.ops.fused_gradients._RMSNorm": (_RMSNorm, "backward"),
    "engine.layers.rope._Rotation": (_Rotation, "backward"),
    "engine.ops.causal_attention._CausalAttention": (_CausalAttention, "backward"),
    "engine.ops.causal_conv._Taps": (_Taps, "backward"),
    "engine.ops.causal_conv._WholeSequences": (_WholeSequences, "backward"),
    "engine.ops.delta_rule_gradient._GatedDeltaRule": (_GatedDeltaRule, "backward"),
    "engine.ops.dense._Linear": (_Linear, "backward"),
    "engine.ops.low_rank._LowRankLinear": (_LowRankLinear, "backward"),
    "engine.ops.root_norm._RootNorm": (_RootNorm, "backward"),
    "engine.ops.quantized._QuantizedLinear": (quantized, "_backward"),
    "engine.training.loss._ChunkedCrossEntropy": (loss._ChunkedCrossEntropy, "backward"),
}
"""Where the backward of each stands."""

WITHIN = {"sign of x": "x", "one in a thousand of x behind dropout": "dropped"}
"""Wrong gradients of an input that some cases do not differentiate."""


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, wrongs in WRONG.items() for wrong in wrongs])
def test_wrong_backwards_are_caught(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every case that the right one passes."""
    owner, attribute = PLACES[name]
    right = getattr(owner, attribute)

    def backward(*args: Any) -> Any:
        return WRONG[name][wrong](right, args)

    monkeypatch.setattr(owner, attribute, backward if owner is quantized else staticmethod(backward))
    cases = FUNCTIONS[name](CONFIG)
    assert cases
    for case in cases:
        if wrong == "zeros forgotten" and case.name.startswith("int8"):
            continue  # which has none
        if WITHIN.get(wrong, "x") not in case.inputs and wrong in WITHIN:
            continue
        found = check_gradients(case.function, case.inputs, top=1, strided=1)
        assert found.error > 500 * TOLERANCE, f"{case.name}: {found.worst_entry}"
