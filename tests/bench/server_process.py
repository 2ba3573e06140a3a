"""A server in a process of its own, and what the system tells about processes (Linux)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.models import GENERATOR
from tests.bench.peers.process import REPOSITORY, end_process
from tests.bench.setup import Bench


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Attributes:
    listen_seconds: from the start until it listened, and so refuses politely what it cannot do yet.
    start_seconds: until it said that it is ready.
    """

    address: str
    pid: int
    listen_seconds: float | None
    start_seconds: float


@contextlib.contextmanager
def running_server(
    bench: Bench, *, model: Path | None = None, options: tuple[str, ...] = ()
) -> Iterator[RunningServer]:
    """Starts a server on free ports with one model, under the name GENERATOR, and ends it.

    Args:
        model: None: the generator.
    """
    command = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    command += ["--model", f"{GENERATOR}={model or bench.models.path(GENERATOR)}", "--threads", str(bench.threads)]
    command += ["--state-dir", str(bench.work_dir / "server"), "--device", "cpu", "--dtype", bench.dtype]
    command += ["--log-level", "warning", "--drain-seconds", "0", *options]
    # An installed package has its bytecode beside it; what the first start compiles is kept for the others.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bench.work_dir / "bytecode")
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        listened: list[float] = []
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.01):
                if listens(process.pid):
                    listened.append(time.perf_counter() - began)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            seconds = time.perf_counter() - began
        finally:
            is_over.set()
            watcher.join()
        fields = dict(part.split("=", 1) for part in ready.split() if "=" in part)
        if "grpc" not in fields:
            raise SystemExit(f"the server did not start; its log is above ({ready!r})")
        yield RunningServer(fields["grpc"], process.pid, listened[0] if listened else None, seconds)
    finally:
        process.terminate()
        end_process(process, 30)
        if process.stdout is not None:
            process.stdout.close()


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a process and all below it: what several of them map counts once (PSS)."""
    total = 0
    for each in family(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def cpu_seconds(pid: int) -> float:
    """Processor time of one process, its threads included and its children not, to the nanosecond, where /proc/PID/stat
    counts hundredths of a second. The number of a process's clock is made as in Linux's ``clock_getcpuclockid``."""
    return time.clock_gettime(~pid << 3 | 2)


def listens(pid: int) -> bool:
    """Whether a process has a TCP socket that listens."""
    inodes = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(entry))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    return True
    except OSError:
        pass
    return False
