"""llama.cpp's programs. Its benchmark programs time themselves without the loading and after a run to warm up."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.peers.process import PeerError, end_process

READY_SECONDS = 120.0


def _run(command: list[str]) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise PeerError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout, done.stderr


def bench_rate(binary: Path, file: Path, threads: int, *, prompt: int = 0, new: int = 0, depth: int = 0) -> float:
    """Tokens per second of llama-bench: of a prompt, or of new tokens that follow ``depth`` earlier ones."""
    command = [str(binary), "-m", str(file), "-t", str(threads), "-p", str(prompt), "-n", str(new), "-d", str(depth)]
    out, _ = _run([*command, "-r", "1", "-o", "jsonl"])
    (line,) = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return float(line["avg_ts"])


def version(binary: Path) -> str:
    """The commit and build number of a program of llama.cpp."""
    done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"version: (.*)", done.stdout + done.stderr)
    return match.group(1).strip() if match else "unknown"


def perplexity_seconds(binary: Path, file: Path, threads: int, text: Path, *, context: int, chunks: int) -> float:
    """Seconds that llama-perplexity takes from its first window to its result: of each, the latter half is scored."""
    command = [str(binary), "-m", str(file), "-t", str(threads), "-f", str(text)]
    out, err = _run([*command, "-c", str(context), "--chunks", str(chunks), "--log-timestamps"])
    begin, end = (_stamp(out + err, message) for message in ("calculating perplexity", "Final estimate"))
    return end - begin


def _stamp(log: str, message: str) -> float:
    """When a message was logged, in seconds: its line begins with minutes, seconds, milliseconds, microseconds."""
    match = re.search(rf"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*{message}", log, re.MULTILINE)
    if match is None:
        raise PeerError(f"llama-perplexity did not say {message!r}: {log[-2000:]}")
    minutes, seconds, milliseconds, microseconds = map(int, match.groups())
    return minutes * 60 + seconds + milliseconds / 1e3 + microseconds / 1e6


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A running llama-server.

    Attributes:
        start_seconds: from the start of the process until it answered that it is ready.
    """

    pid: int
    port: int
    start_seconds: float

    def complete(self, prompt: list[int], new_tokens: int) -> int:
        """One greedy completion of exactly so many tokens; returns how many came."""
        body = {
            "prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False,
        }  # fmt: skip
        status, answer = _http("POST", self.port, "/completion", body)
        if status != 200:
            raise PeerError(f"llama-server: status {status}: {answer}")
        return int(answer["tokens_predicted"])

    def complete_all(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds for all of them at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            began = time.perf_counter()
            counts = list(pool.map(lambda prompt: self.complete(prompt, new_tokens), prompts))
            seconds = time.perf_counter() - began
        if set(counts) != {new_tokens}:
            raise PeerError(f"llama-server: {new_tokens} tokens were asked for, {counts} came")
        return seconds


@contextlib.contextmanager
def llama_server(binary: Path, file: Path, threads: int, *, streams: int, context: int) -> Iterator[LlamaServer]:
    """Starts llama-server on a free port and ends it.

    Args:
        context: tokens of each of the streams.
    """
    command = [str(binary), "-m", str(file), "-t", str(threads), "-np", str(streams), "-c", str(context * streams)]
    command += ["--host", "127.0.0.1", "--port", "0", "--no-ui"]
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            port = None
            while True:
                log.seek(0)
                said = log.read()
                if process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
                    raise PeerError(f"llama-server did not get ready: {said[-2000:]}")
                match = re.search(r"listening on http://127\.0\.0\.1:(\d+)", said)
                port = int(match.group(1)) if match else None
                if port is not None and _is_ready(port):
                    break
                time.sleep(0.01)
            yield LlamaServer(process.pid, port, time.perf_counter() - began)
        finally:
            process.terminate()
            end_process(process)


def _is_ready(port: int) -> bool:
    try:
        return _http("GET", port, "/health")[0] == 200
    except OSError:
        return False


def _http(method: str, port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()
