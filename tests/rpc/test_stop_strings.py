"""Stop strings through the whole service: the engine's own timings, and every completion observed once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rpc.calls import generate
from tests.rpc.conftest import MODEL
from tests.rpc.harness import ServerProcess, Stubs, running_server, wait_for
from whet.v1 import generation_pb2

HISTOGRAMS = (
    "request_queue_seconds",
    "request_prefill_seconds",
    "request_duration_seconds",
    "time_to_first_token_seconds",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[ServerProcess]:
    """A server that no other test asks, so that what it has observed is known exactly."""
    state = tmp_path_factory.mktemp("stop-strings") / "state"
    with running_server(state, "--model", f"{MODEL}={tiny_llama}") as started:
        yield started


@pytest.fixture(scope="module")
def stubs(server: ServerProcess) -> Iterator[Stubs]:
    """Stubs of that server."""
    made = Stubs(server.address)
    yield made
    made.close()


def test_a_stop_string_has_all_timings_and_is_observed_once(stubs: Stubs, server: ServerProcess) -> None:
    """A worker reports in the order of events: when the last request's observation is here, so are all before it."""
    whole = generate(stubs, max_tokens=24)
    middle, end = whole.text()[10:12], whole.text()[-2:]
    for stop in (middle, end):  # the second ends with the token that max_tokens ends it at
        reply = generate(stubs, max_tokens=24, stop=[stop])
        [completion] = reply.finished.completions
        assert completion.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert completion.stop_string == stop
        for timings in (completion.timings, reply.finished.timings):
            for field in ("queue", "prefill", "decode", "time_to_first_token", "total"):
                assert timings.HasField(field), field
    generate(stubs, "the last one", max_tokens=1)

    def counts() -> set[float]:
        return {server.metric(f"whet_{name}_count", model=MODEL) or 0.0 for name in HISTOGRAMS}

    def last_is_here() -> bool:
        return (server.metric("whet_request_prompt_tokens_sum", model=MODEL) or 0.0) >= 3 * 16 + len("the last one")

    wait_for(last_is_here)
    assert counts() == {4.0}


def test_one_of_several_completions_stops_and_frees_the_engine(stubs: Stubs) -> None:
    """The one that a stop string ended takes less time than its siblings."""
    fields = {"n": 4, "temperature": 1.0, "seed": 3, "max_tokens": 300}
    texts = [generate(stubs, **fields).text(index) for index in range(4)]
    stop = next(
        text[i : i + 3]
        for text in texts
        for i in range(4, len(text) // 4)
        if sum(text[i : i + 3] in other for other in texts) == 1
    )
    reply = generate(stubs, **fields, stop=[stop])
    stopped = [c for c in reply.finished.completions if c.stop_string]
    others = [c for c in reply.finished.completions if not c.stop_string]
    assert (len(stopped), len(others)) == (1, 3)
    assert all(c.num_completion_tokens == 300 for c in others)
    slowest = min(c.timings.total.ToTimedelta() for c in others)
    assert stopped[0].timings.total.ToTimedelta() < slowest / 2
