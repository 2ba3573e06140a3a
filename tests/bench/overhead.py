"""What the way through gRPC, front end and worker costs, against the engine alone."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from tests.bench.setup import GENERATOR, Bench, random_tokens, request, seconds
from whet.v1 import common_pb2, generation_pb2, generation_pb2_grpc

_ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


@contextlib.contextmanager
def running_server(bench: Bench) -> Iterator[str]:
    """A server of its own process on the generating model; yields its gRPC address."""
    command = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    command += ["--model", f"{GENERATOR}={bench.path(GENERATOR)}", "--threads", str(bench.threads)]
    command += ["--state-dir", str(bench.work_dir / "server"), "--device", "cpu", "--dtype", "float32"]
    command += ["--log-level", "warning", "--drain-seconds", "0"]
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        fields = dict(part.split("=", 1) for part in ready.split() if "=" in part)
        if "grpc" not in fields:
            raise SystemExit(f"the server did not start; its log is above ({ready!r})")
        yield fields["grpc"]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def grpc_overhead(bench: Bench) -> None:
    """Microseconds per token that one stream loses between the engine and a client of the server, and the rate of
    eight streams through the server."""
    scale = bench.scale
    engine = bench.load(GENERATOR)

    def alone() -> float:
        asked = request(f"alone-{next(_numbers)}", random_tokens(scale.prompt_tokens), scale.new_tokens)
        engine.add_request(asked)
        while not any(output.token_ids for output in engine.step()):
            pass

        def run() -> None:
            while engine.has_requests():
                engine.step()

        return seconds(run) / (scale.new_tokens - 1)

    with running_server(bench) as address, grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        def through_server() -> float:
            call = stub.Generate(
                generation_pb2.GenerateRequest(
                    model=GENERATOR,
                    prompt=common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=random_tokens(scale.prompt_tokens))),
                    sampling=generation_pb2.SamplingParams(
                        temperature=0.0, max_tokens=scale.new_tokens, ignore_eos=True
                    ),
                )
            )
            arrivals: list[tuple[float, int]] = []
            for response in call:
                if response.WhichOneof("event") == "delta" and response.delta.token_ids:
                    arrivals.append((time.perf_counter(), len(response.delta.token_ids)))
            assert sum(count for _, count in arrivals) == scale.new_tokens
            return (arrivals[-1][0] - arrivals[0][0]) / (scale.new_tokens - arrivals[0][1])

        medians = bench.medians({"engine": alone, "server": through_server})
    bench.report(
        "grpc_overhead",
        "microseconds/token",
        GENERATOR,
        {"whet": (medians["server"] - medians["engine"]) * 1e6},
        engine_seconds_per_token=round(medians["engine"], 6),
        server_seconds_per_token=round(medians["server"], 6),
        ratio=round(medians["server"] / medians["engine"], 4),
    )
