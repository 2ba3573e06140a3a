"""The base and adapters side by side: one base product for all, prefixes shared where the same weights act, and only
there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.lora.adapter import Adapter
from engine.lora.peft import save_adapter
from engine.quantization.base import UNQUANTIZED
from engine.request import Request
from tests.engine.test_generate import GREEDY, collect, make_engine, prompt, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = prompt(80, 30)


def adapter_of(engine: Engine, name: str, seed: int, *, scale: float = 0.2) -> Adapter:
    """Over every linear; with scale 0, all B are zero."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, linear in engine._models["tiny"].model.linears().items():
        a = torch.randn(3, linear.in_features, generator=generator) * 0.2
        modules[module] = (a, torch.randn(linear.out_features, 3, generator=generator) * scale)
    return Adapter(name=name, version=1, rank=3, alpha=6.0, modules=modules)


def publish(engine: Engine, name: str, seed: int, **options: Any) -> int:
    """The version."""
    return engine._models["tiny"].adapters.publish(adapter_of(engine, name, seed, **options)).version


def ask(name: str, **changes: Any) -> Request:
    sampling = dataclasses.replace(GREEDY, max_tokens=6)
    return Request(request_id=name, model="tiny", prompt_token_ids=PROMPT, sampling=sampling, **changes)


def run(engine: Engine, asked: Request) -> tuple[list[int], int]:
    """Tokens, and prompt tokens that were cached."""
    outputs = collect(engine, [asked])[asked.request_id]
    return tokens(outputs), outputs[-1].num_cached_tokens


def engine_at(path: Path, state: Path, **options: Any) -> Engine:
    return make_engine(path, num_threads=1, state_dir=str(state), **options)


