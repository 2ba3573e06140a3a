"""Fewer, larger messages have all that was made: those of a client that reads more slowly than the engine makes tokens,
and those of steps shorter than --stream-interval-ms."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from tests.rpc.calls import TIMEOUT, request
from tests.rpc.conftest import MODEL
from tests.rpc.harness import ServerProcess, wait_for
from whet.v1 import generation_pb2, generation_pb2_grpc

COMPLETIONS, TOKENS = 32, 200


def read(server: ServerProcess, pause: Callable[[], object]) -> tuple[list[list[int]], list[str], list[int]]:
    """Tokens and text of each completion, and the tokens that each message brought, with a pause at the first.

    Log-probabilities make the messages large, so that they fill the window of the connection soon.
    """
    asked = request(n=COMPLETIONS, max_tokens=TOKENS, logprobs=20, temperature=1.0, seed=3, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in range(COMPLETIONS)]
    texts = [""] * COMPLETIONS
    messages: list[int] = []
    with grpc.insecure_channel(server.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        for response in generation_pb2_grpc.GenerationServiceStub(channel).Generate(asked, timeout=TIMEOUT):
            if response.WhichOneof("event") != "delta":
                continue
            if not messages:
                pause()
            delta: generation_pb2.GenerationDelta = response.delta
            assert len(delta.logprobs) == len(delta.token_ids)
            messages.append(len(delta.token_ids))
            tokens[delta.index] += delta.token_ids
            texts[delta.index] += delta.text
    return tokens, texts, messages


def test_a_slow_client_gets_fewer_messages_and_the_whole_text(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--stream-interval-ms", "0")
    tokens, texts, _ = read(server, lambda: None)

    def running() -> bool:
        return bool(server.metric("whet_requests_running", model=MODEL))

    def until_the_engine_is_done() -> None:
        wait_for(running)
        wait_for(lambda: not running())

    wait_for(lambda: not running())  # workers report at an interval
    slow_tokens, slow_texts, slow_messages = read(server, until_the_engine_is_done)
    assert slow_tokens == tokens
    assert slow_texts == texts
    assert [len(each) for each in tokens] == [TOKENS] * COMPLETIONS
    assert len(slow_messages) < COMPLETIONS * TOKENS
    assert max(slow_messages) > 8  # until the buffers between the two are full, each token is a message


def test_short_steps_share_messages_and_first_tokens_and_ends_do_not_wait(
    start_server: Callable[..., ServerProcess], rpc_server: ServerProcess
) -> None:
    """With an interval longer than the whole completion: the first token comes alone, the others with the end."""
    server = start_server("--stream-interval-ms", "10000")
    asked = request(max_tokens=TOKENS, temperature=1.0, seed=3, ignore_eos=True)

    def deltas(address: str) -> list[generation_pb2.GenerationDelta]:
        with grpc.insecure_channel(address) as channel:
            responses = generation_pb2_grpc.GenerationServiceStub(channel).Generate(asked, timeout=TIMEOUT)
            return [response.delta for response in responses if response.WhichOneof("event") == "delta"]

    few, more = deltas(server.address), deltas(rpc_server.address)
    assert len(few[0].token_ids) == 1
    assert len(few) <= 4
    assert [t for delta in few for t in delta.token_ids] == [t for delta in more for t in delta.token_ids]
    assert "".join(delta.text for delta in few) == "".join(delta.text for delta in more)
