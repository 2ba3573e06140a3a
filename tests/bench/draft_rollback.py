"""What rejected drafts cost a recurrent layer: three ways to go back to a state before them.

    snapshot    the step keeps the state before the first draft on its way; accepted drafts are computed again
    copy        the slot is copied aside before the step; all that the step computed is computed again, so that
                rejections in a row add up
    checkpoint  nothing is kept; back to the last block boundary, which every way keeps

One sequence has 4 drafts a step, each right with chance 0.7; the same 40 steps for all. What is computed again runs
beside the next step's tokens, so its cost is that of more rows. A layer is a delta-net layer with its MLP, at the tiny
test model's shape and at Qwen3.5-0.8B's. The ways take turns; times are of the processor, as neighbours disturb a
clock. The last line is JSON: milliseconds per layer for all steps (median), each way's ratio to the snapshot, rows.

    python -m tests.bench.draft_rollback
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from engine.context import RecurrentStates, StateSave
from engine.core.batch import pack
from engine.core.memory import make_cache, make_states
from engine.loading import load_weights, open_checkpoint
from engine.models.base import build_model
from engine.quantization.base import scheme_map
from tests.tiny import save_tiny_hybrid

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "0.8b": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}  # fmt: skip
DRAFTS, RIGHT, BLOCK, STEPS = 4, 0.7, 16, 40
WAYS = ("snapshot", "copy", "checkpoint")


def plan(way: str) -> list[tuple[int, int, bool]]:
    """Per step: rows, of them known tokens, and whether it is rolled back."""
    rng = random.Random(0)
    state, known, steps = 20, 21, []
    for _ in range(STEPS):
        accepted = next((i for i in range(DRAFTS) if rng.random() > RIGHT), DRAFTS)
        steps.append((known - state + DRAFTS, known - state, accepted < DRAFTS))
        if accepted == DRAFTS:
            state = known + DRAFTS
        elif way == "snapshot":
            state = known
        elif way == "checkpoint":
            state = (known + accepted) // BLOCK * BLOCK
        known += accepted + 1
    return steps


def measure(overrides: dict[str, Any], repeats: int) -> dict[str, float]:
    """Milliseconds per layer of each way."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
        checkpoint = open_checkpoint(save_tiny_hybrid(Path(folder) / "model", **(overrides | kinds)))
        config = checkpoint.config
        model = build_model(config, scheme_map(None), torch.float32)
        load_weights(model, checkpoint, torch.float32, torch.device("cpu"))
        layer: Any = model.eval().model.layers[0]  # type: ignore[union-attr, index]
        device = torch.device("cpu")
        states: RecurrentStates = make_states(config, 1, 4, device)
        cache = make_cache(config, 0, 64, BLOCK, device, torch.float32)

        def run(way: str, steps: list[tuple[int, int, bool]]) -> None:
            for rows, known, rolled_back in steps:
                if way == "copy":
                    states.copy(1, 2)
                saves = [StateSave(0, known, 2)] if way == "snapshot" else []
                _, ctx = pack(
                    [[3] * rows], [20], [list(range(1, 40))], [None], cache, device,
                    states=states, state_slots=[1], state_saves=saves,
                )  # fmt: skip
                x = inputs[:rows]
                layer(x, ctx, x, x)
                if rolled_back:
                    states.copy(2, 1)

        inputs = torch.randn(400, config.hidden_size)
        steps = {way: plan(way) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with torch.inference_mode():
            for _ in range(repeats + 1):
                for way in WAYS:
                    begin = time.process_time()
                    run(way, steps[way])
                    seconds[way].append(time.process_time() - begin)
    return {way: 1e3 * statistics.median(times[1:]) for way, times in seconds.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {way: sum(step[0] for step in plan(way)) for way in WAYS}
    figures: dict[str, Any] = {"bench": "draft_rollback", "rows": rows}
    for shape, overrides in SHAPES.items():
        measured = measure(overrides, arguments.repeats)
        ratios = {f"{way}_ratio": round(value / measured["snapshot"], 3) for way, value in measured.items()}
        figures[shape] = {f"{way}_ms": round(value, 1) for way, value in measured.items()} | ratios
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