def test_base_products_are_computed_once_per_row(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests of one prompt, of the base and two adapters, run in one forward: each linear multiplies each row
    once, an adapter's low-rank product runs over its own rows alone, once per module, and all get what they get alone.
    """
    engine = engine_at(tiny_llama, tmp_path)
    publish(engine, "x", 1)
    publish(engine, "y", 2)
    asked = [ask("base"), ask("one", adapter="x"), ask("two", adapter="y"), ask("salted", adapter="x", cache_salt="s")]
    alone = {a.request_id: run(engine_at(tiny_llama, tmp_path), a)[0] for a in asked}
    products: Counter[str] = Counter()
    deltas: Counter[tuple[str, str]] = Counter()
    rows: Counter[str] = Counter()
    apply, delta = type(UNQUANTIZED).apply, Adapter.delta

    def counted_apply(self: Any, layer: Any, x: Tensor) -> Tensor:
        products[layer.name] += 1
        rows[layer.name] += len(x)
        return apply(self, layer, x)

    def counted_delta(self: Adapter, name: str, x: Tensor, generator: Any = None) -> Tensor | None:
        deltas[self.name, name] += 1
        rows[self.name] += len(x)
        return delta(self, name, x, generator)

    monkeypatch.setattr(type(UNQUANTIZED), "apply", counted_apply)
    monkeypatch.setattr(Adapter, "delta", counted_delta)
    for request in asked:
        engine.add_request(request)
    outputs: dict[str, list[int]] = {}
    for output in engine.step():
        outputs[output.request_id] = list(output.token_ids)
    linears = engine._models["tiny"].model.linears()
    assert {products[name] for name in linears} == {1}
    assert {rows[name] for name in linears} == {4 * len(PROMPT)}
    assert deltas == {(adapter, name): 1 for adapter in "xy" for name in linears}
    assert (rows["x"], rows["y"]) == (2 * len(PROMPT) * len(linears), len(PROMPT) * len(linears))
    while engine.has_requests():
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    assert outputs == alone
    assert len({tuple(o) for o in outputs.values()}) == 3, "adapters that change nothing prove nothing"


def test_equal_weights_share_prefixes_whatever_their_names(tiny_model: Path, tmp_path: Path) -> None:
    """An adapter whose B are all zero is the base; one version under two names is one. A hit changes no token."""
    engine = engine_at(tiny_model, tmp_path)
    publish(engine, "fresh", 1, scale=0.0)
    publish(engine, "tone", 2)
    publish(engine, "copy", 2)
    assert publish(engine, "copy", 2) == 2
    base, cached = run(engine, ask("base"))
    assert cached == 0
    assert run(engine, ask("fresh", adapter="fresh")) == (base, 28)
    tuned, cached = run(engine, ask("tone", adapter="tone"))
    assert cached == 0
    assert tuned != base
    assert run(engine, ask("copy", adapter="copy", adapter_version=1)) == (tuned, 28)
    assert run(engine, ask("live", adapter="copy")) == (tuned, 28)
    assert run(engine, ask("again")) == (base, 28)


def test_at_once_the_second_waits_for_what_it_can_share(tiny_model: Path, tmp_path: Path) -> None:
    """Base, a fresh adapter and a trained one are asked the same in one step; two of them compute the prompt."""
    engine = engine_at(tiny_model, tmp_path)
    publish(engine, "fresh", 1, scale=0.0)
    publish(engine, "tone", 2)
    outputs = collect(engine, [ask("base"), ask("fresh", adapter="fresh"), ask("tone", adapter="tone")])
    assert {name: o[-1].num_cached_tokens for name, o in outputs.items()} == {"base": 0, "fresh": 28, "tone": 0}
    assert tokens(outputs["base"]) == tokens(outputs["fresh"]) != tokens(outputs["tone"])


def test_an_update_never_meets_a_stale_prefix(tiny_model: Path, tmp_path: Path) -> None:
    """Other weights as a new version, under a version that was deleted and made again, or in a directory that is loaded
    again, compute everything themselves, and give what they give on an engine that knows nothing else."""
    engine = engine_at(tiny_model, tmp_path / "state")

    def fresh(seed: int) -> list[int]:
        other = engine_at(tiny_model, tmp_path / f"fresh{seed}", enable_prefix_caching=False)
        publish(other, "tone", seed)
        return run(other, ask("r", adapter="tone"))[0]

    expected = [fresh(seed) for seed in range(3)]
    assert expected[0] != expected[1] != expected[2]
    publish(engine, "tone", 0)
    assert run(engine, ask("1", adapter="tone")) == (expected[0], 0)
    publish(engine, "tone", 1)
    assert run(engine, ask("2", adapter="tone")) == (expected[1], 0)
    assert run(engine, ask("3", adapter="tone", adapter_version=1)) == (expected[0], 28)
    engine.delete_adapter("tiny", "tone")
    publish(engine, "tone", 2)
    assert run(engine, ask("4", adapter="tone")) == (expected[2], 0)
    directory = tmp_path / "operator"
    directory.mkdir()
    for seed in range(3):
        save_adapter(directory, adapter_of(engine, "path", seed), engine._models["tiny"].model.linears(), base_model="")
        engine.load_adapter("tiny", "path", directory)
        assert run(engine, ask(f"path{seed}", adapter="path")) == (expected[seed], 28), "computed under another name"


def test_digests_go_by_what_acts() -> None:
    """Names, versions, order and modules whose B is zero do not count; any number, scale, type or place does."""

    def made(b: float = 1.0, **changes: Any) -> Adapter:
        module = (torch.ones(1, 2), torch.full((2, 1), b))
        return Adapter(**({"name": "n", "version": 1, "rank": 1, "alpha": 1.0, "modules": {"p": module}} | changes))

    module, idle = (torch.ones(1, 2), torch.ones(2, 1)), (torch.ones(1, 2), torch.zeros(2, 1))
    same = [made(name="m", version=2), made(modules={"q": idle, "p": module}), made(modules={"p": module, "q": idle})]
    assert {a.weights_digest() for a in same} == {made().weights_digest()}
    assert made(0.0).weights_digest() == made(modules={}).weights_digest() == made(alpha=0.0).weights_digest() == b""
    different = [
        made(), made(2.0), made(alpha=2.0), made(alphas={"p": 3.0}), made(modules={"q": module}),
        made(modules={"p": tuple(t.bfloat16() for t in module)}),
        made(modules={"p": (torch.ones(2, 2), torch.ones(2, 2))}),
    ]  # fmt: skip
    assert len({a.weights_digest() for a in different}) == len(different)
    changed = dataclasses.replace(made(), modules={"p": (module[0], module[1] * 5)})
    assert changed.weights_digest() != made().weights_digest(), "a copy with other tensors counts anew"
