"""The front end as a process: light, and clear about what keeps it from starting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "client")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_front_end_never_imports_torch() -> None:
    heavy = "{'torch', 'transformers', 'triton', 'peft'}"
    result = run("-c", f"import sys, server.cli, server.app, server.pull; print(sorted({heavy} & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_worker_imports_nothing_that_serving_does_not_need() -> None:
    """Each of these takes a tenth of a second to two seconds, and 5 to 65 MB."""
    code = """
import sys
import server.workers.worker
heavy = {"transformers", "peft", "torch._dynamo", "sympy", "triton", "gguf", "jinja2", "yaml", "pydantic", "grpc"}
print(sorted(heavy & set(sys.modules)))
import torch
from engine.ops import cpu
with cpu.capture(cpu.Arena()):
    torch.empty(2)
print(sorted(heavy & set(sys.modules)))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "[]"]


def test_help_shows_every_option() -> None:
    from server.config import ServerConfig

    result = run("-m", "server", "--help")
    assert result.returncode == 0
    for name in ServerConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in result.stdout, name


def test_version() -> None:
    result = run("-m", "server", "--version")
    assert result.returncode == 0
    assert result.stdout.startswith("whet-server, version ")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--port", "-1"], 2, "port"),
        (["--model", "x"], 2, "NAME=VALUE"),
        (["--model", "x=/no/such/path"], 1, "/no/such/path"),
        (["--config", "/no/such/file.yaml"], 2, "/no/such/file.yaml"),
        (["--auth-token-file", "/no/such/file"], 2, "/no/such/file"),
        (["--tls-cert", "/no/such/file", "--tls-key", "/no/such/file"], 2, "/no/such/file"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"")
    with_model = arguments if "--model" in arguments else [*arguments, "--model", f"m={model}"]
    result = run("-m", "server", "--state-dir", str(tmp_path / "state"), *with_model)
    assert result.returncode == status, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("whet-server: ")
    assert words in lines[0]


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        common = ["-m", "server", "--model", f"m={model}", "--log-level", "error"]
        for flags in (["--port", str(port)], ["--port", "0", "--metrics-port", str(port)]):
            result = run(*common, "--state-dir", str(tmp_path / "state"), *flags)
            assert result.returncode == 2, result.stderr
            assert f"127.0.0.1:{port}" in result.stderr
            assert "Traceback" not in result.stderr


def test_a_malformed_model_ends_the_start(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF" + b"\xff" * 64)
    result = run(
        "-m", "server", "--model", f"m={model}", "--port", "0", "--metrics-port", "0", "--state-dir",
        str(tmp_path / "state"), "--log-level", "error",
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("whet-server: ")
    assert str(model) in last
    assert "Traceback" not in result.stderr
    assert "ready" not in result.stdout


def test_pull_says_what_it_needs(tmp_path: Path) -> None:
    result = run("-m", "server", "pull", "../etc/passwd")
    assert result.returncode == 1
    assert "ORG/NAME" in result.stderr
    assert "Traceback" not in result.stderr
