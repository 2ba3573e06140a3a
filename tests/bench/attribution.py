"""Attributes the time of a piece of work on the CPU to kinds of operations.

torch's profiler times torch's operations: each is booked under the part of the engine that called it (norms, rope,
attention …), or by its own name. Our kernels are reached through ctypes, which the profiler does not see; they are
timed on the way. What remains of the time of the same work without a profiler is Python's, and that of everything
between.
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
    (PRODUCTS, ("linear", "widen", "gather")),
    (ATTENTION, ("attention",)),
    (NORMS, ("norm",)),
    (ROPE, ("rope",)),
    (DELTA_RULE, ("delta", "conv", "recurrent")),
    (SAMPLING, ("likeliest",)),
)
_SCOPE = "whet: "


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


def attribute(work: Callable[[], object], *, seconds: float, repeats: int = 1) -> Attribution:
    """Runs the work under the profiler.

    Args:
        seconds: that one repetition takes without.
        repeats: of the work that ``work`` does.
    """
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    with _scopes(), _timed_kernels(kernels), profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    groups, calls, single = defaultdict(float), defaultdict(int), defaultdict(float)
    for event in profiler.events():
        if event.name.startswith(_SCOPE):
            continue
        group, taken = _group(event), event.self_cpu_time_total / 1e6
        groups[group] += taken
        calls[group] += 1
        single[event.name] += taken
    for name, (count, taken) in kernels.items():
        group = next((group for group, parts in _KERNELS if any(part in name for part in parts)), ELEMENTWISE)
        groups[group] += taken
        calls[group] += int(count)
        single[f"kernel {name}"] += taken
    shares = {group: groups[group] / repeats for group in GROUPS}
    shares[PYTHON] = max(0.0, seconds - sum(shares.values()))
    top = sorted(((name, taken / repeats) for name, taken in single.items()), key=lambda pair: -pair[1])
    return Attribution(seconds, shares, {group: calls[group] // repeats for group in GROUPS}, top)


def _group(event: Any) -> str:
    """Of one operation of torch: that of the part of the engine it is within; products are products, but for those of
    attention and the delta rule."""
    name = event.name.removeprefix("aten::")
    is_product = name.split("_backward")[0] in _PRODUCTS or name.startswith(("mkldnn", "onednn", "_weight_int"))
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
def _timed_kernels(found: dict[str, list[float]]) -> Iterator[None]:
    """Times every function of a shared library that the engine's modules hold, or reach through one that they hold."""
    with contextlib.ExitStack() as stack:
        for module in _engine_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, ctypes.CDLL):
                    stack.enter_context(_replaced(module, name, _TimedLibrary(value, module, found)))
                elif isinstance(value, ctypes._CFuncPtr):  # type: ignore[attr-defined]
                    stack.enter_context(_replaced(module, name, _timed(value, module, found)))
        yield


def _timed(function: Any, module: Any, found: dict[str, list[float]]) -> Callable[..., Any]:
    """A kernel that is timed under its name, or one that runs others by their index into the module's KINDS."""
    name = function.__name__.removeprefix("whet_cpu_")
    kinds = getattr(module, "KINDS", None)

    def run(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        entry = found[f"{kinds[args[0]]}" if name == "call" and kinds else name]
        entry[0] += 1
        entry[1] += time.perf_counter() - began
        return result

    return run


class _TimedLibrary:
    """A shared library of a module, whose functions are timed; a program of operations is run one by one for that."""

    def __init__(self, library: ctypes.CDLL, module: Any, found: dict[str, list[float]]) -> None:
        self._library, self._module, self._found = library, module, found

    def __getattr__(self, name: str) -> Any:
        if name == "whet_cpu_run":
            return self._run_one_by_one
        function = _timed(getattr(self._library, name), self._module, self._found)
        setattr(self, name, function)
        return function

    def _run_one_by_one(self, address: int, count: int) -> int:
        statuses = (self.whet_cpu_call(op.kind, op.args) for op in (self._module.Op * count).from_address(address))
        return next((status for status in statuses if status != 0), 0)


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
