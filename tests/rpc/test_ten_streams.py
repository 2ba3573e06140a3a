"""Ten streams at once, of different settings, adapters and fates, give exactly what each gives alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rpc.conftest import MODEL
from tests.rpc.harness import ServerProcess
from whet import Client

ADAPTERS = ("ten-a", "ten-b")

STREAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 40},
    {"temperature": 0.0, "max_tokens": 40, "adapter": "ten-a"},
    {"temperature": 0.0, "max_tokens": 40, "adapter": "ten-b"},
    {"temperature": 0.0, "max_tokens": 24, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"temperature": 0.0, "max_tokens": 24, "adapter": "ten-a", "logit_bias": {65: 3.0}, "frequency_penalty": 0.4},
    {"temperature": 0.9, "seed": 11, "top_k": 30, "max_tokens": 40},
    {"temperature": 1.1, "seed": 12, "top_p": 0.8, "min_p": 0.02, "max_tokens": 40, "adapter": "ten-b"},
    {"temperature": 0.0, "max_tokens": 40, "n": 2},
    {"temperature": 0.0, "max_tokens": 300, "cancel_after": 5},
    {"temperature": 0.0, "max_tokens": 300, "adapter": "ten-b", "cancel_after": 9},
]


@pytest.fixture(scope="module")
def client(rpc_server: ServerProcess, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client of a server that has two adapters with weights of their own, made by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    made = Client(rpc_server.address)
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        directory = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(directory)
        made.import_adapter(name, model=MODEL, directory=directory)
    return made


def run(client: Client, number: int, salt: str) -> dict[int, list[int]]:
    """Token ids by completion; of a cancelled stream as many as it was read for."""
    options = dict(STREAMS[number])
    limit = options.pop("cancel_after", None)
    tokens: dict[int, list[int]] = {}
    prompt = f"Stream {number}: " + "once upon a time " * (number + 1)
    with client.generate(prompt, model=MODEL, ignore_eos=True, cache_salt=salt, **options) as stream:
        for chunk in stream:
            tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
            if limit is not None and len(tokens[0]) >= limit:
                break
    return {index: ids[:limit] for index, ids in tokens.items()}


def test_ten_streams_equal_each_alone(client: Client) -> None:
    """Greedy and seeded, base and adapters, one and several completions, some cancelled on the way; three times over,
    the last two with prefixes that earlier ones left in the cache."""
    alone = [run(client, number, "alone") for number in range(len(STREAMS))]
    assert alone[0] != alone[1] != alone[2]
    for salt in ("together", "together", "alone"):
        barrier = threading.Barrier(len(STREAMS))

        def start(number: int, salt: str = salt, barrier: threading.Barrier = barrier) -> dict[int, list[int]]:
            barrier.wait()
            return run(client, number, salt)

        with ThreadPoolExecutor(len(STREAMS)) as executor:
            together = list(executor.map(start, range(len(STREAMS))))
        assert together == alone
