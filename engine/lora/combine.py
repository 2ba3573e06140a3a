"""Several adapters made into one.

Two ways, both PEFT's (``LoraModel.add_weighted_adapter``). With weights w_i and scalings s_i:

"cat"     the factors side by side: A = [w_1 s_1 A_1; w_2 s_2 A_2; …], B = [B_1, B_2, …]. Its product is the weighted
          sum of the updates, exactly; the rank is the sum of the ranks.
"linear"  A = sum sqrt(w_i s_i) A_i, B = sum sqrt(w_i s_i) B_i, the sign of w_i going to A. Its product has mixed terms
          B_i A_j, so it is no sum of the updates; the ranks must be equal, and stay.

The result's scaling is 1. A module that only some of the adapters have is made from theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import InvalidArgumentError
from engine.info import AdapterInfo, AdapterSource
from engine.jobs import MAX_SOURCES, WeightedAdapter
from engine.lora.adapter import Adapter
from engine.lora.peft_config import MAX_RANK
from engine.lora.store import AdapterStore
from engine.names import validate_name

METHODS = ("cat", "linear")

Weighted = Sequence[tuple[Adapter, float]]


def combine_adapters(
    store: AdapterStore,
    name: str,
    sources: Sequence[WeightedAdapter],
    method: str = "cat",
    *,
    force: bool = False,
    max_rank: int = MAX_RANK,
) -> AdapterInfo:
    """Combines adapters into the next version of ``name``, live.

    Args:
        force: also take adapters of other base weights.
        max_rank: of the result, in any module.
    Raises:
        InvalidArgumentError: naming the source and its value; or the ranks differ, or are too high together.
        NotFoundError: there is no such adapter or version.
        FailedPreconditionError: one belongs to other base weights, or there is no directory to store the result in.
    """
    validate_name(name, "name")
    read = read_weighted(store, sources, force=force)
    combined = combine(name, read, method, max_rank=max_rank)
    named = [AdapterSource(name=a.name, version=a.version, weight=weight) for a, weight in read]
    forced = any(store.info(a.name, a.version).forced or store.is_of_other_base(a.name, a.version) for a, _ in read)
    return store.publish(combined, sources=named, combination=method, forced=forced)


def read_weighted(
    store: AdapterStore, sources: Sequence[WeightedAdapter], *, force: bool = False
) -> list[tuple[Adapter, float]]:
    """The adapters that are meant, as stored, with their weights.

    Raises: see combine_adapters.
    """
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise InvalidArgumentError(
            f"sources has {len(sources)} adapters; accepted: 1 to {MAX_SOURCES}", field="sources"
        )
    for index, source in enumerate(sources):
        field = f"sources[{index}]"
        if not math.isfinite(source.weight):
            raise InvalidArgumentError(
                f"{field}.weight is {source.weight}; accepted: a finite number", field=f"{field}.weight"
            )
        validate_name(source.name, f"{field}.adapter.name")
    return [(store.read_exact(source.name, source.version, force=force), source.weight) for source in sources]


def combine(name: str, adapters: Weighted, method: str, *, max_rank: int = MAX_RANK) -> Adapter:
    """One adapter of several; see the module.

    Raises:
        InvalidArgumentError: the method is unknown, "linear" was given ranks that differ, the ranks are too high
            together, or the weights lead beyond float32.
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"method is {method!r}; accepted: {', '.join(METHODS)}", field="method")
    modules = {}
    # In the order of the first adapter's modules, then of what the others add.
    for module in dict.fromkeys(module for adapter, _ in adapters for module in adapter.modules):
        having = [(adapter, weight) for adapter, weight in adapters if module in adapter.modules]
        modules[module] = _cat(module, having, max_rank) if method == "cat" else _linear(module, having)
        if not all(bool(torch.isfinite(factor).all()) for factor in modules[module]):
            weights = ", ".join(f"{weight:g}" for _, weight in having)
            raise InvalidArgumentError(
                f"sources have weights {weights}, with which {module} has values that float32 does not hold; accepted: "
                "weights nearer to 0",
                field="sources",
            )
    ranks = {module: a.shape[-2] for module, (a, _) in modules.items()}
    rank = max(ranks.values())
    # alpha / rank is 1 in every module, whatever its rank.
    alphas = {module: float(own) for module, own in ranks.items() if own != rank}
    return Adapter(name=name, version=0, rank=rank, alpha=float(rank), modules=modules, alphas=alphas)


def _cat(module: str, adapters: Weighted, max_rank: int) -> tuple[Tensor, Tensor]:
    # From the back, since the factors of stacked experts have a dimension before these.
    a = torch.cat(
        [adapter.modules[module][0] * (weight * adapter.scaling(module)) for adapter, weight in adapters], dim=-2
    )
    if a.shape[-2] > max_rank:
        raise InvalidArgumentError(
            f"sources have ranks {_ranks(module, adapters)} in {module}, together {a.shape[-2]}; accepted: at most "
            f"{max_rank}",
            field="sources",
            reason="LIMIT_EXCEEDED",
        )
    return a, torch.cat([adapter.modules[module][1] for adapter, _ in adapters], dim=-1)


def _linear(module: str, adapters: Weighted) -> tuple[Tensor, Tensor]:
    if len({adapter.rank_of(module) for adapter, _ in adapters}) > 1:
        raise InvalidArgumentError(
            f"sources have ranks {_ranks(module, adapters)} in {module}; accepted with method linear: equal ones, or "
            "method cat",
            field="sources",
        )
    a, b = (torch.zeros_like(factor) for factor in adapters[0][0].modules[module])
    for adapter, weight in adapters:
        scaled = weight * adapter.scaling(module)
        root = math.sqrt(abs(scaled))
        a += math.copysign(root, scaled) * adapter.modules[module][0]
        b += root * adapter.modules[module][1]
    return a, b


def _ranks(module: str, adapters: Weighted) -> str:
    return ", ".join(str(adapter.rank_of(module)) for adapter, _ in adapters)
