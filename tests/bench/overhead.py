"""What the way through gRPC, front end and worker costs, against the engine alone; and starting, against
llama-server."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Self

from tests.bench.models import GENERATOR
from tests.bench.peers import llama_cpp
from tests.bench.server_process import cpu_seconds, resident_bytes, running_server
from tests.bench.serving import decode_rate, llama_files
from tests.bench.setup import OURS, Bench
from tests.bench.work import random_tokens, request, seconds
from whet import AsyncClient, Client

_numbers = itertools.count()
ENGINE = "engine alone"
FULL_RATE = 2000
"""Tokens per second at which the front end is to be within one core."""


def _arrivals(client: Client, bench: Bench, new_tokens: int) -> Iterator[tuple[float, int]]:
    """When tokens of one stream came, and how many."""
    prompt = random_tokens(bench.scale.prompt_tokens)
    stream = client.generate(prompt, model=GENERATOR, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    with stream:
        for chunk in stream:
            if chunk.token_ids:
                yield time.perf_counter(), len(chunk.token_ids)


def _sdk_decode_rate(client: Client, bench: Bench) -> float:
    """Tokens per second of one stream, from its first token on."""
    arrivals = list(_arrivals(client, bench, bench.scale.new_tokens))
    total = sum(count for _, count in arrivals)
    if total != bench.scale.new_tokens:
        raise SystemExit(f"{bench.scale.new_tokens} tokens were asked for, {total} came")
    return (total - arrivals[0][1]) / (arrivals[-1][0] - arrivals[0][0])


class ManyStreams:
    """Streams that begin together, as tasks of one asyncio client: who has many of them in one process has it for that.
    The blocking client takes a thread for each, and three times the processor time for a token, as every thread that
    waits for one looks around ten times a second.
    """

    def __init__(self, bench: Bench, address: str) -> None:
        self._bench = bench
        self._address = address
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        self._runner.__enter__()
        self._client = self._runner.run(self._connected())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    async def _connected(self) -> AsyncClient:
        client = AsyncClient(self._address)
        await client.models()
        return client

    def rate(self, streams: int, new_tokens: int) -> float:
        """Tokens per second of all together, prompts included."""

        async def one() -> int:
            prompt, count = random_tokens(self._bench.scale.prompt_tokens), 0
            async with self._client.generate(
                prompt, model=GENERATOR, max_tokens=new_tokens, temperature=0.0, ignore_eos=True
            ) as stream:
                async for chunk in stream:
                    count += len(chunk.token_ids)
            return count

        async def all_of_them() -> list[int]:
            return await asyncio.gather(*(one() for _ in range(streams)))

        counts: list[int] = []
        taken = seconds(lambda: counts.extend(self._runner.run(all_of_them())))
        if set(counts) != {new_tokens}:
            raise SystemExit(f"{new_tokens} tokens were asked for of each stream; {counts} came")
        return streams * new_tokens / taken


def _engine_total_rate(bench: Bench, streams: int, new_tokens: int) -> float:
    """The same by the engine in this process."""
    engine = bench.load(GENERATOR)
    prompts = [random_tokens(bench.scale.prompt_tokens) for _ in range(streams)]
    asked = [request(f"grpc-{next(_numbers)}", prompt, new_tokens, GENERATOR) for prompt in prompts]

    def run() -> None:
        for each in asked:
            engine.add_request(each)
        while engine.has_requests():
            engine.step()

    return streams * new_tokens / seconds(run)


def grpc_overhead(bench: Bench) -> None:
    """Tokens per second of one stream through the SDK; the ratio is to the engine alone, in this process."""
    with running_server(bench) as server, Client(server.address) as client:
        sides = {OURS: lambda: _sdk_decode_rate(client, bench), ENGINE: lambda: decode_rate(bench, GENERATOR, 1)}
        taken = bench.samples(sides)
    lost = sum(1 / rate for rate in taken[OURS]) / len(taken[OURS])
    lost -= sum(1 / rate for rate in taken[ENGINE]) / len(taken[ENGINE])
    bench.report("grpc_overhead", "tokens/s", GENERATOR, taken, lost_microseconds_per_token=round(lost * 1e6, 1))


def grpc_64(bench: Bench) -> None:
    """Tokens per second of 64 streams that begin together, through the SDK; the ratio is to the engine alone."""
    streams, new_tokens = bench.scale.many_streams, bench.scale.new_tokens // 2
    with running_server(bench) as server, ManyStreams(bench, server.address) as sdk:
        sides = {
            OURS: lambda: sdk.rate(streams, new_tokens),
            ENGINE: lambda: _engine_total_rate(bench, streams, new_tokens),
        }
        taken = bench.samples(sides)
    bench.report("grpc_64", "tokens/s", GENERATOR, taken, streams=streams, new_tokens=new_tokens)


def front_end(bench: Bench) -> None:
    """Cores that the front end takes for 2,000 tokens a second in 64 streams, by its own processor time per token; of
    a tiny model, whose worker is fast enough."""
    scale = bench.scale
    streams, new_tokens = scale.many_streams, scale.new_tokens * 2
    cores, rates = [], []
    with running_server(bench, model=bench.models.tiny()) as server, ManyStreams(bench, server.address) as sdk:
        for round_ in range(-scale.warm_up, bench.rounds or scale.rounds):
            before = cpu_seconds(server.pid)
            rate = sdk.rate(streams, new_tokens)
            if round_ >= 0:
                per_token = (cpu_seconds(server.pid) - before) / (streams * new_tokens)
                cores.append(per_token * FULL_RATE)
                rates.append(rate)
    rate = sorted(rates)[len(rates) // 2]
    bench.report(
        "front_end", "cores", GENERATOR, {OURS: cores}, tokens_per_second=round(rate, 1), streams=streams,
        at_tokens_per_second=FULL_RATE, served="tiny-llama",
    )  # fmt: skip


def start(bench: Bench) -> None:
    """Seconds until a server is ready, and its memory after one short answer."""
    taken: dict[str, list[tuple[float, float]]] = {OURS: []}
    listening: list[float] = []
    prompt = random_tokens(bench.scale.prompt_tokens, seed=0)

    def ours() -> tuple[float, float]:
        with running_server(bench) as server, Client(server.address) as client:
            client.complete(prompt, model=GENERATOR, max_tokens=4, temperature=0.0, ignore_eos=True)
            if server.listen_seconds is not None:
                listening.append(server.listen_seconds)
            return server.start_seconds, float(resident_bytes(server.pid))

    sides = {OURS: ours}
    files = llama_files(bench, GENERATOR)
    binary = bench.peers.binary("llama-server") if files else None
    if binary is not None:
        bench.know_version("llama-server", llama_cpp.version(binary))
    for label, path in files.items() if binary is not None else ():

        def theirs(path: object = path) -> tuple[float, float]:
            with llama_cpp.llama_server(binary, path, bench.threads, streams=8, context=512) as server:  # type: ignore[arg-type]
                server.complete(prompt, 4)
                return server.start_seconds, float(resident_bytes(server.pid))

        sides[f"llama-server {label}"] = theirs
    taken = bench.samples(sides, rounds=bench.scale.start_rounds)
    times = {side: [each[0] for each in values] for side, values in taken.items()}
    listens = round(sorted(listening)[len(listening) // 2], 3) if listening else None
    bench.report("start", "seconds", GENERATOR, times, listens_after_seconds=listens)
    memory = {side: [each[1] for each in values] for side, values in taken.items()}
    bench.report("start_memory", "bytes", GENERATOR, memory)
