"""Perplexity, Embed and Quantize over the wire."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.calls import TIMEOUT, generate, train
from tests.rpc.conftest import EMBEDDER, MODEL, PROMPTS
from tests.rpc.harness import ServerProcess, Stubs, fails, running_server
from tests.tiny_embedder import TASK, save_tiny_embedder
from whet import Client
from whet.v1 import common_pb2, embedding_pb2, evaluation_pb2, model_pb2, quantization_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT
TEXT = "It was the best of times, it was the worst of times. " * 4


# --------------------------------------------------------------------------------------------------------- perplexity


def perplexity(stubs: Stubs, **fields: Any) -> evaluation_pb2.PerplexityResult:
    values = {"model": MODEL, "text": TEXT, "window": 64, "stride": 32} | fields
    responses = list(stubs.evaluation.Perplexity(evaluation_pb2.PerplexityRequest(**values), timeout=TIMEOUT))
    assert [response.WhichOneof("event") for response in responses[:-1]] == ["progress"] * (len(responses) - 1)
    return responses[-1].result


def test_every_token_but_the_first_is_scored_once(stubs: Stubs, rpc_server: ServerProcess) -> None:
    before = rpc_server.metric("whet_perplexity_tokens_total", model=MODEL) or 0.0
    result = perplexity(stubs, request_id="ppl")
    assert result.num_tokens == len(TEXT) - 1
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.standard_error > 0
    assert result.request_id == "ppl"
    assert not result.HasField("adapter_version")
    assert rpc_server.metric("whet_perplexity_tokens_total", model=MODEL) == before + result.num_tokens
    assert perplexity(stubs, max_tokens=10).num_tokens == 9
    ids = stubs.generation.Tokenize(_tokenize(TEXT), timeout=TIMEOUT).token_ids
    by_ids = perplexity(stubs, text=None, token_ids=common_pb2.TokenIds(ids=ids))
    assert by_ids.nll == pytest.approx(result.nll)


def _tokenize(text: str) -> Any:
    from whet.v1 import generation_pb2

    return generation_pb2.TokenizeRequest(model=MODEL, prompt=common_pb2.Prompt(text=text))


def test_an_adapter_changes_it(stubs: Stubs) -> None:
    train(stubs, adapter="jobs-tone")
    result = perplexity(stubs, adapter=common_pb2.AdapterSelector(name="jobs-tone"))
    assert result.adapter_version == 1
    assert result.nll != perplexity(stubs).nll


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("text", {"text": ""}),
        ("text", {"text": "x"}),
        ("input", {"text": None}),
        ("token_ids", {"text": None, "token_ids": common_pb2.TokenIds(ids=[1, 300])}),
        ("token_ids", {"text": None, "token_ids": common_pb2.TokenIds()}),
        ("window", {"window": 1}),
        ("window", {"window": 1 << 20}),
        ("stride", {"stride": 0}),
        ("stride", {"stride": 65}),
        ("max_tokens", {"max_tokens": 1}),
        ("max_tokens", {"max_tokens": -5}),
        ("adapter.name", {"adapter": common_pb2.AdapterSelector(name="/")}),
    ],
)
def test_perplexity_names_a_bad_value(stubs: Stubs, field: str, values: dict[str, Any]) -> None:
    with fails(INVALID, field=field):
        perplexity(stubs, **values)


def test_an_encoder_predicts_nothing(stubs: Stubs) -> None:
    with fails(grpc.StatusCode.FAILED_PRECONDITION, reason="WRONG_TASK"):
        perplexity(stubs, model=EMBEDDER)


# ---------------------------------------------------------------------------------------------------------- embedding


def embed(stubs: Stubs, texts: list[str], **fields: Any) -> embedding_pb2.EmbedResponse:
    inputs = [embedding_pb2.EmbedInput(text=text) for text in texts]
    values = {"model": EMBEDDER, "inputs": inputs, "pooling": embedding_pb2.POOLING_MEAN} | fields
    return stubs.embedding.Embed(embedding_pb2.EmbedRequest(**values), timeout=TIMEOUT)


def vectors(response: embedding_pb2.EmbedResponse) -> list[list[float]]:
    return [list(embedding.values) for embedding in response.embeddings]


def test_vectors_come_in_order_and_of_length_one(stubs: Stubs) -> None:
    texts = [f"text {number}" + "!" * number for number in range(20)]
    response = embed(stubs, texts)
    assert (len(response.embeddings), response.dimensions) == (20, 32)
    assert response.num_tokens == sum(map(len, texts))
    for vector in vectors(response):
        assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-5)
    alone = [vectors(embed(stubs, [text]))[0] for text in texts[:4]]
    for together, single in zip(vectors(response), alone, strict=False):
        assert together == pytest.approx(single, abs=1e-5)


def test_truncation_comes_before_normalising(stubs: Stubs) -> None:
    whole = vectors(embed(stubs, ["abc"], normalize=False))[0]
    cut = vectors(embed(stubs, ["abc"], dimensions=8))[0]
    norm = math.hypot(*whole[:8])
    assert cut == pytest.approx([value / norm for value in whole[:8]], abs=1e-5)
    assert len(cut) == 8


def test_prefixes_are_those_of_the_models_files(stubs: Stubs) -> None:
    for kind, purpose in (
        (embedding_pb2.INPUT_TYPE_QUERY, "query"),
        (embedding_pb2.INPUT_TYPE_DOCUMENT, "document"),
    ):
        typed = vectors(embed(stubs, ["abc"], input_type=kind))
        assert typed == vectors(embed(stubs, [PROMPTS[purpose] + "abc"]))
        assert typed != vectors(embed(stubs, ["abc"]))


@pytest.fixture(scope="module")
def embedders(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the embedder, of a copy that has a default prompt, and of a model of Qwen3-Embedding's layout."""
    directory = tmp_path_factory.mktemp("embedders")
    copy = shutil.copytree(tiny_bert, directory / "default")
    settings = {"prompts": {"query": "query: ", "plain": "plain: "}, "default_prompt_name": "plain"}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(settings))
    models = {EMBEDDER: tiny_bert, "default": copy, "qwen": save_tiny_embedder(directory / "qwen")}
    flags = [flag for name, path in models.items() for flag in ("--model", f"{name}={path}")]
    with running_server(directory / "state", *flags) as server:
        yield server


