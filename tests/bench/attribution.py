"""Attributes the time of a piece of work on the CPU to kinds of operations.

torch's profiler times torch's operations: each is booked under the part of the engine that called it (norms, rope,
attention …), or by its own name. Our kernels are reached through ctypes, which the profiler does not see, so each call
is marked for it; those of a captured program are timed within the program. What remains of the time of the same work
without a profiler is Python's, and that of everything between: of autograd's nodes, too, what is not an operation or a
kernel. Of some rounds with a profiler and without the fastest are taken, so that a busy neighbour is not booked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

PRODUCTS, ATTENTION, DELTA_RULE = "products", "attention", "delta rule, convolution"
NORMS, ROPE, SAMPLING, OPTIMIZER, LOSS = "norms", "rope", "sampling", "optimizer", "loss"
ELEMENTWISE, PYTHON = "elementwise, copies", "Python and the rest"
GROUPS = (PRODUCTS, ATTENTION, DELTA_RULE, NORMS, ROPE, ELEMENTWISE, LOSS, SAMPLING, OPTIMIZER, PYTHON)

SCOPES: dict[str, tuple[str, ...]] = {
    NORMS: ("engine.ops.norm:rms_norm", "engine.ops.norm:gated_rms_norm"),
    ROPE: ("engine.layers.rope:apply_rope", "engine.layers.rope:RotaryEmbedding.cos_sin"),
    ATTENTION: ("engine.ops.attention:attention",),
    DELTA_RULE: (
        "engine.ops.delta_rule:gated_delta_rule",
        "engine.ops.delta_rule:gated_delta_step_slots",
        "engine.ops.delta_rule:gates",
        "engine.ops.delta_rule_gradient:gated_delta_sequences",
        "engine.ops.causal_conv:causal_conv",
        "engine.ops.causal_conv:causal_conv_sequences",
        "engine.ops.causal_conv:causal_conv_step_slots",
    ),
    SAMPLING: ("engine.sampling.sampler:Sampler.sample",),
    LOSS: ("engine.training.loss:chunked_cross_entropy",),
    OPTIMIZER: ("engine.training.optimizer:Optimizer.step", "engine.training.optimizer:Optimizer.clip"),
}
"""The engine's parts: functions and methods, within which an operation is theirs."""

_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_int_mm",
    "mv",
    "addmv",
    "dot",
    "linear",
    "mkldnn",
    "onednn",
    "_weight_int",
)
_KERNELS = (
    (PRODUCTS, ("linear", "widen", "gather", "product", "low_rank")),
    (ATTENTION, ("attention",)),
    (NORMS, ("norm",)),
    (ROPE, ("rope",)),
    (DELTA_RULE, ("delta", "conv", "recurrent")),
    (SAMPLING, ("choose",)),
    (LOSS, ("likelihood",)),
)
_SCOPE = "whet: "
_KERNEL = "kernel "
_OPERATIONS = ("aten::", "mkldnn::", "onednn::", _KERNEL)
"""How the names of operations begin; other events are autograd's nodes, whose own time is Python's."""


@dataclass(slots=True)
class Attribution:
    """Where the time of one piece of work goes.

    Attributes:
        seconds: of the whole, without a profiler.
        groups: seconds of each of GROUPS; they add up to the whole unless profiled operations took longer than that.
        calls: how many operations each group had.
        top: seconds of single operations and kernels, the longest first.
    """

    seconds: float
    groups: dict[str, float]
    calls: dict[str, int]
    top: list[tuple[str, float]]


