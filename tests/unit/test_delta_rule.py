"""The gated delta rule: every form against the recurrence, transformers' functions and stored values."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

from engine.ops.delta_rule import (
    chunk_gated_delta_rule,
    gated_delta_step,
    l2_normalize,
    plan_chunks,
    recurrent_gated_delta_rule,
)

torch.set_num_threads(1)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def starts_of(lengths: list[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def make(
    num_tokens: int, key_heads: int, value_heads: int, width: int, value_width: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """q scaled, q and k normalised, decays from almost none to almost all, beta across (0, 1)."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q = l2_normalize(normal(num_tokens, key_heads, width)) * width**-0.5
    k = l2_normalize(normal(num_tokens, key_heads, width))
    v = normal(num_tokens, value_heads, value_width)
    g = -torch.exp(1.5 * normal(num_tokens, value_heads) - 1.5)
    beta = torch.sigmoid(2 * normal(num_tokens, value_heads))
    return tuple(x.to(dtype) for x in (q, k, v, g, beta))  # type: ignore[return-value]


def states(num: int, heads: int, width: int, value_width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num, heads, width, value_width, generator=torch.Generator().manual_seed(9)).to(dtype)


def test_stored_values(shared: Path) -> None:
    """191 tokens of 128 x 128 with an initial state, made by another implementation, step by step and in chunks.

    That implementation scales q itself and keeps the state transposed.
    """
    golden = json.loads((shared / "goldens" / "gdn_chunk.seed7_len191_chunk64.json").read_text())
    q, k, v = (torch.tensor(golden[name])[:, None] for name in "qkv")
    beta, decay = (torch.tensor(golden[name])[:, None] for name in ("beta", "alpha"))
    inputs = (q * 128**-0.5, k, v, decay.log(), beta)
    initial = torch.tensor(golden["h0"]).T[None, None]
    results = [recurrent_gated_delta_rule(*inputs, [0, 191], initial)]
    for size in (16, 32, 64):
        results.append(chunk_gated_delta_rule(*inputs, plan_chunks([191], chunk_size=size), initial)[:2])
    for out, state in results:
        for kind in ("seq", "chk"):
            torch.testing.assert_close(out[:, 0], torch.tensor(golden[f"out_{kind}"]), atol=1e-7, rtol=1e-5)
            torch.testing.assert_close(state[0, 0].T, torch.tensor(golden[f"h_{kind}"]), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("length", [1, 31, 64, 65, 150])
def test_transformers(heads: tuple[int, int], length: int) -> None:
    """Recurrence and chunks give what transformers' recurrence and chunks give, from a state that is not zero."""
    inputs = make(length, *heads, 12, 20, torch.float32)
    initial = states(1, heads[1], 12, 20, torch.float32)
    q, k, v, g, beta = inputs
    args = ((q * 12**0.5)[None], k[None], v[None], g[None], beta[None])  # it scales q itself
    for function in (reference.torch_chunk_gated_delta_rule, reference.torch_recurrent_gated_delta_rule):
        expected, expected_state = function(*args, initial_state=initial, output_final_state=True)
        out, state = recurrent_gated_delta_rule(*inputs, [0, length], initial)
        torch.testing.assert_close(out, expected[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(state, expected_state, atol=2e-6, rtol=1e-5)
        out, state, _ = chunk_gated_delta_rule(*inputs, plan_chunks([length]), initial)
        torch.testing.assert_close(out, expected[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(state, expected_state, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("lengths", [[40], [5, 70, 32, 33, 1], [1, 2, 3]], ids=str)
def test_packed_chunks_equal_the_recurrence(lengths: list[int], size: int) -> None:
    """Sequences of unlike lengths side by side, with states captured on the way; in float64, so no fault hides."""
    inputs = make(sum(lengths), 2, 6, 8, 10, torch.float64)
    initial = states(len(lengths), 6, 8, 10, torch.float64)
    starts = starts_of(lengths)
    expected, final = recurrent_gated_delta_rule(*inputs, starts, initial)
    captures = [(s, n) for s, length in enumerate(lengths) for n in {1, (length + 1) // 2, length}]
    plan = plan_chunks(lengths, captures, chunk_size=size)
    with torch.inference_mode():
        kept = initial.clone()
        out, state, captured = chunk_gated_delta_rule(*inputs, plan, initial)
        assert torch.equal(kept, initial), "the initial state is the caller's"
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state, final, atol=1e-10, rtol=1e-10)
    for (s, n), got in zip(captures, captured, strict=True):
        part = [x[starts[s] : starts[s] + n] for x in inputs]
        _, wanted = recurrent_gated_delta_rule(*part, [0, n], initial[s : s + 1])  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted[0], atol=1e-10, rtol=1e-10)
    plain = chunk_gated_delta_rule(*inputs, plan_chunks(lengths, chunk_size=size), initial)
    torch.testing.assert_close(plain[0], expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(plain[1], final, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_any_cuts_equal_the_whole(seed: int) -> None:
    """A sequence in pieces, some of one token, the state handed on: the same outputs and the same last state."""
    inputs = make(130, 2, 4, 8, 8, torch.float32, seed)
    expected, final = recurrent_gated_delta_rule(*inputs, [0, 130])
    gen = torch.Generator().manual_seed(seed)
    cuts = sorted({0, 130, 64, 65, *torch.randint(1, 130, (5,), generator=gen).tolist()})
    state = torch.zeros(1, 4, 8, 8)
    outputs = []
    for start, end in pairwise(cuts):
        part = [x[start:end] for x in inputs]
        if end - start == 1:
            out, state = gated_delta_step(*part, state)  # type: ignore[arg-type]
        else:
            out, state, _ = chunk_gated_delta_rule(*part, plan_chunks([end - start]), state)  # type: ignore[arg-type]
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(state, final, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("heads", [(3, 3), (2, 4)], ids=str)
def test_step_equals_the_recurrence(heads: tuple[int, int], inplace: bool) -> None:
    """One token of each of five sequences."""
    inputs = make(5, *heads, 8, 6, torch.float64)
    initial = states(5, heads[1], 8, 6, torch.float64)
    expected, final = recurrent_gated_delta_rule(*inputs, list(range(6)), initial)
    given = initial.clone()
    out, state = gated_delta_step(*inputs, given, inplace=inplace)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, final, atol=1e-12, rtol=1e-12)
    assert torch.equal(given, state if inplace else initial)


def test_strong_decay_stays_finite() -> None:
    """Decays whose inverse overflows float32 within a chunk: no quotient of decays is ever formed."""
    q, k, v, g, beta = make(100, 1, 2, 8, 8, torch.float32)
    g = g - 30.0
    out, state, _ = chunk_gated_delta_rule(q, k, v, g, beta, plan_chunks([100]))
    expected, final = recurrent_gated_delta_rule(q, k, v, g, beta, [0, 100])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state, final, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["recurrent", "chunk", "step"])
def test_gradients(form: str) -> None:
    """float64 gradcheck with respect to all five inputs and the initial state, over packed sequences."""
    lengths = {"recurrent": [4, 1, 3], "chunk": [9, 1, 4], "step": [1, 1, 1]}[form]
    inputs = make(sum(lengths), 2, 4, 3, 2, torch.float64)
    initial = states(3, 4, 3, 2, torch.float64)
    starts = starts_of(lengths)
    plan = plan_chunks(lengths, [(0, min(3, lengths[0]))], chunk_size=4)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        if form == "recurrent":
            return recurrent_gated_delta_rule(*args[:5], starts, args[5])
        if form == "step":
            return gated_delta_step(*args)
        out, state, captured = chunk_gated_delta_rule(*args[:5], plan, args[5])
        return out, state, *captured

    args = tuple(x.clone().requires_grad_() for x in (*inputs, initial))
    assert torch.autograd.gradcheck(function, args, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradients_of_chunks_equal_those_of_transformers() -> None:
    """The backward of both through the same loss, in float32, over more than one chunk."""
    inputs = make(150, 2, 4, 12, 10, torch.float32)
    weight = torch.randn(150, 4, 10, generator=torch.Generator().manual_seed(3))
    ours = [x.clone().requires_grad_() for x in inputs]
    (chunk_gated_delta_rule(*ours, plan_chunks([150]))[0] * weight).sum().backward()  # type: ignore[arg-type]
    theirs = [x.clone().requires_grad_() for x in inputs]
    q, k, v, g, beta = (x[None] for x in theirs)
    out, _ = reference.torch_chunk_gated_delta_rule(q * 12**0.5, k, v, g, beta)
    (out[0] * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.abs().max() > 1e-3
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * b.grad.abs().max().item(), rtol=1e-4)


def test_autocast_leaves_it_in_float32() -> None:
    """Products of states would lose what decays slowly; training under autocast must not narrow them."""
    inputs = make(70, 2, 2, 8, 8, torch.float32)
    expected = chunk_gated_delta_rule(*inputs, plan_chunks([70]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state, _ = chunk_gated_delta_rule(*inputs, plan_chunks([70]))
    assert torch.equal(out, expected[0])
    assert torch.equal(state, expected[1])
