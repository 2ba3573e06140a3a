"""Stop strings through the whole service: the engine's own timings, and every completion observed once."""

from __future__ import annotations

import time

from tests.rpc.calls import generate
from tests.rpc.conftest import MODEL
from tests.rpc.harness import ServerProcess, Stubs
from whet.v1 import generation_pb2

HISTOGRAMS = (
    "request_queue_seconds",
    "request_prefill_seconds",
    "request_duration_seconds",
    "time_to_first_token_seconds",
)


def counts(server: ServerProcess) -> list[float]:
    """Observations so far, of each histogram."""
    return [server.metric(f"whet_{name}_count", model=MODEL) or 0.0 for name in HISTOGRAMS]


def settled(server: ServerProcess) -> list[float]:
    """The same, once what was observed before is here: workers report twice a second."""
    time.sleep(1.5)
    return counts(server)


def test_a_stop_string_has_all_timings_and_is_observed_once(stubs: Stubs, rpc_server: ServerProcess) -> None:
    whole = generate(stubs, max_tokens=24)
    middle, end = whole.text()[10:12], whole.text()[-2:]
    for stop in (middle, end):  # the second ends with the token that max_tokens ends it at
        before = settled(rpc_server)
        reply = generate(stubs, max_tokens=24, stop=[stop])
        [completion] = reply.finished.completions
        assert completion.finish_reason == generation_pb2.FINISH_REASON_STOP
        assert completion.stop_string == stop
        for timings in (completion.timings, reply.finished.timings):
            for field in ("queue", "prefill", "decode", "time_to_first_token", "total"):
                assert timings.HasField(field), field
        assert settled(rpc_server) == [count + 1 for count in before]


def test_one_of_several_completions_stops_and_frees_the_engine(stubs: Stubs, rpc_server: ServerProcess) -> None:
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