def attribute(work: Callable[[], object], *, repeats: int = 1, rounds: int = 3) -> Attribution:
    """Runs the work, without the profiler and under it, so many rounds.

    Args:
        repeats: of the work that ``work`` does.
    """
    seconds, found = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append((time.perf_counter() - began) / repeats)
        found.append(_profiled(work, repeats))
    groups, calls, single = min(found, key=lambda each: sum(each[0].values()))
    shares = {group: groups[group] for group in GROUPS}
    shares[PYTHON] = max(0.0, min(seconds) - sum(shares.values()))
    top = sorted(single.items(), key=lambda pair: -pair[1])
    return Attribution(min(seconds), shares, {group: calls[group] // repeats for group in GROUPS}, top)


def _profiled(work: Callable[[], object], repeats: int) -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """Seconds of each group for one repeat, its operations for all, and seconds of single operations for one."""
    programs: list[tuple[str, float]] = []
    with _scopes(), _marked_kernels(programs), profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    operations = [e for e in profiler.events() if e.name.startswith(_OPERATIONS)]
    taken = [(e.name, _group(e), e.self_cpu_time_total / 1e6) for e in operations]
    taken += [(name, _group_of_kernel(name), seconds) for name, seconds in programs]
    groups, calls, single = defaultdict(float), defaultdict(int), defaultdict(float)
    for name, group, seconds in taken:
        groups[group] += seconds / repeats
        calls[group] += 1
        single[name] += seconds / repeats
    return groups, calls, single


def _group_of_kernel(name: str) -> str:
    return next((group for group, parts in _KERNELS if any(part in name for part in parts)), ELEMENTWISE)


def _group(event: Any) -> str:
    """Of one operation: that of the part of the engine it is within; products are products, but for those of attention
    and the delta rule. Of a kernel it is that of its name."""
    if event.name.startswith(_KERNEL):
        return _group_of_kernel(event.name)
    name = event.name.removeprefix("aten::")
    is_product = name in _PRODUCTS or name.startswith(("mkldnn", "onednn", "_weight_int"))
    scope, above = None, event.cpu_parent
    while above is not None and scope is None:
        if above.name.startswith(_SCOPE):
            scope = above.name.removeprefix(_SCOPE)
        above = above.cpu_parent
    if is_product and scope not in (ATTENTION, DELTA_RULE):
        return PRODUCTS
    if scope is not None:
        return scope
    if "scaled_dot_product" in name or "flash_attention" in name:
        return ATTENTION
    return NORMS if "norm" in name and "linalg" not in name else ELEMENTWISE


@contextlib.contextmanager
def _scopes() -> Iterator[None]:
    """Marks the engine's parts for the profiler, wherever they were imported to."""
    with contextlib.ExitStack() as stack:
        for group, places in SCOPES.items():
            for place in places:
                module, _, name = place.partition(":")
                owner: Any = importlib.import_module(module)
                *outer, last = name.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                original = getattr(owner, last)
                marked = _marked(original, _SCOPE + group)
                stack.enter_context(_replaced(owner, last, marked))
                if not outer:
                    for other in _engine_modules():
                        for alias, value in list(vars(other).items()):
                            if value is original:
                                stack.enter_context(_replaced(other, alias, marked))
        yield


def _marked(function: Callable[..., Any], scope: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(scope):
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def _marked_kernels(programs: list[tuple[str, float]]) -> Iterator[None]:
    """Marks every function of a shared library that the engine's modules hold, or reach through one that they hold.

    Args:
        programs: gets the kernels of programs with their seconds.
    """
    with contextlib.ExitStack() as stack:
        for module in _engine_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, ctypes.CDLL):
                    stack.enter_context(_replaced(module, name, _MarkedLibrary(value, module, programs)))
                elif isinstance(value, ctypes._CFuncPtr):  # type: ignore[attr-defined]
                    stack.enter_context(_replaced(module, name, _marked_kernel(value, module)))
        yield


def _marked_kernel(function: Any, module: Any) -> Callable[..., Any]:
    """A kernel that is marked with its name, or one that runs others by their index into the module's KINDS."""
    name = function.__name__.removeprefix("whet_cpu_")
    kinds = getattr(module, "KINDS", None)

    def run(*args: Any) -> Any:
        with record_function(_KERNEL + (kinds[args[0]] if name == "call" and kinds else name)):
            return function(*args)

    return run


class _MarkedLibrary:
    """A shared library of a module, whose functions are marked and whose programs are timed."""

    def __init__(self, library: ctypes.CDLL, module: Any, programs: list[tuple[str, float]]) -> None:
        self._library, self._module, self._programs = library, module, programs

    def __getattr__(self, name: str) -> Any:
        if name == "whet_cpu_run":
            return self._run_timed
        function = _marked_kernel(getattr(self._library, name), self._module)
        setattr(self, name, function)
        return function

    def _run_timed(self, address: int, count: int) -> int:
        nanoseconds = (ctypes.c_int64 * count)()
        status: int = self._library.whet_cpu_run_timed(address, count, ctypes.addressof(nanoseconds))
        kinds = (self._module.KINDS[op.kind] for op in (self._module.Op * count).from_address(address))
        self._programs += [(_KERNEL + kind, taken / 1e9) for kind, taken in zip(kinds, nanoseconds, strict=True)]
        return status


def _engine_modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("engine.") and module is not None]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
