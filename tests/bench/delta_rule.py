"""``python -m tests.bench.delta_rule``: the chunked delta rule against transformers', one JSON line a shape.

Both compute the same function of the same inputs in the same run, in turn; numbers are medians of the rounds. A ratio
above 1 means faster than transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from engine.ops.delta_rule import chunk_gated_delta_rule, l2_normalize, plan_chunks

SHAPES = [(512, 16, 16, 128), (2048, 16, 16, 128), (2048, 16, 32, 128)]
"""Tokens, key heads, value heads, width of a head: those of the published sizes."""

QUICK = [(70, 2, 4, 8)]


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(num_tokens: int, key_heads: int, value_heads: int, width: int, rounds: int) -> None:
    """Forward alone, and forward with backward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (l2_normalize(normal(num_tokens, key_heads, width)) for _ in range(2))
    v = normal(num_tokens, value_heads, width)
    g, beta = -normal(num_tokens, value_heads).exp() * 0.1, normal(num_tokens, value_heads).sigmoid()
    plan = plan_chunks([num_tokens])

    def ours(*inputs: Tensor) -> Tensor:
        query, *others = inputs
        return chunk_gated_delta_rule(query * width**-0.5, *others, plan)[0]  # type: ignore[arg-type]

    def theirs(*inputs: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(*(x[None] for x in inputs))[0][0]  # type: ignore[no-any-return]

    inputs = (q, k, v, g, beta)

    def forward(function: Callable[..., Tensor]) -> None:
        with torch.inference_mode():
            function(*inputs)

    def training(function: Callable[..., Tensor]) -> None:
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves).square().sum().backward()  # type: ignore[no-untyped-call]

    for name, run in (("forward", forward), ("training", training)):
        for function in (ours, theirs):
            run(function)
        times = [(seconds(lambda r=run: r(ours)), seconds(lambda r=run: r(theirs))) for _ in range(rounds)]  # type: ignore[misc]
        mine, other = (statistics.median(column) for column in zip(*times, strict=True))
        line = {
            "measure": f"delta_rule_{name}",
            "tokens": num_tokens,
            "key_heads": key_heads,
            "value_heads": value_heads,
            "width": width,
            "threads": torch.get_num_threads(),
            "tokens_per_second": num_tokens / mine,
            "transformers": num_tokens / other,
            "ratio": other / mine,
        }
        print(json.dumps(line))


def main(arguments: list[str] | None = None) -> None:
    """Measures every shape."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.delta_rule", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny shape: shows that the measure works")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for shape in QUICK if options.quick else SHAPES:
        measure(*shape, rounds=options.rounds)


if __name__ == "__main__":
    main()
