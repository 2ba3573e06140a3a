"""The adapter of flash-linear-attention: how sequences are cut, packed and put together again, and what it is given."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import backends, flash_linear_attention
from engine.ops.delta_rule import l2_normalize, plan_delta_rule, recurrent_gated_delta_rule
from engine.ops.flash_linear_attention import FlaPlan, plan_fla
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
HAS_FLA = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None


def by_its_documentation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the package's function is documented to compute, by our recurrence in float64."""
    assert q.shape[0] == 1
    assert use_qk_l2norm_in_kernel
    assert output_final_state
    assert scale is not None
    assert cu_seqlens is not None
    assert cu_seqlens_cpu is not None
    assert torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
    assert cu_seqlens_cpu[-1] == q.shape[1]
    assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
    assert all(x.is_contiguous() for x in (q, k, v, g, beta))
    inputs = [x[0].double() for x in (l2_normalize(q.double()) * scale, l2_normalize(k.double()), v, g, beta)]
    before = None if initial_state is None else initial_state.double()
    out, after = recurrent_gated_delta_rule(*inputs, cu_seqlens_cpu.tolist(), before)  # type: ignore[arg-type]
    return out[None].to(v.dtype), after.float()


@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize(
    ("lengths", "captures"),
    [
        ([6], []),
        ([6], [(0, 4)]),
        ([3, 9, 1], []),
        ([3, 9, 1], [(1, 4), (1, 8), (0, 3), (2, 1)]),
        ([5, 7, 8], [(2, 1), (1, 6), (2, 1)]),
    ],
    ids=str,
)
def test_cut_and_packed(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], captures: list[tuple[int, int]], with_past: bool
) -> None:
    """Outputs, last states and states on the way are those of whole sequences, wherever they are cut."""
    monkeypatch.setattr(flash_linear_attention, "load", lambda: by_its_documentation)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total = sum(lengths)
    q, k, v = normal(total, 2, 4), normal(total, 2, 4), normal(total, 4, 3)
    g, beta = -normal(total, 4).exp(), normal(total, 4).sigmoid()
    initial = normal(len(lengths), 4, 4, 3) if with_past else None
    out, after, captured = plan_fla(lengths, captures, CPU).run(q, k, v, g, beta, initial)
    starts = [0, *itertools.accumulate(lengths)]
    normalised = (l2_normalize(q) * 4**-0.5, l2_normalize(k), v, g, beta)
    expected, states = recurrent_gated_delta_rule(*normalised, starts, initial)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, states)
    assert len(captured) == len(captures)
    for (s, n), got in zip(captures, captured, strict=True):
        part = [x[starts[s] : starts[s] + n] for x in normalised]
        before = None if initial is None else initial[s : s + 1]
        torch.testing.assert_close(got, recurrent_gated_delta_rule(*part, [0, n], before)[1][0])  # type: ignore[arg-type]


def test_what_it_is_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow types on devices that it may run on; float32 stays in torch, whose products are not narrowed."""
    monkeypatch.setattr(flash_linear_attention, "load", lambda: by_its_documentation)
    narrow, wide = torch.zeros(4, 2, dtype=torch.bfloat16), torch.zeros(4, 2)
    assert not isinstance(plan_delta_rule([4], (), narrow, 128), FlaPlan), "the CPU is not its device"
    assert backends.implementations(CPU)["delta_rule.chunk"] == "torch"
    with backends.allow(device_types=("cpu",)):
        assert isinstance(plan_delta_rule([4], (), narrow, 128), FlaPlan)
        assert not isinstance(plan_delta_rule([4], (), narrow, 512), FlaPlan), "wider than it takes"
        assert not isinstance(plan_delta_rule([4], (), wide, 128), FlaPlan)
        assert backends.implementations(CPU)["delta_rule.chunk"] == "flash-linear-attention"
        with backends.allow(fla=False):
            assert not isinstance(plan_delta_rule([4], (), narrow, 128), FlaPlan)


def test_a_package_of_no_use_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One that is too old or cannot be imported leaves the torch form in place, with a word in the log."""

    class Old:
        __version__ = "0.4.2"
        chunk_gated_delta_rule: Callable[..., Any] = by_its_documentation

    def broken(name: str) -> Any:
        raise AttributeError("module 'triton.language' has no attribute 'x'")

    load = flash_linear_attention.load.__wrapped__
    monkeypatch.setattr(flash_linear_attention.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(flash_linear_attention.importlib, "import_module", lambda name: Old)
    assert load() is None
    monkeypatch.setattr(Old, "__version__", "0.5.0")
    assert load() is not None
    monkeypatch.setattr(flash_linear_attention.importlib, "import_module", broken)
    assert load() is None
    assert ["too old" in r.message or "cannot be imported" in r.message for r in caplog.records] == [True, True]


@pytest.mark.skipif(not HAS_FLA, reason="the packages fla-core and triton are not both installed")
def test_the_package_takes_what_it_is_given() -> None:
    """Every parameter that the adapter names is one of the installed function's."""
    function = flash_linear_attention.load()
    assert function is not None
    given = set(inspect.signature(by_its_documentation).parameters)
    assert given <= set(inspect.signature(function).parameters)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FLA, reason="the packages fla-core and triton are not both installed")
def test_the_package_in_the_interpreter() -> None:
    """The package's own kernels, forward and backward, on the CPU: they give our reference through our adapter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    checks = ["kernels.chunks_by_fla", "kernels.gradients_by_fla"]
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--interpret", *checks]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 checks, 0 wrong" in done.stdout
    assert "skipped" not in done.stdout
