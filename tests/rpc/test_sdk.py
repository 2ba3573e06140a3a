"""The SDK against a real server: every call that DESIGN shows, once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import whet
from tests.rpc.conftest import CONTEXT, EMBEDDER, MODEL
from tests.rpc.harness import ServerProcess, running_server
from whet import AsyncClient, Client

EXAMPLES = [{"prompt": f"{number} is", "completion": " a number."} for number in range(8)]
TEXT = "It was the best of times, it was the worst of times. " * 4


@pytest.fixture(scope="module")
def client(rpc_server: ServerProcess) -> Iterator[Client]:
    with Client(rpc_server.address) as made:
        yield made


def test_generation(client: Client) -> None:
    chunks = list(client.generate("Once", model=MODEL, max_tokens=8, temperature=0.0, ignore_eos=True))
    reply = client.complete("Once", model=MODEL, max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=True)
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    assert reply.prompt_logprobs is not None
    assert reply.prompt_logprobs[0] is None
    assert len(reply.prompt_logprobs) == len("Once")
    chat = client.complete([{"role": "user", "content": "hi"}], model=MODEL, max_tokens=2, temperature=0.0)
    assert chat.usage.prompt_tokens > 2
    ids = client.complete([5, 6, 7], model=MODEL, max_tokens=2, temperature=0.0)
    assert ids.usage.prompt_tokens == 3


def test_training_and_its_adapter(client: Client, tmp_path: Path) -> None:
    run = client.train(
        EXAMPLES, model=MODEL, adapter="sdk-tone", rank=4, alpha=8, learning_rate=1e-2, batch_size=4, max_steps=5,
        max_seq_len=64, eval_examples=EXAMPLES[:2], eval_every=2,
    )  # fmt: skip
    events = list(run)
    assert events[0].kind == "run_started"
    assert events[-1].kind == "finished"
    losses = [event.loss for event in events if event.kind == "step"]
    assert losses[-1] < losses[0]
    finished = events[-1]
    assert finished.kind == "finished"
    assert finished.base_nll is not None
    assert finished.final_nll is not None
    assert finished.final_nll < finished.base_nll
    assert run.id
    assert client.run(run.id).state == "finished"
    assert run.id in [info.id for info in client.runs()]
    assert [event.kind for event in client.watch(run.id)] == [event.kind for event in events]
    reply = client.complete("3 is", model=MODEL, adapter="sdk-tone", max_tokens=2)
    assert reply.adapter_version == finished.version == 1
    client.export_adapter("sdk-tone", model=MODEL, directory=tmp_path / "out")
    copy = client.import_adapter("sdk-copy", model=MODEL, directory=tmp_path / "out")
    assert copy.rank == 4
    assert {adapter.name for adapter in client.adapters(model=MODEL)} >= {"sdk-tone", "sdk-copy"}
    adapted = client.adapt(EXAMPLES[:2], model=MODEL, adapter="sdk-copy", steps=2, learning_rate=1e-2)
    assert adapted.loss_after < adapted.loss_before
    assert (adapted.version, adapted.kl, adapted.stop_reason) == (2, None, "max_steps")
    bounded = client.adapt(
        EXAMPLES[:2], model=MODEL, adapter="sdk-copy", optimizer="sgd", probe_prompts=["Hello", [5, 6]], max_kl=0.5
    )
    assert bounded.kl is not None
    assert 0.0 < bounded.kl <= 0.5


def test_the_other_jobs(client: Client) -> None:
    result = client.perplexity(TEXT, model=MODEL, window=64, stride=32)
    assert result.num_tokens == len(TEXT) - 1
    embedded = client.embed(["a", "b"], model=EMBEDDER, normalize=True, dimensions=8)
    assert [len(vector) for vector in embedded.vectors] == [8, 8]
    job = client.quantize(model=MODEL, scheme="q4", output="sdk-q4", group_size=32)
    list(job)
    assert job.report.loaded
    assert client.model("sdk-q4").quantization == "q4"
    assert {model.name for model in client.models()} >= {MODEL, EMBEDDER, "sdk-q4"}
    client.unload_model("sdk-q4")
    assert client.load_model("sdk-q4").state == "ready"


def test_errors_are_typed(client: Client) -> None:
    with pytest.raises(whet.NotFoundError) as caught:
        client.complete("x", model="unknown")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert caught.value.request_id
    with pytest.raises(whet.InvalidArgumentError) as refused:
        client.complete("x" * (CONTEXT + 1), model=MODEL)
    assert refused.value.reason == "LIMIT_EXCEEDED"


async def test_asyncio(rpc_server: ServerProcess) -> None:
    async with AsyncClient(rpc_server.address) as client:
        prompts = [f"number {number}" for number in range(4)]

        async def complete(prompt: str) -> str:
            reply = await client.complete(prompt, model=MODEL, max_tokens=8, temperature=0.0)
            return reply.text

        together = await asyncio.gather(*(complete(prompt) for prompt in prompts))
        assert together == [await complete(prompt) for prompt in prompts]


def test_a_token(tmp_path: Path, model_flags: list[str]) -> None:
    with running_server(tmp_path / "state", *model_flags, "--auth-token", "sesame") as server:
        with Client(server.address) as client, pytest.raises(whet.UnauthenticatedError):
            client.models()
        with Client(server.address, token="sesame") as client:
            assert client.complete("x", model=MODEL, max_tokens=1).usage.completion_tokens == 1


def test_a_real_model_answers(tmp_path: Path, smollm2_gguf: Path) -> None:
    """SmolLM2 from its GGUF file: chat template, tokenizer and weights, from the SDK to the worker and back. With exact
    products: the likeliest first tokens have 0.152 and 0.140, which activations in int8 exchange."""
    flags = ["--model", f"smollm2={smollm2_gguf}", "--activation-quantization", "off"]
    with running_server(tmp_path / "state", *flags) as server, Client(server.address) as client:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        chunks = list(client.generate(question, model="smollm2", max_tokens=32, temperature=0.0))
        assert "".join(chunk.text for chunk in chunks) == "The capital of France is Paris."
        assert chunks[-1].finish_reason == "stop"
        stopped = client.complete(question, model="smollm2", max_tokens=32, temperature=0.0, stop=[" France"])
        assert stopped.text == "The capital of"
