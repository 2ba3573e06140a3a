"""Fixtures of the RPC tests: tiny models on disk, and servers on free ports that serve them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.rpc.harness import ServerProcess, Stubs, running_server
from tests.rpc.tiny_tokenizer import save_tiny_tokenizer
from tests.tiny import save_tiny_llama

MODEL = "tiny"
EMBEDDER = "tiny-bert"
CONTEXT = 8192
PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are bytes."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=CONTEXT)
    return save_tiny_tokenizer(directory)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose tokens are bytes, with prefixes for queries and documents."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "bert"
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(directory)
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    return save_tiny_tokenizer(directory)


@pytest.fixture(scope="session")
def model_flags(tiny_llama: Path, tiny_bert: Path) -> list[str]:
    """Flags that serve both tiny models."""
    return ["--model", f"{MODEL}={tiny_llama}", "--model", f"{EMBEDDER}={tiny_bert}"]


@pytest.fixture(scope="session")
def rpc_server(tmp_path_factory: pytest.TempPathFactory, model_flags: list[str]) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as they found it."""
    with running_server(tmp_path_factory.mktemp("server") / "state", *model_flags) as server:
        yield server


@pytest.fixture(scope="session")
def stubs(rpc_server: ServerProcess) -> Iterator[Stubs]:
    """Stubs of the shared server."""
    made = Stubs(rpc_server.address)
    yield made
    made.close()


@pytest.fixture
def start_server(tmp_path: Path, model_flags: list[str]) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own; a second one with the same state directory comes after the first has ended."""
    with ExitStack() as stack:

        def start(*flags: str, models: list[str] | None = None, state: str = "state") -> ServerProcess:
            chosen = model_flags if models is None else models
            return stack.enter_context(running_server(tmp_path / state, *chosen, *flags))

        yield start
