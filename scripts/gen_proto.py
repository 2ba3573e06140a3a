"""Generates the Python stubs of proto/whet/v1 into client/whet/v1, or checks that those there are what would be made.

python scripts/gen_proto.py            # write
python scripts/gen_proto.py --check    # exit 1 and name the files that differ
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGE = Path("whet/v1")
OUTPUT = ROOT / "client"

INIT = '"""Generated from proto/whet/v1 by scripts/gen_proto.py; not to be edited."""\n'


def generate(destination: Path) -> None:
    """Writes the stubs of every .proto below ``destination``/whet/v1.

    Raises:
        RuntimeError: with protoc's own words, if it fails.
    """
    protos = sorted((PROTO / PACKAGE).glob("*.proto"))
    services = [path for path in protos if any(line.startswith("service ") for line in path.read_text().splitlines())]
    _protoc(["--python_out", "--mypy_out"], protos, destination)
    # Files without a service would give empty gRPC modules.
    _protoc(["--grpc_python_out", "--mypy_grpc_out"], services, destination)
    (destination / PACKAGE / "__init__.py").write_text(INIT)


def _protoc(outputs: list[str], protos: list[Path], destination: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    command += [f"{output}={destination}" for output in outputs]
    command += [str(path) for path in protos]
    # protoc looks for its plugins on the PATH, and the environment's bin need not be on it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"protoc failed: {done.stderr.strip()}")


def stale_files() -> list[str]:
    """Paths, relative to client/, of stubs that are missing, outdated or no longer made."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(_made(Path(scratch)))
        fresh = _contents(Path(scratch) / PACKAGE)
    committed = _contents(OUTPUT / PACKAGE)
    differing = {name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name)}
    return sorted(str(PACKAGE / name) for name in differing)


def _made(directory: Path) -> Path:
    (directory / PACKAGE).mkdir(parents=True, exist_ok=True)
    return directory


def _contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.glob("*.py*") if path.is_file()}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stubs in the tree, write nothing")
    if parser.parse_args().check:
        stale = stale_files()
        for name in stale:
            print(f"client/{name} differs from what proto/ gives; run `make proto`", file=sys.stderr)
        return 1 if stale else 0
    for path in (_made(OUTPUT) / PACKAGE).glob("*.py*"):
        path.unlink()
    generate(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
