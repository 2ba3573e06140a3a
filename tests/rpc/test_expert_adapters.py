"""Adapters of routed experts through the SDK: trained, described, exported, imported, served, adapted online."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import whet
from tests.rpc.harness import ServerProcess
from tests.rpc.tiny_tokenizer import save_tiny_tokenizer
from tests.tiny import save_tiny_hybrid

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXAMPLES = [{"prompt": f"say {i}", "completion": " one two three"} for i in range(4)]


def test_from_training_to_an_imported_copy(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """What is asked for is what the events, the run and the adapter tell; the files of the export serve the same
    tokens; what the model does not have, and dropout, are refused by name."""
    moe = save_tiny_tokenizer(save_tiny_hybrid(tmp_path / "moe", experts=True, max_position_embeddings=512))
    server = start_server(models=["--model", f"moe={moe}"])
    with whet.Client(server.address) as client:
        assert client.model("moe").expert_parameters == [DOWN, GATE_UP]
        for options, message in (
            ({"target_parameters": ["mlp.experts.up_proj"]}, f"accepted: {DOWN}, {GATE_UP}"),
            ({"target_parameters": [DOWN], "dropout": 0.1}, "0 with target_parameters"),
            ({"target_parameters": [DOWN, DOWN]}, "each name once"),
        ):
            with pytest.raises(whet.InvalidArgumentError, match=message):
                list(client.train(EXAMPLES, model="moe", adapter="bad", max_steps=1, **options))
        chosen = {"target_modules": ["out_proj"], "target_parameters": [GATE_UP, DOWN]}
        run = client.train(
            EXAMPLES, model="moe", adapter="tone", rank=2, max_steps=3, learning_rate=0.05, publish="last", **chosen
        )
        events = {event.kind: event for event in run}
        started = events["run_started"]
        assert isinstance(started, whet.events.RunStarted)
        assert (started.target_modules, started.target_parameters) == (["out_proj"], [DOWN, GATE_UP])
        assert "finished" in events
        [archived] = client.runs()
        assert archived.config["target_parameters"] == [GATE_UP, DOWN]
        trained = client.adapter("tone", model="moe")
        assert (trained.target_modules, trained.target_parameters) == (["out_proj"], [DOWN, GATE_UP])
        # Of each of 4 layers: 6 experts of width 32 over a hidden size of 64; and out_proj of the 3 delta-nets.
        assert trained.num_parameters == 4 * 6 * 2 * ((64 + 64) + (32 + 64)) + 3 * 2 * (64 + 64)
        assert started.num_trainable_parameters == trained.num_parameters
        client.export_adapter("tone", model="moe", directory=tmp_path / "export")
        copy = client.import_adapter("copy", model="moe", directory=tmp_path / "export")
        assert copy.target_parameters == trained.target_parameters
        assert copy.num_parameters == trained.num_parameters
        replies = {
            name: client.complete("say 1", model="moe", adapter=name, max_tokens=8, temperature=0.0).token_ids
            for name in ("tone", "copy", None)
        }
        assert replies["tone"] == replies["copy"] != replies[None]
        adapted = client.adapt(EXAMPLES[:1], model="moe", adapter="tone", learning_rate=0.01)
        assert adapted.version == trained.version + 1