def test_a_default_prefix_goes_before_texts_of_no_stated_purpose(embedders: ServerProcess) -> None:
    stubs = Stubs(embedders.address)
    assert vectors(embed(stubs, ["abc"], model="default")) == vectors(embed(stubs, ["plain: abc"]))
    for kind, prefix in ((embedding_pb2.INPUT_TYPE_QUERY, "query: "), (embedding_pb2.INPUT_TYPE_DOCUMENT, "plain: ")):
        typed = vectors(embed(stubs, ["abc"], model="default", input_type=kind))
        assert typed == vectors(embed(stubs, [prefix + "abc"]))
    stubs.close()


def test_instructions_of_the_caller(embedders: ServerProcess) -> None:
    """A model of Qwen3-Embedding's layout: its query prompt by default, the caller's task in its place on request, the
    model's own end token after each; an instruction that could have no effect is refused. Its tied head generates."""
    stubs = Stubs(embedders.address)

    def rows(*texts: str, **fields: Any) -> list[list[float]]:
        return vectors(embed(stubs, list(texts), **({"model": "qwen", "pooling": 0} | fields)))

    query = embedding_pb2.INPUT_TYPE_QUERY
    asked = rows("what?", instruction="Find the sea")
    assert (
        asked
        == rows("Instruct: Find the sea\nQuery:what?")
        == rows("what?", instruction="Find the sea", input_type=query)
    )
    assert rows("what?", instruction=TASK) == rows("what?", input_type=query) != asked
    assert rows("what?", input_type=embedding_pb2.INPUT_TYPE_DOCUMENT) == rows("what?") != asked
    assert rows("") == vectors(
        embed(
            stubs,
            [],
            model="qwen",
            pooling=0,
            inputs=[embedding_pb2.EmbedInput(token_ids=common_pb2.TokenIds(ids=[0]))],
        )
    ), "an empty text is its end token"
    refused: list[dict[str, Any]] = [
        {"instruction": ""},
        {"input_type": embedding_pb2.INPUT_TYPE_DOCUMENT},
        {"inputs": [embedding_pb2.EmbedInput(token_ids=common_pb2.TokenIds(ids=[5]))]},
        {"model": EMBEDDER},
    ]
    for fields in refused:
        with fails(INVALID, field="instruction", reason="NO_INSTRUCTIONS" if "model" in fields else ""):
            rows("x", **({"instruction": "Find"} | fields))
    with Client(embedders.address) as client:
        sdk = client.embed("what?", model="qwen", instruction="Find the sea", dimensions=8)
        norm = math.hypot(*asked[0][:8])
        assert sdk.vectors[0] == pytest.approx([value / norm for value in asked[0][:8]], abs=1e-5)
        assert client.complete("what?", model="qwen", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
    stubs.close()


def test_a_causal_model_embeds_as_well(stubs: Stubs) -> None:
    last = embed(stubs, ["abc"], model=MODEL, pooling=embedding_pb2.POOLING_LAST)
    mean = embed(stubs, ["abc"], model=MODEL, pooling=embedding_pb2.POOLING_MEAN)
    assert last.dimensions == mean.dimensions == 64
    assert vectors(last) != vectors(mean)


def test_embedding_runs_beside_generation(stubs: Stubs) -> None:
    expected = generate(stubs, max_tokens=48).token_ids()
    with ThreadPoolExecutor(4) as executor:
        stream = executor.submit(generate, stubs, max_tokens=48)
        batches = [executor.submit(embed, stubs, [f"{n} {k}" for k in range(16)]) for n in range(4)]
        assert all(len(batch.result().embeddings) == 16 for batch in batches)
        assert stream.result().token_ids() == expected


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("inputs", {"inputs": []}),
        ("inputs", {"inputs": [embedding_pb2.EmbedInput(text="x")] * 2049}),
        ("inputs[1]", {"inputs": [embedding_pb2.EmbedInput(text="x"), embedding_pb2.EmbedInput(text="")]}),
        ("inputs[0]", {"inputs": [embedding_pb2.EmbedInput()]}),
        ("inputs[0]", {"inputs": [embedding_pb2.EmbedInput(text="x" * 65)]}),
        ("inputs[0]", {"inputs": [embedding_pb2.EmbedInput(token_ids=common_pb2.TokenIds(ids=[-1]))]}),
        ("dimensions", {"dimensions": 0}),
        ("dimensions", {"dimensions": 33}),
        ("pooling", {"pooling": 77}),
        ("input_type", {"input_type": 77}),
    ],
)
def test_embed_names_a_bad_value(stubs: Stubs, field: str, values: dict[str, Any]) -> None:
    with fails(INVALID, field=field):
        embed(stubs, ["x"], **values)


