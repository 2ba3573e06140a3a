"""``python -m scripts.bench_peers``: installs what ``make bench`` compares with, each in a place of its own.

    .peers/llama.cpp    programs built from the source archive of llama-cpp-python, which carries llama.cpp whole
    .peers/openvino     a virtual environment with openvino-genai
    .peers/embedders    a virtual environment with onnxruntime, the exporter for it, and sentence-transformers

transformers and peft are in the project's own environment. Needs cmake and a C++ compiler for llama.cpp. What is there
already is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.peers import EMBEDDERS, LLAMA_CPP, OPENVINO, peers_dir

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-server", "llama-perplexity", "llama-quantize")
PACKAGES = {
    OPENVINO: ["openvino-genai==2026.4.1.0"],
    EMBEDDERS: ["onnxruntime==1.31.1", "optimum-onnx==0.1.0", "sentence-transformers==5.7.0"],
}


def run(*command: str | Path) -> None:
    """Runs a program to its end.

    Raises:
        SystemExit: it failed.
    """
    words = [str(word) for word in command]
    print("$ " + " ".join(words), flush=True)
    if subprocess.run(words, check=False).returncode:
        raise SystemExit(f"bench_peers: {words[0]} failed; see above")


def build_llama_cpp(target: Path, jobs: int) -> None:
    """Builds the programs for this machine, with shared libraries beside them."""
    if shutil.which("cmake") is None:
        raise SystemExit("bench_peers: llama.cpp is built by cmake, which is not installed")
    with tempfile.TemporaryDirectory(prefix="whet-llama-cpp-") as directory:
        folder = Path(directory)
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python")
        run(*pip, "--dest", folder, LLAMA_CPP_PYTHON)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
        build = folder / "build"
        # Libraries are found beside the programs, wherever both are moved.
        rpath = ("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN")
        options = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
        run("cmake", "-S", source, "-B", build, *options, *rpath)
        run("cmake", "--build", build, "--parallel", str(jobs), "--target", *PROGRAMS)
        shutil.copytree(build / "bin", target, symlinks=True)


def make_environment(target: Path, packages: list[str]) -> None:
    """A virtual environment with some packages."""
    run(sys.executable, "-m", "venv", target)
    run(target / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)


def install(name: str, root: Path, make: Callable[[Path], None]) -> None:
    """Makes a peer that is not there; of one that failed, nothing is left."""
    target = root / name
    if target.exists():
        print(f"{target} is there already")
        return
    try:
        make(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def main(arguments: list[str] | None = None) -> None:
    """Installs the peers that are named, or all."""
    names = [LLAMA_CPP, *PACKAGES]
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_peers", description="Installs the peers of the benchmark."
    )
    parser.add_argument("peer", nargs="*", metavar="PEER", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="of the compiler; default: 2")
    options = parser.parse_args(arguments)
    for name in options.peer:
        if name not in names:
            parser.error(f"PEER is {name!r}; accepted: {', '.join(names)}")
    root = peers_dir()
    root.mkdir(parents=True, exist_ok=True)
    for name in options.peer or names:
        if name == LLAMA_CPP:
            install(name, root, lambda target: build_llama_cpp(target, options.jobs))
        else:
            install(name, root, lambda target, packages=PACKAGES[name]: make_environment(target, packages))  # type: ignore[misc]


if __name__ == "__main__":
    main()
