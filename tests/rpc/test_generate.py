"""Generate, Tokenize and Detokenize over the wire."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.rpc.calls import LASTING, TIMEOUT, Reply, generate, request, text_prompt
from tests.rpc.conftest import CONTEXT, EMBEDDER, MODEL
from tests.rpc.harness import ServerProcess, Stubs, fails, wait_for
from tests.rpc.tiny_tokenizer import BYTE_OFFSET
from whet.v1 import common_pb2, generation_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def ids(text: str) -> list[int]:
    return [BYTE_OFFSET + byte for byte in text.encode()]


def test_a_stream_says_all_that_it_promises(stubs: Stubs) -> None:
    reply = generate(stubs, max_tokens=8)
    assert reply.started.num_prompt_tokens == len("Once upon a time")
    assert reply.started.model == MODEL
    assert not reply.started.HasField("adapter_version")
    assert len(reply.token_ids()) == 8
    [completion] = reply.finished.completions
    assert completion.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert completion.WhichOneof("stop_reason") is None
    usage = reply.finished.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (16, 8)
    timings = reply.finished.timings
    for name in ("queue", "prefill", "decode", "time_to_first_token", "total"):
        assert timings.HasField(name), name
    assert timings.tokens_per_second > 0
    assert timings.total.ToTimedelta() >= timings.time_to_first_token.ToTimedelta()
    assert reply.finished.request_id == reply.started.request_id != ""


def test_text_ids_and_chat_are_the_same_prompt(stubs: Stubs) -> None:
    as_text = generate(stubs, "abc")
    as_ids = generate(stubs, common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=ids("abc"))))
    assert as_text.token_ids() == as_ids.token_ids()
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="abc")])
    as_chat = generate(stubs, common_pb2.Prompt(chat=chat), echo=True)
    assert as_chat.started.prompt_text == "<s>user\nabc</s>\n<s>assistant\n"
    assert as_chat.started.prompt_token_ids[0] == 1
    open_end = common_pb2.Chat(messages=chat.messages, add_generation_prompt=False)
    assert generate(stubs, common_pb2.Prompt(chat=open_end), echo=True).started.prompt_text == "<s>user\nabc</s>\n"


def test_the_streamed_text_is_the_decoded_whole(stubs: Stubs) -> None:
    """A random model makes invalid byte sequences, so this is the hard case."""
    for seed in range(5):
        reply = generate(stubs, temperature=2.0, seed=seed, max_tokens=64)
        tokens = [token for token in reply.token_ids() if token < BYTE_OFFSET + 256]
        whole = stubs.generation.Detokenize(
            generation_pb2.DetokenizeRequest(model=MODEL, token_ids=reply.token_ids()), timeout=TIMEOUT
        ).text
        assert reply.text() == whole
        assert whole == bytes(t - BYTE_OFFSET for t in tokens if t >= BYTE_OFFSET).decode("utf-8", "replace")


def test_a_seed_repeats_and_n_completions_differ(stubs: Stubs) -> None:
    one = generate(stubs, temperature=1.0, seed=7, n=3, max_tokens=16)
    two = generate(stubs, temperature=1.0, seed=7, n=3, max_tokens=16)
    assert [one.token_ids(i) for i in range(3)] == [two.token_ids(i) for i in range(3)]
    assert len({tuple(one.token_ids(i)) for i in range(3)}) == 3
    assert [completion.index for completion in one.finished.completions] == [0, 1, 2]
    assert one.finished.usage.completion_tokens == 48
    assert one.finished.usage.prompt_tokens == 16


def test_stop_strings_end_it_unseen(stubs: Stubs) -> None:
    whole = generate(stubs, max_tokens=24).text()
    stop = whole[10:12]
    reply = generate(stubs, max_tokens=24, stop=[stop])
    assert reply.text() == whole[: whole.index(stop)]
    [completion] = reply.finished.completions
    assert completion.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert completion.stop_string == stop
    late = generate(stubs, max_tokens=24, min_tokens=24, stop=[stop])
    assert late.text() == whole


def test_stop_tokens_end_it_and_are_no_text(stubs: Stubs) -> None:
    whole = generate(stubs, max_tokens=12)
    stop = whole.token_ids()[6]
    reply = generate(stubs, max_tokens=12, stop_token_ids=[stop])
    first = whole.token_ids().index(stop)
    assert reply.token_ids() == whole.token_ids()[: first + 1]
    [completion] = reply.finished.completions
    assert completion.stop_token_id == stop
    assert whole.text().startswith(reply.text())


def test_logprobs(stubs: Stubs) -> None:
    reply = generate(stubs, logprobs=3, prompt_logprobs=2, max_tokens=4)
    prompt = reply.started.prompt_logprobs
    assert len(prompt) == 16
    assert not prompt[0].HasField("logprob")
    assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in prompt[1:])
    chosen = [entry for delta in reply.deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in chosen] == reply.token_ids()
    for entry in chosen:
        assert entry.rank == 1  # greedy
        assert entry.logprob == max(top.logprob for top in entry.top)
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)


def test_echo_brings_the_prompt(stubs: Stubs) -> None:
    reply = generate(stubs, "héllo", echo=True)
    assert reply.started.prompt_text == "héllo"
    assert list(reply.started.prompt_token_ids) == ids("héllo")
    by_ids = generate(stubs, common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=ids("hé"))), echo=True)
    assert by_ids.started.prompt_text == "hé"


def test_a_repeated_prompt_is_found_in_the_cache(stubs: Stubs) -> None:
    prompt = "cache me if you can, " * 4
    generate(stubs, prompt, cache_salt="here")
    again = generate(stubs, prompt, cache_salt="here")
    assert again.started.num_cached_tokens >= 64
    assert again.finished.usage.cached_prompt_tokens == again.started.num_cached_tokens
    assert generate(stubs, prompt, cache_salt="elsewhere").started.num_cached_tokens == 0


def test_ten_concurrent_streams_equal_each_alone(stubs: Stubs) -> None:
    prompts = [f"Story number {number}: " + "x" * (7 * number) for number in range(10)]
    alone = [generate(stubs, prompt, max_tokens=24, cache_salt="alone").token_ids() for prompt in prompts]
    with ThreadPoolExecutor(10) as executor:
        together = list(
            executor.map(lambda p: generate(stubs, p, max_tokens=24, cache_salt="together").token_ids(), prompts)
        )
    assert together == alone


def test_a_request_id_is_everywhere(stubs: Stubs, rpc_server: ServerProcess) -> None:
    call = stubs.generation.Generate(request(request_id="my-id"), timeout=TIMEOUT)
    reply = Reply(call)
    assert dict(call.initial_metadata())["x-request-id"] == "my-id"
    assert reply.started.request_id == reply.finished.request_id == "my-id"
    assert "request_id=my-id" in rpc_server.log()
    metadata = (("x-request-id", "from-metadata"),)
    call = stubs.generation.Generate(request(), timeout=TIMEOUT, metadata=metadata)
    assert Reply(call).started.request_id == "from-metadata"


def test_two_requests_of_one_id_do_not_meet(stubs: Stubs) -> None:
    with ThreadPoolExecutor(2) as executor:
        calls = [executor.submit(generate, stubs, prompt, request_id="same", max_tokens=32) for prompt in ("a", "b")]
        texts = [call.result().token_ids() for call in calls]
    assert texts == [generate(stubs, prompt, max_tokens=32).token_ids() for prompt in ("a", "b")]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": common_pb2.Prompt()}),
    ("prompt.text", {"prompt": text_prompt("")}),
    ("prompt.token_ids", {"prompt": common_pb2.Prompt(token_ids=common_pb2.TokenIds())}),
    ("prompt.token_ids", {"prompt": common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[-1]))}),
    ("prompt.token_ids", {"prompt": common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[300]))}),
    ("prompt.chat.messages", {"prompt": common_pb2.Prompt(chat=common_pb2.Chat())}),
    ("sampling.temperature", {"temperature": float("nan")}),
    ("sampling.max_tokens", {"max_tokens": -1}),
    ("sampling.max_tokens", {"max_tokens": 0}),
    ("sampling.min_tokens", {"min_tokens": 9}),
    ("sampling.stop_token_ids", {"stop_token_ids": [1] * 257}),
    ("sampling.logit_bias", {"logit_bias": {999: 1.0}}),
    ("n", {"n": 0}),
    ("n", {"n": 65}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop[0]", {"stop": ["x" * 257]}),
    ("adapter.name", {"adapter": common_pb2.AdapterSelector(name="../etc")}),
    ("adapter.name", {"adapter": common_pb2.AdapterSelector(version=1)}),
    ("adapter.version", {"adapter": common_pb2.AdapterSelector(name="a", version=-1)}),
    ("priority", {"priority": 2**31 - 1}),
    ("cache_salt", {"cache_salt": "x" * 257}),
    ("model", {"model": "../tiny"}),
    ("model", {"model": ""}),
    ("request_id", {"request_id": "a\nb"}),
    ("request_id", {"request_id": "x" * 129}),
]


@pytest.mark.parametrize(("field", "values"), BAD, ids=[f"{field}-{i}" for i, (field, _) in enumerate(BAD)])
def test_a_bad_value_is_named(stubs: Stubs, field: str, values: dict[str, Any]) -> None:
    with fails(INVALID, field=field):
        generate(stubs, **values)


def test_a_prompt_longer_than_the_context_is_refused(stubs: Stubs) -> None:
    with fails(INVALID, reason="LIMIT_EXCEEDED"):
        generate(stubs, "x" * (CONTEXT + 1))
    assert len(generate(stubs, "x" * (CONTEXT - 8), max_tokens=8).token_ids()) == 8


def test_a_completion_ends_where_the_context_does(stubs: Stubs) -> None:
    reply = generate(stubs, "x" * (CONTEXT - 8), max_tokens=CONTEXT)
    assert reply.finished.completions[0].finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert len(reply.token_ids()) <= 9


def test_unknown_names_are_not_found(stubs: Stubs) -> None:
    with fails(grpc.StatusCode.NOT_FOUND, reason="MODEL_NOT_FOUND"):
        generate(stubs, model="unknown")
    with fails(grpc.StatusCode.NOT_FOUND, reason="ADAPTER_NOT_FOUND"):
        generate(stubs, adapter=common_pb2.AdapterSelector(name="unknown"))


def test_an_encoder_does_not_generate(stubs: Stubs) -> None:
    with fails(grpc.StatusCode.FAILED_PRECONDITION, reason="WRONG_TASK"):
        generate(stubs, model=EMBEDDER)


def cancelled(server: ServerProcess) -> float:
    """Completions that their callers left."""
    return server.metric("whet_requests_total", model=MODEL, finish_reason="cancelled") or 0.0


def test_a_cancel_frees_what_the_request_held(stubs: Stubs, rpc_server: ServerProcess) -> None:
    calls = [stubs.generation.Generate(request("y" * 16, **LASTING), timeout=TIMEOUT) for _ in range(4)]
    for call in calls:
        assert next(iter(call)).WhichOneof("event") == "started"
    before = cancelled(rpc_server)
    rpc_server.wait_computing(MODEL)
    for call in calls:
        call.cancel()
    wait_for(lambda: cancelled(rpc_server) == before + 4 * LASTING["n"])
    rpc_server.wait_idle(MODEL)


def test_a_deadline_stops_the_work(stubs: Stubs, rpc_server: ServerProcess) -> None:
    before = cancelled(rpc_server)
    call = stubs.generation.Generate(request("z" * 16, **LASTING), timeout=1.0)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    wait_for(lambda: cancelled(rpc_server) == before + LASTING["n"])
    rpc_server.wait_idle(MODEL)


def test_slow_readers_do_not_hold_up_others(stubs: Stubs) -> None:
    slow = stubs.generation.Generate(request(**LASTING), timeout=TIMEOUT)
    next(iter(slow))
    assert len(generate(stubs, max_tokens=8).token_ids()) == 8
    slow.cancel()


def test_tokenize_gives_what_generate_sees(stubs: Stubs) -> None:
    def tokenize(prompt: common_pb2.Prompt) -> generation_pb2.TokenizeResponse:
        return stubs.generation.Tokenize(generation_pb2.TokenizeRequest(model=MODEL, prompt=prompt), timeout=TIMEOUT)

    assert list(tokenize(text_prompt("aé")).token_ids) == ids("aé")
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="x")])
    rendered = tokenize(common_pb2.Prompt(chat=chat))
    assert rendered.rendered_text == "<s>user\nx</s>\n<s>assistant\n"
    seen = generate(stubs, common_pb2.Prompt(chat=chat), echo=True)
    assert list(seen.started.prompt_token_ids) == list(rendered.token_ids)
    with fails(INVALID, field="prompt.token_ids"):
        tokenize(common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=[1])))


def test_detokenize(stubs: Stubs) -> None:
    def detokenize(token_ids: list[int], **more: Any) -> str:
        message = generation_pb2.DetokenizeRequest(model=MODEL, token_ids=token_ids, **more)
        return stubs.generation.Detokenize(message, timeout=TIMEOUT).text

    assert detokenize([1, *ids("é"), 2]) == "é"
    assert detokenize([1, *ids("é"), 2], skip_special_tokens=False) == "<s>é</s>"
    assert detokenize(ids("é")[:1]) == "\ufffd"
    assert detokenize([]) == ""
    with fails(INVALID, field="token_ids"):
        detokenize([300])