# ------------------------------------------------------------------------------------------------------- quantization

Q4, Q8 = quantization_pb2.QUANTIZE_SCHEME_Q4, quantization_pb2.QUANTIZE_SCHEME_Q8


def quantize(stubs: Stubs, output: str, **fields: Any) -> list[quantization_pb2.QuantizeResponse]:
    values = {"model": MODEL, "scheme": Q8, "output": output} | fields
    return list(stubs.quantization.Quantize(quantization_pb2.QuantizeRequest(**values), timeout=TIMEOUT))


@pytest.mark.parametrize(("output", "scheme"), [("tiny-q8", Q8), ("tiny-q4", Q4)])
def test_a_quantized_copy_is_written_loaded_and_trained_over(
    stubs: Stubs, rpc_server: ServerProcess, output: str, scheme: Any
) -> None:
    *progress, last = quantize(stubs, output, scheme=scheme, eval_text=TEXT, request_id=f"quantize-{output}")
    assert progress
    assert all(response.WhichOneof("event") == "progress" for response in progress)
    report = last.report
    assert report.loaded
    assert report.bytes_in > report.bytes_out > 0
    assert report.ratio == pytest.approx(report.bytes_in / report.bytes_out)
    assert report.num_quantized == len(report.tensors) > 0
    assert report.logit_kl >= 0
    assert report.perplexity_after > 0
    model = stubs.model.GetModel(model_pb2.GetModelRequest(name=output), timeout=TIMEOUT).model
    assert model.state == model_pb2.MODEL_STATE_READY
    assert model.quantization == output.removeprefix("tiny-")
    assert len(generate(stubs, model=output).token_ids()) == 8
    assert train(stubs, model=output, adapter="over-q", params={"max_steps": 2})[-1].HasField("finished")
    assert stubs.is_serving(f"model/{output}")
    again = quantize(stubs, output, scheme=scheme, eval_text=TEXT, request_id=f"quantize-{output}")
    assert again[-1].report == report
    with fails(grpc.StatusCode.ALREADY_EXISTS):
        quantize(stubs, output, scheme=scheme)


