"""The engine with nothing installed but torch, triton, numpy, safetensors, tokenizers and transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

PROGRAM = """
import importlib.metadata, re, sys

def needed(package, seen):
    if package in seen:
        return
    seen.add(package)
    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if "extra ==" not in requirement:
            needed(re.match("[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-"), seen)

allowed = set()
for package in ("torch", "triton", "numpy", "safetensors", "tokenizers", "transformers"):
    needed(package, allowed)
hidden = {
    name
    for name, owners in importlib.metadata.packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & (allowed - {"jinja2"})
} - {"engine", "server", "whet", "tests"}


class Bare:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *args)


sys.meta_path = [Bare(finder) for finder in sys.meta_path]
assert {"grpc", "msgspec", "gguf", "jinja2", "zmq", "aiohttp", "pytest"} <= hidden, hidden
"""

GENERATE = """
from pathlib import Path
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.tokenizer import Tokenizer
import tests.gpu.__main__, tests.gpu.speed
from tests.tiny import save_tiny_hybrid

engine = Engine(EngineConfig(device="cpu", num_threads=1, kv_cache_bytes=1 << 22))
engine.load_model("tiny", save_tiny_hybrid(Path(sys.argv[1]) / "tiny"))
sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
engine.add_request(Request(request_id="1", model="tiny", prompt_token_ids=[5, 6, 7], sampling=sampling))
print("tokens", sum(len(o.token_ids) for _ in range(4) for o in engine.step()))
"""


def test_engine_and_gpu_checks_need_no_more(tmp_path: Path) -> None:
    """The engine loads a tiny hybrid and generates, and the checks for GPUs import, with all other packages hidden."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + GENERATE, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tokens 4"
