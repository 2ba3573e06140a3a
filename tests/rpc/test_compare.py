"""Base and adapters side by side through the SDK: the answers of separate calls, and shared prefixes where equal
weights act."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.rpc.conftest import MODEL
from tests.rpc.harness import ServerProcess
from whet import AsyncClient, Client, InvalidArgumentError, NotFoundError
from whet.cli.commands import cli

OPTIONS: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(rpc_server: ServerProcess, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server with "ab-fresh", whose B are zero, and "ab-tone" in two versions and once more as
    "ab-copy"."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    def save(seed: int, std: float) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
        directory = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(directory)
        return directory

    first = save(1, 0.3)
    with Client(rpc_server.address) as made:
        for name, directory in (
            ("ab-fresh", save(0, 0.0)), ("ab-tone", first), ("ab-copy", first), ("ab-tone", save(2, 0.3))
        ):  # fmt: skip
            made.import_adapter(name, model=MODEL, directory=directory)
        yield made


def test_side_by_side_is_one_by_one(client: Client, rpc_server: ServerProcess) -> None:
    """Each reply is that of a call of its own. What the same weights have computed is found: the base's by an adapter
    that does nothing, a version's under its other name, each within the one comparison."""
    prompt = "Side by side, once upon a time, there was a comparison of many words. " * 2  # no other test's begins so
    replies = client.compare(
        prompt, model=MODEL, adapters=[None, "ab-fresh", ("ab-tone", 1), "ab-copy", "ab-tone"], **OPTIONS
    )
    cached = [reply.usage.cached_prompt_tokens for reply in replies]
    whole = (len(prompt) - 1) // 16 * 16
    # Of each pair, whichever arrived first computed the prompt.
    assert [sorted(cached[:2]), sorted(cached[2:4]), cached[4]] == [[0, whole], [0, whole], 0]
    assert [reply.adapter_version for reply in replies] == [None, 1, 1, 1, 2]
    texts = [reply.text for reply in replies]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert len(set(texts)) == 3
    salt = {"cache_salt": "alone"}
    for text, choice in zip(
        texts, [{}, {"adapter": "ab-fresh"}, {"adapter": "ab-tone", "adapter_version": 1}, {"adapter": "ab-copy"},
                {"adapter": "ab-tone"}], strict=True
    ):  # fmt: skip
        assert client.complete(prompt, model=MODEL, **OPTIONS, **salt, **choice).text == text

    async def compare() -> list[str]:
        async with AsyncClient(rpc_server.address) as aio:
            replies = await aio.compare(prompt, model=MODEL, adapters=[None, ("ab-tone", None)], **OPTIONS)
            return [reply.text for reply in replies]

    assert asyncio.run(compare()) == [texts[0], texts[4]]


def test_one_failure_ends_the_comparison(client: Client) -> None:
    """An adapter that is not there fails it, as does what is no choice of an adapter; the server goes on."""
    with pytest.raises(NotFoundError, match="ab-nobody"):
        client.compare("x", model=MODEL, adapters=[None, "ab-nobody"], **OPTIONS)
    for adapters in ([], "ab-tone", [3], [("ab-tone", "1")]):
        with pytest.raises(InvalidArgumentError, match="adapters"):
            client.compare("x", model=MODEL, adapters=adapters, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="adapter is 'ab-tone'; accepted: none"):
        client.compare("x", model=MODEL, adapters=[None], adapter="ab-tone", **OPTIONS)
    assert client.compare("x", model=MODEL, adapters=["ab-tone"], **OPTIONS)[0].usage.completion_tokens == 12


def test_the_command(client: Client, rpc_server: ServerProcess) -> None:
    """``whet compare``: one answer after the other, with the version that gave it."""
    options = ["--server", rpc_server.address, "--max-tokens", "4", "--temperature", "0"]
    done = CliRunner().invoke(cli, ["compare", "Once", "-m", MODEL, "-a", "ab-tone:1", "-a", "ab-tone", *options])
    assert done.exit_code == 0, done.output
    heads = [line for line in done.output.splitlines() if line.startswith("--- ")]
    assert heads == ["--- base (length)", "--- ab-tone version 1 (length)", "--- ab-tone version 2 (length)"]
    for arguments in (["-a", "ab-tone:x"], ["-a", "ab-tone:"], ["-a", ":1"], ["--no-base"]):
        assert CliRunner().invoke(cli, ["compare", "Once", "-m", MODEL, *arguments, *options]).exit_code == 2