def test_a_dry_run_writes_nothing(stubs: Stubs, rpc_server: ServerProcess) -> None:
    report = quantize(stubs, "tiny-dry", dry_run=True)[-1].report
    assert not report.HasField("bytes_out")
    assert not report.HasField("ratio")
    assert (report.output, report.path, report.loaded) == ("", "", False)
    assert report.tensors
    assert not (rpc_server.state_dir / "models" / "tiny-dry").exists()
    with fails(grpc.StatusCode.NOT_FOUND):
        stubs.model.GetModel(model_pb2.GetModelRequest(name="tiny-dry"), timeout=TIMEOUT)


def test_the_name_of_a_model_that_is_there_is_refused(stubs: Stubs) -> None:
    for name in (MODEL, EMBEDDER):
        with fails(grpc.StatusCode.ALREADY_EXISTS):
            quantize(stubs, name, eval_text=TEXT)


def test_what_is_not_loaded_can_be_loaded_later(stubs: Stubs) -> None:
    assert not quantize(stubs, "tiny-later", load=False)[-1].report.loaded
    model = stubs.model.GetModel(model_pb2.GetModelRequest(name="tiny-later"), timeout=TIMEOUT).model
    assert model.state == model_pb2.MODEL_STATE_UNLOADED
    loaded = stubs.model.LoadModel(model_pb2.LoadModelRequest(name="tiny-later"), timeout=TIMEOUT).model
    assert loaded.quantization == "q8"
    assert len(generate(stubs, model="tiny-later").token_ids()) == 8
    stubs.model.UnloadModel(model_pb2.UnloadModelRequest(name="tiny-later"), timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("scheme", {"scheme": 0}),
        ("scheme", {"scheme": 9}),
        ("output", {"output": ""}),
        ("output", {"output": "../../x"}),
        ("group_size", {"scheme": Q4, "group_size": 31}),
        ("group_size", {"scheme": Q4, "group_size": -32}),
        ("group_size", {"scheme": Q8, "group_size": 32}),
        ("symmetric", {"scheme": Q8, "symmetric": False}),
        ("eval_text", {"eval_text": ""}),
        ("eval_token_ids", {"eval_token_ids": common_pb2.TokenIds(ids=[1, 999])}),
    ],
)
def test_quantize_names_a_bad_value(stubs: Stubs, field: str, values: dict[str, Any]) -> None:
    with fails(INVALID, field=field):
        quantize(stubs, **{"output": "tiny-bad", **values})
