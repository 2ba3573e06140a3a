"""The contract is lint clean, and the committed stubs are what it gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gen_proto

ROOT = Path(__file__).resolve().parents[2]


def test_committed_stubs_are_fresh() -> None:
    assert gen_proto.stale_files() == []


def test_a_changed_stub_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / gen_proto.PACKAGE
    shutil.copytree(gen_proto.OUTPUT / gen_proto.PACKAGE, package)
    with (package / "model_pb2.py").open("a") as file:
        file.write("# edited\n")
    (package / "common_pb2.pyi").unlink()
    (package / "gone_pb2.py").write_text("")
    monkeypatch.setattr(gen_proto, "OUTPUT", tmp_path)
    assert gen_proto.stale_files() == ["whet/v1/common_pb2.pyi", "whet/v1/gone_pb2.py", "whet/v1/model_pb2.py"]


def test_contract_passes_buf_standard_lint() -> None:
    buf = shutil.which("buf") or shutil.which("buf", path=str(Path(sys.executable).parent))
    if buf is None:
        pytest.skip("buf is not installed")
    done = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
